"""What is done to the numbers of a release, and what recovery makes of it."""

import ml_dtypes
import numpy as np
import pytest

import jdetune
from jdetune import defend, metrics, synth
from tests.defend import small

#: Square, as the attention matrices of the small BERT are: they share compiled programs.
FAMILY = synth.family(3, 96, 96, 4, seed=0)
RMS = 1e-3
VALUE = "encoder.layer.0.attention.self.value.weight"


def recover(stack):
    found = jdetune.recover(stack)
    return found, jdetune.Status(int(found.status))


def test_undefended_models_are_recovered():
    found, status = recover(FAMILY.merged)
    assert status is jdetune.Status.OK
    assert metrics.log_mse(np.asarray(found.base), FAMILY.base) < -16


@pytest.mark.parametrize("rms", [0.01 * RMS, RMS])
def test_noise_has_its_size_and_is_refused(rms):
    noisy = defend.dense_noise(FAMILY.merged, rms, seed=0)
    assert noisy.dtype == np.float32
    assert np.std(noisy - FAMILY.merged) == pytest.approx(rms, rel=0.02)
    found, status = recover(noisy)
    assert status is jdetune.Status.NOT_LOW_RANK
    assert np.isnan(found.base).all()


def test_a_residual_has_its_rank_and_size_and_a_high_one_is_refused():
    more = defend.rank_residual(FAMILY.merged, rank=30, rms=RMS, seed=0)
    for added in more - FAMILY.merged:
        assert np.sqrt(np.mean(np.square(added))) == pytest.approx(RMS, rel=1e-3)
        values = np.linalg.svd(added, compute_uv=False)
        assert values[29] > 1e3 * values[30]
    _, status = recover(more)
    assert status in (jdetune.Status.RANK_TOO_LARGE, jdetune.Status.NOT_LOW_RANK)


def common():
    """The direction, and the defended stack."""
    defended = defend.common_direction(FAMILY.merged, RMS, seed=0)
    added = (defended - FAMILY.merged).astype(np.float64)
    u, values, _ = np.linalg.svd(np.concatenate(added, axis=1), full_matrices=False)
    assert values[1] < 1e-3 * values[0]
    return u[:, :1], defended


def test_along_a_common_direction_no_base_is_better_than_another():
    b, defended = common()
    y = 1e-3 * np.random.default_rng(2).standard_normal((1, 96))
    other = FAMILY.base + np.matmul(b, y)
    for model in defended:
        ranks = [np.linalg.matrix_rank(model - base, tol=1e-5) for base in (FAMILY.base, other)]
        assert ranks == [5, 5]


def test_a_common_direction_is_refused():
    _, defended = common()
    found, status = recover(defended)
    assert status is jdetune.Status.SHARED_DIRECTIONS
    assert np.isnan(found.base).all()


def test_across_the_common_direction_the_base_comes_back_and_along_it_not():
    b, defended = common()
    across = defend.without_common(defended)
    assert across.directions.shape == (96, 1)
    assert abs(float(np.sum(across.directions * b))) > 1 - 1e-6
    found, status = recover(across.stack)
    assert status is jdetune.Status.OK
    error = np.asarray(found.base, np.float64) + across.rest - FAMILY.base
    along = np.matmul(b, np.matmul(b.T, error))
    assert np.sqrt(np.mean(np.square(error - along))) < 1e-8
    assert np.sqrt(np.mean(np.square(along))) > 0.1 * RMS


def test_nothing_is_taken_out_where_nothing_is_common():
    across = defend.without_common(FAMILY.merged)
    assert across.directions.shape == (96, 0)
    np.testing.assert_array_equal(across.stack, FAMILY.merged)
    assert not across.rest.any()


@pytest.mark.parametrize("grid", ["bfloat16", "float16"])
def test_lower_precision_is_a_cast(grid):
    found = defend.lower_precision(FAMILY.merged, grid)
    dtype = ml_dtypes.bfloat16 if grid == "bfloat16" else np.float16
    np.testing.assert_array_equal(found, FAMILY.merged.astype(dtype))


def test_int8_has_its_levels_and_is_refused():
    found = defend.lower_precision(FAMILY.merged, "int8")
    for row in found.reshape(-1, 96):
        steps = row / (np.abs(row).max() / 127)
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    worst = np.abs(found - FAMILY.merged).max(axis=-1)
    assert (worst <= np.abs(FAMILY.merged).max(axis=-1) / 254 * 1.001).all()
    _, status = recover(found)
    assert status is not jdetune.Status.OK


def test_recovery_in_other_coordinates_is_refused_and_succeeds_after_alignment():
    base, releases, pairs = small.weights(small.BERT), [], []
    for seed, tune in enumerate(small.fine_tunes(small.BERT, base)):
        pairs.append(defend.change_coordinates(small.BERT, tune, seed))
        releases.append(pairs[-1][0])
    _, status = recover(np.stack([release[VALUE] for release in releases]))
    assert not status.has_base
    aligned = defend.align(small.BERT, releases).models
    found, status = recover(np.stack([model[VALUE] for model in aligned]))
    truth = defend.moved(base, pairs[0][1])[VALUE]
    assert status is jdetune.Status.OK
    assert found.ranks.tolist() == [2, 2, 2]
    # a few roundings of elements of size 0.25, which are up to 7e-9 each
    assert metrics.log_mse(np.asarray(found.base), truth) < 2 * np.log10(3e-8)
