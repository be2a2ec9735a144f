"""Full space and core space: nothing but noise is lost, and iterates agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import core, linalg, synth
from jdetune.rank_schedule import RankSchedule
from jdetune.solvers import spectral
from jdetune.solvers.spectral import SpectralDeTuning
from tests import reference

FLOAT64 = jnp.dtype("float64")


def exact_stack(n: int, row: int, col: int, rank: int, seed: int = 0) -> np.ndarray:
    """Float64 models whose differences are low rank to the last bits."""
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((n, row, rank)), rng.standard_normal((n, rank, col))
    scale = np.exp(-2.0 * np.arange(rank) / rank)
    return rng.standard_normal((row, col)) + 0.1 * (left * scale) @ right


@functools.cache
def compiled(widths: tuple[int, int], dtype: str):
    def run(weights, updates):
        basis = core.joint_basis(weights, widths, jnp.dtype(dtype))
        cores = core.to_core(weights, basis)
        outside = core.outside_residual(weights, basis, cores)
        back = jax.vmap(lambda c: core.from_core(c, basis))(cores)
        inner = linalg.contract("rl,nrc,ck->nlk", basis.left, updates, basis.right)
        return basis, cores, outside, back, core.base_from_core(weights, basis, inner.mean(0))

    return jax.jit(run)


def enter(weights, widths, dtype="float64", updates=None):
    updates = np.zeros(weights.shape) if updates is None else updates
    with linalg.scope(jnp.dtype(dtype)):
        return jax.tree.map(np.asarray, compiled(widths, dtype)(weights, updates.astype(dtype)))


def spread(matrices: np.ndarray) -> float:
    """Mean square of the deviations from the mean over models."""
    return float(np.mean((matrices - matrices.mean(axis=0)) ** 2))


def test_widths_are_the_ranks_with_oversampling_or_the_sides():
    assert core.core_widths(5, 16, 384, 1536) == (90, 90)
    assert core.core_widths(5, 16, 384, 64) == (90, 64)
    assert core.core_widths(5, 16, 32, 64) == (32, 64)


@pytest.mark.parametrize(("row", "col"), [(60, 40), (12, 70)])
def test_round_trip(row, col):
    """Exactly low-rank differences come back; a narrow side does not cut the other one."""
    weights = exact_stack(4, row, col, 3)
    basis, cores, outside, back, _ = enter(weights, core.core_widths(4, 3, row, col))
    for side in basis:
        np.testing.assert_allclose(side.T @ side, np.eye(side.shape[1]), atol=1e-13)
    assert cores.shape == (4, min(22, row), min(22, col))
    np.testing.assert_array_equal(cores[0], 0)
    # A dozen products of up to 70 terms of size 1, each rounded at 1e-16.
    np.testing.assert_allclose(back, weights - weights[0], atol=1e-13)
    assert outside < 1e-27


def test_stored_models_leave_only_rounding_outside():
    """As little as the exact singular vectors leave, but for a few percent."""
    merged = synth.family(5, 120, 96, 6, decay=6.0).merged
    widths = core.core_widths(5, 6, 120, 96)
    _, _, outside, _, _ = enter(merged, widths)
    difference = merged.astype(np.float64) - merged[0]
    left = np.linalg.svd(np.hstack(list(difference)))[0][:, : widths[0]]
    right = np.linalg.svd(np.vstack(list(difference)))[2][: widths[1]].T
    inside = left @ (left.T @ difference @ right) @ right.T
    best = spread(difference - inside)
    assert best < reference.sigma(merged) ** 2
    assert outside < best * 1.06


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_constants_are_those_of_a_dense_computation(dtype):
    """With a basis far too narrow, so that what lies outside is not small."""
    merged = synth.family(4, 50, 60, 5).merged
    updates = 1e-3 * np.random.default_rng(1).standard_normal(merged.shape)
    basis, cores, outside, back, base = enter(merged, (7, 9), dtype, updates)
    difference = merged.astype(np.float64) - merged[0]
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(outside, spread(difference - back), rtol=tolerance)
    projected = basis.left.T @ difference @ basis.right
    # Float32 rounds a difference of stored values at about 1e-7 of its size, here 3e-3.
    np.testing.assert_allclose(cores, projected, atol=1e-14 if dtype == "float64" else 1e-8)
    assert basis.left.dtype == cores.dtype == outside.dtype == base.dtype == dtype
    removed = basis.left @ (basis.left.T @ updates.mean(axis=0) @ basis.right) @ basis.right.T
    dense = merged.astype(np.float64).mean(axis=0) - removed
    # Float32 rounds weights of 0.1 once.
    np.testing.assert_allclose(base, dense, atol=1e-15 if dtype == "float64" else 1e-8)
    # Loss in the core plus the constant is the loss in full space, for any shift.
    shift = 1e-3 * np.random.default_rng(0).standard_normal((7, 9))
    full = difference - difference.mean(0) - basis.left @ shift @ basis.right.T
    inner = cores - cores.mean(0) - shift
    total = np.sum(inner.astype(np.float64) ** 2) / merged.size + outside
    np.testing.assert_allclose(total, np.mean(full**2), rtol=max(tolerance, 1e-12))


def both_spaces(stack, rank, steps, schedule, seed=0):
    """The same sketches of full size in both spaces, in float64."""
    _, n, row, col = stack.shape
    rng = np.random.default_rng(seed)
    omegas = rng.standard_normal((steps, n, min(row, col), rank))
    found = []
    for space in ("core", "full"):
        solver = SpectralDeTuning(rank, steps, schedule, space, "float64", exact_every=1)
        with linalg.scope(FLOAT64):

            def run(stack, omegas, solver=solver):
                return spectral.solve(stack, solver, draw=lambda step, model: omegas[step, model])

            found.append(jax.tree.map(np.asarray, jax.jit(run)(stack, omegas)))
    return found


@pytest.mark.parametrize(("row", "col"), [pytest.param(48, 40, marks=pytest.mark.slow), (12, 50)])
def test_iterates_are_equal_on_exactly_low_rank_models(row, col):
    stack = np.stack([exact_stack(4, row, col, 3, seed) for seed in (1, 2)])
    inner, full = both_spaces(stack, 3, 60, RankSchedule(patience=2))
    np.testing.assert_array_equal(inner.rank_history, full.rank_history)
    assert len(np.unique(full.rank_history)) == 3
    np.testing.assert_allclose(inner.loss, full.loss, rtol=1e-6)
    # Rounding at 1e-16 of weights of size 1, through 60 steps of five factorizations each.
    np.testing.assert_allclose(inner.base, full.base, atol=1e-11)
    for one, other in zip(
        inner.left @ np.swapaxes(inner.right, -1, -2),
        full.left @ np.swapaxes(full.right, -1, -2),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=1e-11)


def test_iterates_are_equal_to_noise_on_stored_models():
    merged = synth.family(5, 96, 80, 4).merged
    inner, full = both_spaces(merged[None], 4, 150, RankSchedule())
    sigma = reference.sigma(merged)
    early = slice(0, 60)
    np.testing.assert_allclose(inner.loss[:, early], full.loss[:, early], rtol=1e-5)
    np.testing.assert_array_equal(inner.rank_history[:, early], full.rank_history[:, early])
    assert np.sqrt(np.mean((inner.base - full.base) ** 2)) < 0.2 * sigma
    # A residual that is all rounding error: the iteration can fit less of it in the core.
    np.testing.assert_allclose(inner.residual_ratio, full.residual_ratio, rtol=0.1)
