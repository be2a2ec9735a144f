"""The certificate against dense covariances and against the truth, where it is known."""

import jax.numpy as jnp
import numpy as np
import pytest

import jdetune
from benchmarks import held_out
from jdetune import certificate, linalg, programs, synth
from jdetune.noise import as_merged, merge_variance
from jdetune.solvers import relative
from jdetune.solvers.pairs import noise_scales
from jdetune.status import Status
from tests import reference

FLOAT64 = jnp.dtype("float64")


def dense_errors(family, variance):
    """Root of the mean of total weight times variance of the base: amplification, by brute force.

    The Jacobian of all updates and the base; the covariance of the least-squares fit is the
    pseudoinverse of its normal matrix.
    """
    n, row, col = family.merged.shape
    weight = 1 / np.sqrt(variance)
    columns = []
    for i in range(n):
        b, a = family.left[i].astype(np.float64), family.right[i].astype(np.float64)
        for k in range(b.shape[1]):
            for x in range(row):
                block = np.zeros((n, row, col))
                block[i, x] = a[k]
                columns.append((weight * block).ravel())
            for y in range(col):
                block = np.zeros((n, row, col))
                block[i, :, y] = b[:, k]
                columns.append((weight * block).ravel())
    jacobian = np.stack(columns, 1)
    base = np.zeros((n, row * col, row * col))
    base[:, np.arange(row * col), np.arange(row * col)] = 1
    base = (base * weight.reshape(n, -1, 1)).reshape(-1, row * col)
    own, size = np.linalg.qr(base)
    rest = jacobian - own @ (own.T @ jacobian)
    normal = np.linalg.pinv(rest.T @ rest, rcond=1e-9)
    moved = np.linalg.solve(size, own.T @ jacobian)
    through = np.einsum("ij,jk,ik->i", moved, normal, moved)
    total = (weight**2).sum(0).ravel()
    return np.sqrt(np.mean(1 + total * through))


def relative_to_truth(family):
    """The layer relative to its true updates; float64 factors."""
    left, right = (jnp.asarray(np.stack(x), FLOAT64) for x in (family.left, family.right))
    models = as_merged(family.merged)
    units = relative.units_of(models, noise_scales(family.merged, FLOAT64))
    variance = merge_variance(models, left, right, "R1", units)
    active = jnp.ones((left.shape[0], left.shape[2]), bool)
    return relative.view(models, left, right, active, units, variance)


@pytest.mark.parametrize("n", [3, 4])
def test_amplification_is_that_of_the_dense_normal_matrix(n):
    family = synth.family(n, 18, 14, 2, seed=4, decay=0.5)
    with linalg.scope(FLOAT64):
        at = relative_to_truth(family)
        found = certificate.spread(at, jnp.zeros((18, 14), bool))
        unit = np.asarray(at.units.row)[:, None] * np.asarray(at.units.col)
        fitted = np.asarray(1 / at.weight) * unit**2
    exact = dense_errors(family, fitted)
    assert exact > 1.1
    # one replicate of about 200 numbers
    assert float(found.amplification) == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize("share", [0.5, 0.89, 0.99])
def test_errors_of_updates_as_the_base_becomes_known(share):
    """By the first replicate's factors or, where these fail, by a new one; small elements last."""
    family = synth.family(8, 96, 128, 2, seed=6)
    size = np.abs(family.base)
    known = jnp.asarray(size > np.quantile(size, 1 - share))
    with linalg.scope(FLOAT64):
        at = relative_to_truth(family)
        first = certificate.spread(at, jnp.zeros((96, 128), bool))
        again = certificate.spread_again(first, at, known).variance()
        anew = certificate.spread(at, known).variance()
    assert first.amplification < certificate.ONE_REPLICATE
    unknown = np.asarray(~known)
    expected = float(anew[:, unknown].mean())
    assert float(again[:, unknown].mean()) == pytest.approx(expected, rel=0.1)


def near_shared(angle, seed):
    """Four models whose row spaces lie within about that angle of each other."""
    rng = np.random.default_rng(seed)
    row, col, rank = 96, 80, 4
    base = (0.02 * rng.standard_normal((row, col))).astype(np.float32)
    common = np.linalg.qr(rng.standard_normal((col, rank)))[0]
    merged = []
    for _ in range(4):
        v = np.linalg.qr(common + angle / 9 * rng.standard_normal((col, rank)))[0]
        update = rng.standard_normal((row, rank)) @ v.T
        update *= 1e-3 * np.sqrt(row * col) / np.linalg.norm(update)
        merged.append(base + update.astype(np.float32))
    return base, np.stack(merged)


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3])
def test_error_and_amplification_where_directions_are_nearly_shared(angle):
    base, merged = near_shared(angle, 8)
    found = jdetune.recover(merged)
    assert found.ok
    true = reference.log_mse(found.base, base)
    assert float(found.predicted_error) == pytest.approx(true, abs=0.4)
    assert float(found.amplification) > 0.15 / angle
    assert not (found.certain & (found.base != base)).any()
    words = certificate.verdict(Status.OK, float(found.exact_fraction), float(found.amplification))
    assert words.startswith("amplified by" if angle < 0.05 else ("amplified", "at the floor"))


@pytest.mark.parametrize("seed", [21, 22])
def test_predicts_the_error_of_the_base_as_returned(seed):
    family = synth.family(4, 96, 80, 4, seed=seed)
    found = jdetune.recover(family.merged)
    true = reference.log_mse(found.base, family.base)
    assert float(found.predicted_error) == pytest.approx(true, abs=0.3)
    same = found.base == family.base
    assert float(found.exact_fraction) == pytest.approx(same.mean(), abs=0.02)
    assert 1 <= float(found.amplification) < 1.5
    assert not (found.certain & ~same).any()
    assert found.certain.mean() > 0.7


@pytest.mark.parametrize(
    ("status", "exact", "amplification", "words"),
    [
        (Status.OK, 1.0, 1.2, "exact"),
        (Status.OK, 0.97, 1.2, "at the floor"),
        (Status.OK, 0.4, 23.9, "amplified by 24"),
        (Status.SHARED_DIRECTIONS, np.nan, np.nan, "not identifiable"),
        (Status.NOT_LOW_RANK, np.nan, np.nan, "failed"),
    ],
)
def test_verdict_in_words(status, exact, amplification, words):
    assert certificate.verdict(status, exact, amplification) == words


def test_nothing_is_certain_where_one_direction_of_rows_and_columns_is_nearly_shared():
    """Errors of such a direction are one draw for all elements: a replicate cannot know its size.

    Angles of about 0.03 rad; without the rule some of 100,000 certain elements are wrong.
    """
    case = held_out.near(0.03, 3, seed=202, whole=False, shape=(96, 128), rank=4)
    (layer,) = case.layers.values()
    found = jdetune.recover(layer.merged)
    assert found.ok
    assert 1e-6 < found.stats["conditioning"] < 1e-5
    assert not found.certain.any()
    assert found.amplification > certificate.AT_THE_FLOOR


def test_nothing_is_certain_where_directions_may_be_hidden_in_the_rounding():
    """A spectrum that goes through the edge: without the rule 36 of 42476 certain ones are wrong.

    With the rank given nothing is hidden.
    """
    family = synth.family(3, 256, 256, 24, seed=2, dtype="bfloat16", decay=5.0)
    found = jdetune.recover(family.merged)
    assert found.ok
    assert found.ranks.max() < 24
    assert found.stats["rank_gap"] < programs.HIDING
    assert not found.certain.any()
    assert not (found.base == family.base).all()
    told = jdetune.recover(family.merged, jdetune.SubspaceIntersection(rank=24))
    assert told.certain.mean() > 0.6
    assert not (told.certain & (told.base != family.base)).any()


def test_elements_are_certain_where_the_last_directions_stand_clear():
    family = synth.family(3, 256, 256, 24, seed=1, dtype="bfloat16", decay=4.5)
    found = jdetune.recover(family.merged)
    assert found.ranks.tolist() == [24] * 3
    assert programs.HIDING < found.stats["rank_gap"] < 1.5
    assert found.certain.mean() > 0.6
    assert not (found.certain & (found.base != family.base)).any()
