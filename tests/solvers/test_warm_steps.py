"""Warm subspace steps of Spectral DeTuning against NumPy's SVD and against the published path."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import linalg, synth
from jdetune.rank_schedule import RankSchedule
from jdetune.solvers import alternation, spectral, truncation
from jdetune.solvers.spectral import SpectralDeTuning
from tests import reference

FLOAT64 = jnp.dtype("float64")
WARM = SpectralDeTuning(3, 200, RankSchedule(patience=4), "core", "float64", exact_every=10)
PUBLISHED = dataclasses.replace(WARM, exact_every=1)


def solve(solver, stack):
    with linalg.scope(solver.dtype):
        run = jax.jit(functools.partial(spectral.solve, solver=solver))
        return jax.tree.map(np.asarray, run(stack))


def program(solver, stack):
    with linalg.scope(solver.dtype):
        return str(jax.make_jaxpr(functools.partial(spectral.solve, solver=solver))(stack))


@functools.cache
def family(seed):
    return synth.family(4, 40, 32, 3, seed=seed)


@functools.cache
def stacked():
    return np.stack([family(seed).merged for seed in range(3)])


@functools.cache
def solved(solver):
    return solve(solver, stacked())


def graded(rng, row, col, rank, tail):
    """Singular values from 1 to 1e-3, then a flat ``tail``; and the truncated SVD of it."""
    u = np.linalg.qr(rng.standard_normal((row, min(row, col))))[0]
    v = np.linalg.qr(rng.standard_normal((col, min(row, col))))[0]
    values = np.full(min(row, col), tail)
    values[:rank] = np.logspace(0, -3, rank)
    return (u * values) @ v.T


def truncated(matrix, rank):
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ vt[:rank], vt[:rank].T, u[:, :rank]


@pytest.mark.parametrize("orthonormalize", [linalg._qr_leading, linalg._whiten_leading])
@pytest.mark.parametrize(("row", "col", "transposed"), [(30, 24, False), (24, 30, True)])
def test_a_warm_truncation_is_the_truncated_svd(row, col, transposed, orthonormalize, monkeypatch):
    """From a matrix nearby; off by twice the angle of the start times the next singular value."""
    monkeypatch.setattr(linalg, "orthonormalize_leading", orthonormalize)  # CPUs, then GPUs
    rank, tail = 5, 1e-5
    rng = np.random.default_rng(0)
    matrix = graded(rng, row, col, rank, tail)
    before = matrix + 1e-6 * rng.standard_normal(matrix.shape)
    exact, right, left = truncated(matrix, rank)
    nearby, near_right, near_left = truncated(before, rank)
    basis, near = (left, near_left) if transposed else (right, near_right)
    angle = np.linalg.norm(near - basis @ (basis.T @ near), 2)
    start = before @ near_right if transposed else before.T @ near_left
    padded = np.pad(start, ((0, 0), (0, 2)))
    with linalg.scope(FLOAT64):
        active = jnp.arange(rank + 2) < rank
        found = truncation.refine(jnp.asarray(matrix), jnp.asarray(padded), active, transposed)
    found_left, found_right = (np.asarray(side) for side in found)
    error = np.linalg.norm(found_left @ found_right.T - exact, 2)
    assert error < 2.1 * angle * tail + 1e-14
    assert error < 1e-2 * np.linalg.norm(nearby - exact, 2)
    np.testing.assert_array_equal(found_left[:, rank:], 0)
    np.testing.assert_array_equal(found_right[:, rank:], 0)


def test_a_warm_truncation_in_float32():
    rng = np.random.default_rng(1)
    matrix = graded(rng, 30, 24, 5, 1e-5).astype(np.float32)
    exact, right, _ = truncated(matrix.astype(np.float64), 5)
    start = (right * np.logspace(0, -3, 5)).astype(np.float32)
    found = truncation.refine(jnp.asarray(matrix), jnp.asarray(start), jnp.ones(5, bool), False)
    left, right = (np.asarray(side) for side in found)
    # A few roundings of numbers below 1, at 6e-8 each.
    np.testing.assert_allclose(left @ right.T, exact, atol=3e-7)


def test_a_direction_orthogonal_to_the_start_is_for_a_new_sketch():
    with linalg.scope(FLOAT64):
        matrix = jnp.diag(jnp.asarray([1.0, 2.0, 3.0]))
        start = jnp.eye(3, 1)
        left, right = truncation.refine(matrix, start, jnp.ones(1, bool), False)
        np.testing.assert_allclose(np.asarray(left) @ np.asarray(right).T, np.diag([1.0, 0, 0]))
        sketch = jnp.ones((3, 1))
        left, right = truncation.truncate(matrix, sketch, jnp.ones(1, bool), False)
        assert np.linalg.norm(np.asarray(left) @ np.asarray(right).T, 2) > 2.9


def test_full_space_is_as_published_whatever_exact_every_is():
    full = dataclasses.replace(WARM, space="full")
    once = dataclasses.replace(full, exact_every=1)
    assert program(full, stacked()) == program(once, stacked())


def test_exact_every_one_has_no_warm_step(monkeypatch):
    """Not even in the program: nothing of it is traced."""

    def refuse(*operands):
        raise AssertionError("a warm step")

    monkeypatch.setattr(truncation, "refine", refuse)
    program(PUBLISHED, stacked())
    program(dataclasses.replace(WARM, space="full"), stacked())
    with pytest.raises(AssertionError, match="a warm step"):
        program(WARM, stacked())


def test_until_a_layer_has_settled_its_path_is_the_published_one():
    warm, published = solved(WARM), solved(PUBLISHED)
    np.testing.assert_array_equal(warm.rank_history, published.rank_history)
    for layer, ranks in enumerate(published.rank_history):
        first = int(np.argmax(ranks == 3)) + alternation.SETTLING_STEPS
        assert first < WARM.steps - 20
        before = slice(0, first)
        np.testing.assert_allclose(warm.loss[layer, before], published.loss[layer, before], 1e-6)


def test_warm_steps_are_made_and_then_a_new_sketch(monkeypatch):
    """With a warm step that keeps its start, the loss stands still between new sketches."""
    monkeypatch.setattr(alternation, "SETTLING_STEPS", 0)
    schedule = RankSchedule(start_rank=3)
    solver = SpectralDeTuning(3, 24, schedule, "core", "float64", exact_every=10)
    calls = []
    original = truncation.refine
    monkeypatch.setattr(truncation, "refine", lambda *a: calls.append(a) or zero(original(*a)))

    def zero(factors):
        return tuple(jnp.zeros_like(side) for side in factors)

    loss = solve(solver, stacked()[:1]).loss[0]
    large = loss > 0.9 * loss.max()  # no update is left in these steps
    assert len(calls) > 0
    np.testing.assert_array_equal(np.flatnonzero(~large), [0, 10, 20, 23])


def test_a_layer_is_the_same_beside_layers_that_settle_later():
    """Float64 rounding of products of other shapes, over 200 steps."""
    slow = synth.family(4, 40, 32, 3, seed=9, update_rms=1e-2, decay=6.0).merged
    alone = solved(WARM)
    beside = solve(WARM, np.stack([stacked()[0], slow, stacked()[2]]))
    for layer in (0, 2):
        np.testing.assert_allclose(beside.base[layer], alone.base[layer], atol=1e-13)


def test_warm_steps_end_where_the_published_ones_end():
    """The same error of the base, to a percent of the rounding error of the models."""
    warm, published = solved(WARM), solved(PUBLISHED)
    np.testing.assert_allclose(warm.loss[:, -1], published.loss[:, -1], rtol=1e-5)
    for layer in range(len(stacked())):
        base = family(layer).base.astype(np.float64)
        sigma = reference.sigma(family(layer).merged)
        errors = [np.sqrt(np.mean((run.base[layer] - base) ** 2)) for run in (warm, published)]
        assert errors[0] < 0.8 * sigma
        assert abs(errors[0] - errors[1]) < 0.01 * sigma
        # As factors: what a warm run returns is a truncation from a new sketch.
        np.testing.assert_allclose(
            warm.left[layer] @ np.swapaxes(warm.right[layer], -1, -2),
            published.left[layer] @ np.swapaxes(published.right[layer], -1, -2),
            atol=0.1 * sigma,
        )
