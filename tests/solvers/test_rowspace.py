"""The short way to the closed form: against a float64 oracle, and where it must step aside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdetune
from jdetune import closed_form, linalg, programs, synth
from jdetune.metrics import log_mse
from jdetune.sharding import layer_mesh, put
from jdetune.solvers import rowspace
from tests import reference
from tests.real import merged as real_layers

PLAIN = jdetune.SubspaceIntersection(polish=False)


def solve(merged, max_rank):
    with linalg.scope(jnp.dtype("float64")):
        return jax.tree.map(
            np.asarray, jax.jit(rowspace.solve_layer, static_argnums=1)(merged, max_rank)
        )


@pytest.mark.parametrize(("n", "row", "col"), [(3, 96, 80), (4, 60, 120), (5, 96, 80), (8, 96, 80)])
def test_equals_the_float64_oracle_but_for_rounding(n, row, col):
    """Its least squares see row spaces as given: 0.02 to 0.06 decades at real sizes, more here."""
    family = synth.family(n, row, col, 6, seed=n)
    found = solve(family.merged, 8)
    oracle, ranks, _ = reference.intersection(family.merged)
    assert found.clear
    assert found.ranks.tolist() == ranks == [6] * n
    best = log_mse(oracle.astype(np.float32), family.base)
    assert log_mse(found.base.astype(np.float32), family.base) < best + 0.2
    assert found.residual_ratio == pytest.approx(1, abs=0.2)


def test_updates_are_those_of_the_family():
    family = synth.family(4, 96, 80, [6, 3, 0, 8], seed=3)
    found = solve(family.merged, 8)
    assert found.clear
    assert found.ranks.tolist() == [6, 3, 0, 8]
    sigma = reference.sigma(family.merged)
    for i, (left, right) in enumerate(zip(family.left, family.right, strict=True)):
        true = left.astype(np.float64) @ right
        assert np.sqrt(np.mean((found.left[i] @ found.right[i] - true) ** 2)) < sigma


def test_float32_products_are_summed_in_blocks(monkeypatch):
    """Large matrices take float32 products; made here by calling all matrices large."""
    family = synth.family(5, 512, 256, 8, seed=1)
    errors = []
    for large in (2**20, 1):
        monkeypatch.setattr(rowspace, "LARGE", large)
        with linalg.scope(jnp.dtype("float64")):
            found = jax.jit(lambda w: rowspace.solve_layer(w, 8).base)(family.merged)
        errors.append(log_mse(np.asarray(found).astype(np.float32), family.base))
    assert errors[1] < errors[0] + 0.2
    monkeypatch.setattr(rowspace, "BLOCK", 10**6)
    monkeypatch.setattr(rowspace, "BLOCKS", 1)
    with linalg.scope(jnp.dtype("float64")):
        whole = jax.jit(lambda w: rowspace.solve_layer(w, 8).base + 0)(family.merged)
    # one float32 sum over all is worse: the blocks do something
    assert log_mse(np.asarray(whole).astype(np.float32), family.base) > errors[1] + 0.02


def near_shared(angle):
    """Row spaces of all models within an angle of one another."""
    family = synth.family(3, 96, 80, 4, seed=5)
    rng = np.random.default_rng(0)
    common = np.linalg.qr(rng.standard_normal((80, 4)))[0].T
    merged = []
    for left in family.left:
        own = np.linalg.qr((common + angle * rng.standard_normal((4, 80)) / 9).T)[0].T
        merged.append(synth.merge(family.base, left, (0.1 * own).astype(np.float32)))
    return np.stack(merged)


@pytest.mark.parametrize(
    "merged",
    [
        near_shared(0.01),
        synth.family(3, 96, 80, 12, seed=1).merged,
        np.random.default_rng(0).standard_normal((3, 96, 80)).astype(np.float32),
        synth.family(3, 96, 80, 4, dtype="bfloat16", update_rms=1e-5, seed=1).merged,
    ],
    ids=["near-shared rows", "rank above the axis", "no base", "below the rounding"],
)
def test_what_is_not_clear_is_left_to_the_intersection(merged):
    assert not solve(merged, 8).clear


def test_recover_falls_back_and_gives_what_the_intersection_gives(monkeypatch):
    merged = near_shared(0.05)
    found = jdetune.recover(merged, PLAIN)
    monkeypatch.setattr(closed_form, "_first_rank", lambda *_: 0)
    np.testing.assert_array_equal(found.base, jdetune.recover(merged, PLAIN).base)


def test_a_rank_axis_too_small_grows():
    family = synth.family(3, 160, 128, 20, seed=2)
    with linalg.scope(jnp.dtype("float64")):
        group = closed_form._Group(PLAIN, ("float32",) * 3, jnp.dtype("float64"), 128, 1, None)
        weights = put(
            closed_form.as_merged(family.merged[None][0])._replace(values=family.merged[None]), None
        )
        weights = jax.tree.map(lambda part: part[None] if part.ndim == 1 else part, weights)
        found, clear, axis = closed_form._short_way(weights, 4, group)
    assert clear
    assert axis == 32  # 4, 8 and 16 were full
    assert np.asarray(found["ranks"]).tolist() == [[20, 20, 20]]


@pytest.mark.parametrize("rank", [1, 4, 24])
def test_the_first_guess_of_the_rank_holds_it(rank):
    family = synth.family(3, 300, 520, rank, seed=rank)
    group = closed_form._Group(PLAIN, ("float32",) * 3, jnp.dtype("float64"), 300, 1, None)
    guess = closed_form._first_rank(family.merged, group)
    assert rank <= guess <= rank + 4


def test_real_layers_take_the_short_way():
    for truth, merged in list(real_layers("distinct_tasks_r16", 5).values())[:3]:
        found = solve(merged, 16)
        assert found.clear
        assert found.ranks.tolist() == [16] * 5
        assert log_mse(found.base.astype(np.float32), truth) < -19.1


def test_one_device_and_eight_give_the_same():
    families = [synth.family(3, 48, 40, 3, seed=seed) for seed in range(8)]
    stack = np.stack([family.merged for family in families])
    grids = closed_form.as_merged(stack[0])
    weights = grids._replace(
        values=stack, eps=np.tile(grids.eps, (8, 1)), smallest=np.tile(grids.smallest, (8, 1))
    )
    bases = []
    with linalg.scope(jnp.dtype("float64")):
        for count in (1, 8):
            mesh = layer_mesh(count)
            found = programs.row_spaces(put(weights, mesh), 4, 1, mesh)
            bases.append(np.asarray(found["base"]))
            assert np.asarray(found["clear"]).all()
            devices = len(found["base"].devices())
            assert devices == count
    np.testing.assert_allclose(bases[0], bases[1], rtol=0, atol=1e-14)
