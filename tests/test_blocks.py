"""Blocks of rows give what all rows at once give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdetune
from jdetune import linalg, synth
from jdetune.blocks import Each, by_rows


@pytest.mark.parametrize("block", [5, 20])
def test_sums_and_rows_are_those_of_numpy(block, monkeypatch):
    monkeypatch.setattr(linalg, "row_block", lambda row, width, least=16: block)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 20, 4)), rng.standard_normal((20, 6))

    def function(rows):
        a, b = rows
        return {"sum": a.sum(1), "count": jnp.int32(a.shape[1])}, (2 * a, b.sum(1, keepdims=True))

    with linalg.scope(jnp.dtype("float64")):
        sums, (doubled, totals) = jax.jit(lambda rows: by_rows(function, rows))((a, b))
    np.testing.assert_allclose(sums["sum"], a.sum(1), atol=1e-14)
    assert int(sums["count"]) == 20
    np.testing.assert_array_equal(doubled, 2 * a)
    np.testing.assert_allclose(totals, b.sum(1, keepdims=True), atol=1e-14)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_layer_in_blocks_or_batches_is_recovered_as_one_at_once(backend, monkeypatch):
    family = synth.family(4, 96, 80, 3, seed=5)
    whole = jdetune.recover(family.merged)
    jax.clear_caches()
    if backend == "gpu":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    else:
        monkeypatch.setattr(linalg, "row_block", lambda row, width, least=16: 24)
    blocks = jdetune.recover(family.merged)
    jax.clear_caches()
    assert whole.ok
    assert blocks.ok
    assert np.mean(np.asarray(blocks.base) == np.asarray(whole.base)) > 0.999  # sums round anew
    for name in ("predicted_error", "amplification", "exact_fraction"):
        one, other = (float(np.asarray(getattr(found, name))) for found in (blocks, whole))
        assert one == pytest.approx(other, rel=1e-3), name


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("block", [5, 20])
def test_models_cut_one_by_one_are_those_of_all(block, backend, monkeypatch):
    if backend == "gpu":  # batches of all models: never in blocks
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        block = 20
    monkeypatch.setattr(linalg, "row_block", lambda row, width, least=16: block)
    rng = np.random.default_rng(1)
    a, b = rng.uniform(1, 2, (2, 3, 20, 4))

    def function(rows):
        a, b = rows
        total = linalg.sum_each(lambda a, b: a / b, a, b)
        products = linalg.stack_models(linalg.map_each(jnp.multiply, a, b))
        shifted = linalg.map_each(lambda i, a: (jnp.float64(i) + a, -a), range(3), a)
        means = linalg.weighted_mean(a, b), linalg.inverse_variance_mean(a, b)
        return (), (total, products, [linalg.stack_models(part) for part in shifted], means)

    with linalg.scope(jnp.dtype("float64")):
        rows = Each(jnp.asarray(a)), Each(jnp.asarray(b))
        _, (total, products, (plus, minus), means) = by_rows(function, rows)
    np.testing.assert_allclose(total, (a / b).sum(0), rtol=1e-14)
    np.testing.assert_allclose(products, a * b, rtol=1e-14)
    np.testing.assert_allclose(plus, np.arange(3)[:, None, None] + a, rtol=1e-14)
    np.testing.assert_array_equal(minus, -a)
    np.testing.assert_allclose(means[0], np.average(b, axis=0, weights=a), rtol=1e-14)
    np.testing.assert_allclose(means[1], np.average(b, axis=0, weights=1 / a), rtol=1e-14)
