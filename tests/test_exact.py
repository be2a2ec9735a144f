"""The base on its grid, against NumPy's own grids, brute-force intervals and known bases."""

import hashlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jdetune
from jdetune import grids, linalg, snap, synth
from jdetune.noise import as_merged, merge_variance, spacing
from jdetune.solvers.pairs import noise_scales
from jdetune.solvers.relative import units_of
from jdetune.status import Status
from tests import reference

FLOAT64 = jnp.dtype("float64")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_steps_on_the_grid_are_numpys(dtype):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(3000) * 10.0 ** rng.uniform(-4, 3, 3000)
    edges = [1.0, -1.0, 2.0, -0.5, 1.5, 4.0]
    points = np.concatenate([values, edges]).astype(DTYPES[dtype])
    up, down = (np.nextafter(points, DTYPES[dtype](end)) for end in (np.inf, -np.inf))
    grid = grids.grid(dtype)
    with linalg.scope(FLOAT64):
        wide = jnp.asarray(points.astype(np.float64))
        stepped = [np.asarray(grids.step_up(wide, grid, k)) for k in (1, -1, 2)]
        rounded = np.asarray(grids.nearest(jnp.asarray(np.append(values, edges)), grid))
    np.testing.assert_array_equal(stepped[0], up.astype(np.float64))
    np.testing.assert_array_equal(stepped[1], down.astype(np.float64))
    twice = np.nextafter(up, DTYPES[dtype](np.inf))
    np.testing.assert_array_equal(stepped[2], twice.astype(np.float64))
    np.testing.assert_array_equal(rounded, points.astype(np.float64))


def test_one_point_in_all_intervals_is_found_by_brute_force():
    """Updates known exactly: the grid points that round to every model, tried one by one."""
    rng = np.random.default_rng(1)
    base = (0.02 * rng.standard_normal((40, 30))).astype(ml_dtypes.bfloat16)
    left, right = rng.standard_normal((4, 40, 2)) * 0.03, rng.standard_normal((4, 2, 30)) * 0.03
    sums = base.astype(np.float64) + left @ right
    merged = sums.astype(ml_dtypes.bfloat16)
    grid = grids.grid("bfloat16")
    with linalg.scope(FLOAT64):
        wide = jnp.asarray(base.astype(np.float64))
        points = np.stack([np.asarray(grids.step_up(wide, grid, k)) for k in range(-6, 7)])
        fits = ((points[:, None] + left @ right).astype(ml_dtypes.bfloat16) == merged).all(1)
        offset = jnp.asarray(points[6 + rng.integers(-1, 2)])
        units = units_of(as_merged(merged), noise_scales(merged, FLOAT64))
        unit = units.row[:, None] * units.col
        spaced = np.asarray(spacing(as_merged(merged)), np.float64) / np.asarray(unit)
        found = snap.snap(
            merged,
            units,
            jnp.asarray((merged.astype(np.float64) - offset - left @ right) / unit, jnp.float32),
            offset,
            jnp.asarray(1e-6 * spaced**2, jnp.float32),
            grid,
        )
    alone = fits.sum(0) == 1
    assert 0.5 < alone.mean() < 0.999  # both kinds are there
    assert fits[6].all()
    single = np.asarray(found.wrong) < 1e-3
    truth = base.astype(np.float64)
    # the window holds two points either side of the centre, which is off by one at most
    np.testing.assert_array_equal(np.asarray(found.base)[alone], truth[alone])
    assert np.mean(single[alone]) > 0.99
    assert not single[fits.sum(0) >= 2].any()


def test_a_grid_is_told_by_the_estimate_alone():
    rng = np.random.default_rng(2)
    fine = 0.02 * rng.standard_normal((60, 50))
    noise = 1e-9 * rng.standard_normal(fine.shape)
    variance = np.full(fine.shape, 1e-18)
    with linalg.scope(FLOAT64):
        for name, index in (("bfloat16", 2), ("float16", 1), ("float32", 0)):
            on = fine.astype(DTYPES[name]).astype(np.float64) + noise
            found = grids.find_grid(jnp.asarray(on), jnp.asarray(variance), "float32")
            assert int(found) == index
        half = grids.grid("float16")
        off = [
            float(grids.off_grid(jnp.asarray(x + noise), jnp.asarray(variance), half))
            for x in (fine, fine.astype(np.float16).astype(np.float64))
        ]
    assert off[0] == pytest.approx(1.0, abs=0.05)  # 3000 samples
    assert off[1] < 1e-3


@pytest.mark.parametrize(
    ("base_dtype", "merged_dtype"),
    [("bfloat16", "float32"), ("float16", "float32"), ("bfloat16", "float16")],
)
def test_base_of_a_coarser_grid_comes_back_in_it(base_dtype, merged_dtype):
    family = synth.family(4, 96, 80, 4, dtype=base_dtype)
    pairs = zip(family.left, family.right, strict=True)
    merged = np.stack([synth.merge(family.base, b, a, merged_dtype) for b, a in pairs])
    found = jdetune.recover(merged)
    assert str(found.base.dtype) == base_dtype
    same = found.base == family.base
    if merged_dtype == "float32":
        digests = {hashlib.sha256(w.tobytes()).digest() for w in (found.base, family.base)}
        assert len(digests) == 1
        assert found.certain.all()
        assert float(found.exact_fraction) > 1 - 1e-6
        assert float(found.predicted_error) < -25
    else:
        assert same.mean() > 0.99
        assert not (found.certain & ~same).any()


def test_models_of_one_stack_may_be_stored_in_different_dtypes():
    family = synth.family(4, 96, 80, 4, dtype="bfloat16")
    dtypes = ["bfloat16", "float32", "float16", "float32"]
    triples = zip(family.left, family.right, dtypes, strict=True)
    models = [synth.merge(family.base, b, a, dtype) for b, a, dtype in triples]
    stack = np.stack([model.astype(np.float32) for model in models])
    found = jdetune.recover(stack)
    assert found.ranks.tolist() == [4] * 4
    assert str(found.base.dtype) == "bfloat16"
    same = found.base == family.base
    narrow = jdetune.recover(family.merged)  # all of them in bfloat16
    assert same.mean() > 0.995
    assert same.mean() > np.mean(narrow.base == family.base)
    assert not (found.certain & ~same).any()


@pytest.mark.parametrize("ratio", [0.1, 1.0])
def test_small_updates_leave_the_shared_value_not_the_mean(ratio):
    """16-bit merges with updates of the size of a unit in the last place."""
    unit = 2.0**-8 * 0.0135  # of the median of |N(0, 0.02^2)|
    family = synth.family(4, 96, 80, 4, dtype="bfloat16", update_rms=ratio * unit, seed=3)
    found = jdetune.recover(family.merged)
    assert Status(int(found.status)) is (Status.OK if ratio == 1 else Status.NOISE_DOMINATED)
    wide = family.merged.astype(np.float64)
    mean = wide.mean(0).astype(ml_dtypes.bfloat16)
    same, of_mean = np.mean(found.base == family.base), np.mean(mean == family.base)
    assert same >= of_mean
    if ratio == 1.0:
        assert same > of_mean + 0.1
    true = reference.log_mse(found.base, family.base)
    assert float(found.predicted_error) == pytest.approx(true, abs=0.4)
    assert float(found.stats["detection_floor"]) > 0
    assert not (found.certain & (found.base != family.base)).any()


def test_several_roundings_are_seen_and_not_certified_away():
    first = synth.family(4, 96, 80, 4, dtype="bfloat16")
    second = synth.family(4, 96, 80, 2, dtype="bfloat16", seed=7)
    pairs = zip(first.merged, second.left, second.right, strict=True)
    chained = np.stack([synth.merge(model, b, a) for model, b, a in pairs])
    found = jdetune.recover(chained)
    assert found.ok
    assert found.ranks.tolist() == [6] * 4
    assert float(found.stats["residual_ratio"]) == pytest.approx(2**0.5, abs=0.05)
    true = reference.log_mse(found.base, first.base)
    assert float(found.predicted_error) == pytest.approx(true, abs=0.3)
    assert np.mean(found.certain & (found.base != first.base)) < 1e-3


def test_a_base_finer_than_its_models_comes_in_float32():
    family = synth.family(4, 96, 80, 4)
    merged = family.merged.astype(ml_dtypes.bfloat16)
    found = jdetune.recover(merged)
    assert found.base.dtype == np.float32
    rounded = found.base.astype(ml_dtypes.bfloat16)
    true = reference.log_mse(found.base, family.base)
    assert true < reference.log_mse(rounded, family.base) - 0.1


@pytest.mark.slow
def test_base_comes_in_the_dtype_that_is_asked_for():
    merged = synth.family(4, 96, 80, 4).merged.astype(ml_dtypes.bfloat16)
    asked = jdetune.recover(merged, jdetune.SubspaceIntersection(base_dtype="bfloat16"))
    assert str(asked.base.dtype) == "bfloat16"


def test_rows_that_are_zero_in_all_models_are_exact():
    family = synth.family(4, 96, 80, 4, seed=5)
    merged = family.merged.copy()
    merged[:, 7] = 0
    found = jdetune.recover(merged)
    assert found.ok
    assert not found.base[7].any()
    assert found.certain[7].all()
    assert np.isfinite(float(found.predicted_error))


def test_variance_of_the_rule_is_what_numpy_sees():
    """R2 rounds the update to storage before it is added."""
    family = synth.family(1, 200, 150, 8, dtype="bfloat16", update_rms=0.02)
    b, a = family.left[0].astype(np.float64), family.right[0].astype(np.float64)
    update = (b @ a).astype(ml_dtypes.bfloat16).astype(np.float64)
    base = family.base.astype(np.float64)
    merged = (base + update).astype(ml_dtypes.bfloat16)
    error = merged.astype(np.float64) - base - b @ a
    with linalg.scope(FLOAT64):
        left, right = jnp.asarray(b)[None], jnp.asarray(a)[None]
        variance = {
            rule: np.asarray(merge_variance(merged[None], left, right, rule))[0]
            for rule in ("R1", "R2")
        }
    assert np.mean(error**2 / variance["R2"]) == pytest.approx(1, abs=0.1)
    assert np.mean(error**2 / variance["R1"]) > 1.5


def test_log_probability_of_an_interval_is_that_of_the_logistic_distribution():
    rng = np.random.default_rng(0)
    low = np.concatenate([rng.uniform(-60, 60, 500), [-1e4, 30.0, -0.5, 1e-3]])
    high = low + np.concatenate([rng.uniform(1e-3, 40, 500), [1.0, 2e4, 1.0, 1e-3]])
    with np.errstate(over="ignore"):
        mirrored = np.where(low + high > 0, -high, low), np.where(low + high > 0, -low, high)
    a, b = mirrored  # P(a, b) = P(-b, -a); the log of the difference in float64
    true = b + np.log1p(-np.exp(a - b)) - np.logaddexp(0, a) - np.logaddexp(0, b)
    middle, half = jnp.float32((low + high) / 2), jnp.float32((high - low) / 2)
    tail, outside = snap._inside(middle, half, jnp.exp(-2 * half))
    width = np.log1p(-np.exp(low - high))  # the same for all grid points
    found = width + np.asarray(tail) - np.log(np.asarray(outside))
    assert np.asarray(outside).max() <= 4
    np.testing.assert_allclose(found, true, rtol=2e-4, atol=2e-4)
    assert np.isfinite(found).all()
