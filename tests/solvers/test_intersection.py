"""The closed form against a float64 oracle, on real adapters, and by its invariants."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jdetune import linalg, synth
from jdetune.solvers.intersection import solve_layer
from tests import real, reference

FLOAT64 = jnp.dtype("float64")


@functools.cache
def compiled(max_rank: int, precision: linalg.Precision = "float64"):
    return jax.jit(lambda w: solve_layer(w, max_rank, precision))


def solve(merged: np.ndarray, max_rank: int, precision: linalg.Precision = "float64") -> Any:
    """The solution as NumPy arrays."""
    with linalg.scope(linalg.resolve_dtype(precision)):
        return jax.tree.map(np.asarray, compiled(max_rank, precision)(merged))


def updates(found: Any) -> np.ndarray:
    return found.left @ found.core @ np.swapaxes(found.right, 1, 2)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_equals_the_oracle(n):
    family = synth.family(n, 96, 80, 6, seed=n)
    oracle, ranks, oracle_updates = reference.intersection(family.merged)
    found = solve(family.merged, 6)
    sigma = reference.sigma(family.merged)
    assert ranks == [6] * n
    np.testing.assert_array_equal(found.ranks, ranks)
    assert found.agree
    assert not found.shared
    # The sketch of width 22 with one power step leaves a small part of the rounding error.
    assert np.sqrt(np.mean((found.base - oracle) ** 2)) < 0.1 * sigma
    assert np.sqrt(np.mean((updates(found) - np.array(oracle_updates)) ** 2)) < 0.1 * sigma


@pytest.mark.parametrize("n", [3, 6, 15])
def test_error_is_that_of_the_rounding(n):
    """Mean squared error of the float64 estimate against sigma^2 / n, the floor of a mean."""
    family = synth.family(n, 160, 128, 4, seed=n)
    found = solve(family.merged, 8)
    floor = np.log10(reference.sigma(family.merged) ** 2 / n)
    truth = family.base
    assert reference.log_mse(found.base, truth) < floor + 0.25  # updates cost r(row+col)/(row*col)
    assert 0.8 < found.residual_ratio < 1.2


def test_ranks_differ_by_model_and_may_be_zero():
    family = synth.family(5, 120, 100, [0, 3, 12, 1, 7], seed=1)
    found = solve(family.merged, 16)
    np.testing.assert_array_equal(found.ranks, [0, 3, 12, 1, 7])
    assert found.agree
    assert not found.left[0].any()


def test_ranks_that_all_models_together_could_not_hold():
    """n * r exceeds the smaller side, three ranks do not."""
    family = synth.family(8, 64, 64, 12, seed=2)
    found = solve(family.merged, 16)
    np.testing.assert_array_equal(found.ranks, [12] * 8)
    assert reference.log_mse(found.base, family.base) < np.log10(
        reference.sigma(family.merged) ** 2
    )


def test_max_rank_that_is_too_small_is_no_agreement():
    family = synth.family(3, 96, 80, 6)
    assert not solve(family.merged, 4).agree


def merge_all(base, left, right):
    return np.stack([synth.merge(base, b, a) for b, a in zip(left, right, strict=True)])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_direction_two_of_three_models_share_is_seen(side, count):
    """Ranks give one shared direction away; two need the count of common directions."""
    family = synth.family(3, 96, 80, 6, seed=4)
    left, right = [b.copy() for b in family.left], [a.copy() for a in family.right]
    if side == "left":
        left[1][:, :count] = left[0][:, :count]
    else:
        right[1][:count] = right[0][:count]
    found = solve(merge_all(family.base, left, right), 8)
    assert (not found.agree) or found.shared


def test_nearly_shared_directions_are_solved():
    """One init seed: row spaces at a hundredth of a radian. Ranks are right, the error grows."""
    family = synth.family(3, 96, 80, 6, seed=4)
    rng = np.random.default_rng(0)
    right = [
        family.right[0] + 1e-2 * np.abs(family.right[0]).mean() * noise
        for noise in rng.standard_normal((3, 6, 80)).astype(np.float32)
    ]
    found = solve(merge_all(family.base, family.left, right), 8)
    np.testing.assert_array_equal(found.ranks, 6)
    assert found.agree
    assert not found.shared
    assert found.tail_ratio < 1.1
    assert reference.log_mse(found.base, family.base) < -14


def test_order_of_the_models_does_not_matter():
    family = synth.family(5, 96, 80, 6, seed=5)
    order = np.array([3, 0, 4, 2, 1])
    plain, permuted = solve(family.merged, 8), solve(family.merged[order], 8)
    sigma = reference.sigma(family.merged)
    np.testing.assert_allclose(permuted.base, plain.base, atol=1e-3 * sigma)
    np.testing.assert_allclose(updates(permuted), updates(plain)[order], atol=1e-3 * sigma)


def test_shift_by_a_matrix_for_which_no_stored_sum_rounds():
    """All values stay between 1/2 and 1, so sums are exact and the spacing is one."""
    rng = np.random.default_rng(6)
    family = synth.family(3, 96, 80, 6, seed=6, base_std=0.0)
    inside = (np.float32(0.75) + np.float32(0.2) * family.merged).astype(np.float32)
    shift = (np.round(rng.uniform(-0.2, 0.2, (96, 80)) * 2**24) / 2**24).astype(np.float32)
    shifted = inside + shift
    assert (shifted.astype(np.float64) == inside.astype(np.float64) + shift).all()
    assert shifted.min() > 0.5
    assert shifted.max() < 1
    moved = solve(shifted, 8).base - solve(inside, 8).base
    np.testing.assert_allclose(moved, shift, atol=1e-13)


@pytest.mark.parametrize("power", [-20, 7])
def test_scaling_by_a_power_of_two_scales_the_base(power):
    family = synth.family(3, 96, 80, 6, seed=7)
    factor = np.float32(2.0**power)
    plain, scaled = solve(family.merged, 8), solve(family.merged * factor, 8)
    np.testing.assert_allclose(scaled.base / factor, plain.base, atol=1e-13)


def test_transposing_commutes():
    family = synth.family(4, 96, 80, 6, seed=8)
    plain = solve(family.merged, 8)
    turned = solve(np.ascontiguousarray(np.swapaxes(family.merged, 1, 2)), 8)
    sigma = reference.sigma(family.merged)
    assert np.sqrt(np.mean((turned.base.T - plain.base) ** 2)) < 0.1 * sigma  # another sketch


def test_vmap_equals_a_loop_and_shards_over_devices():
    """One program under vmap, shard_map and jit with a sharded layer axis gives one result."""
    count = jax.device_count()
    stack = np.stack([synth.family(3, 48, 40, 4, seed=s).merged for s in range(count)])
    mesh = jax.make_mesh((count,), ("layer",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("layer")

    def base(stack):
        return jax.vmap(lambda w: solve_layer(w, 4, "float64").base.astype(jnp.float32))(stack)

    loop = np.stack([solve(w, 4).base.astype(np.float32) for w in stack])
    with linalg.scope(FLOAT64):
        mapped = jax.jit(base)(stack)
        sharded = jax.jit(base, in_shardings=NamedSharding(mesh, spec))(stack)
        per_device = jax.jit(jax.shard_map(base, mesh=mesh, in_specs=spec, out_specs=spec))(stack)
    assert count > 1
    for other in (mapped, sharded, per_device):
        np.testing.assert_allclose(other, loop, atol=2 * np.spacing(np.abs(loop).max()))


@pytest.mark.parametrize(
    ("name", "n", "rank", "error", "exact"),
    [
        ("distinct_tasks_r16", 3, 16, -18.6, 0.88),
        ("distinct_tasks_r16", 5, 16, -19.3, 0.92),
        ("same_task_r32", 5, 32, -18.9, 0.88),
    ],
)
def test_real_adapters_reach_the_promised_error(name, n, rank, error, exact):
    """The promise of the first release, on real updates of a real model."""
    errors, fractions = [], []
    for truth, merged in real.merged(name, n).values():
        found = solve(merged, rank)
        np.testing.assert_array_equal(found.ranks, rank)
        assert found.agree
        base = found.base.astype(np.float32)
        errors.append(reference.log_mse(base, truth))
        fractions.append(reference.bits_equal(base, truth))
    assert np.mean(errors) <= error
    assert np.mean(fractions) >= exact


def test_real_adapters_in_float32_only():
    """The path for hardware without float64 has an accuracy of its own: about a decade less."""
    errors = []
    for truth, merged in real.merged("distinct_tasks_r16", 3).values():
        found = solve(merged, 16, "float32")
        assert found.base.dtype == np.float32
        np.testing.assert_array_equal(found.ranks, 16)
        errors.append(reference.log_mse(found.base, truth))
    assert np.mean(errors) <= -17.0
