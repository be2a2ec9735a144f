"""Solves a group of same-shaped layers: host loops around the compiled solvers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdetune import linalg, programs
from jdetune.noise import Merged, as_merged
from jdetune.ranks import plan_pairs
from jdetune.solvers.intersection import SubspaceIntersection
from jdetune.solvers.spectral import SpectralDeTuning
from jdetune.stack import storage_dtypes
from jdetune.status import Status
from jdetune.types import STORAGE_DTYPES

#: First sketch width; it doubles while a pair's rank comes within ``HEADROOM`` of it.
FIRST_WIDTH = 48
HEADROOM = 8
#: Layers that a GPU or TPU works on at a time.
ACCELERATOR_LAYERS = 8
#: What low rank leaves over is not rounding if it is above this many times the rounding error.
TAIL_LIMIT = {"float64": 2.0, "float32": 10.0}
#: Updates that do not explain the models within this many times the rounding error are not the
#: updates: the closed form fails so where directions are nearly shared, and refinement with it.
RESIDUAL_LIMIT = {"float64": 2.0, "float32": 10.0}
UNREFINED_RESIDUAL_LIMIT = 30.0
#: An iteration has converged if its residual is below this many times the rounding error.
CONVERGED_RATIO = {"float64": 2.0, "float32": 4.0}
#: A predicted error above this share of the mean of the models' says that solving did not help.
NO_BETTER = 0.8
#: A base whose largest element is this many times the models' is none.
LARGER = 10.0
#: Iterations where the ranks of three models do not fit the shape.
LARGE_STEPS = 5000
#: Amplification from which a base counts as not identifiable.
UNIDENTIFIABLE = 1e4
#: Merged weights that the iterative solver works on at a time, in bytes of float32.
ITERATED_BYTES = 2**29


class LayerResult(NamedTuple):
    """One layer on the host; the rank axis of its factors is the layer's largest rank."""

    base: np.ndarray
    left: np.ndarray
    right: np.ndarray
    ranks: np.ndarray
    status: Status
    stats: dict[str, float | np.ndarray]
    certain: np.ndarray | None = None


def failed(stack: np.ndarray | Array, status: Status) -> LayerResult:
    """A layer without a base: NaN, rank 0, and the status that says why."""
    n_models, row, col = stack.shape
    return LayerResult(
        base=np.full((row, col), np.nan, stack.dtype),
        left=np.zeros((n_models, row, 1), np.float32),
        right=np.zeros((n_models, 1, col), np.float32),
        ranks=np.zeros(n_models, np.int32),
        status=status,
        stats={},
    )


def _chunks(count: int, size: int) -> Iterator[list[int]]:
    """Index lists of one fixed size, so that one program serves all; the last is filled up."""
    for start in range(0, count, size):
        chunk = list(range(start, min(start + size, count)))
        yield chunk + [chunk[-1]] * (size - len(chunk))


def intersect_group(
    layers: Sequence[np.ndarray | Array],
    solver: SubspaceIntersection,
    storage: Sequence[str] | None = None,
) -> Iterator[LayerResult]:
    """Closed form for finite same-shaped layers of three models or more, in order.

    Args:
      layers: [model, row, col] each, one shape and dtype.
      solver: hyperparameters.
      storage: dtype that each model was rounded to; found from the first layer if None.

    Yields:
      One result a layer.
    """
    dtype = linalg.resolve_dtype(solver.precision)
    n_models = layers[0].shape[0]
    names = list(storage or storage_dtypes(layers[0]))
    finest = min(names, key=STORAGE_DTYPES.index)
    known = solver.rank if isinstance(solver.rank, int) else None
    plan = plan_pairs(n_models)
    on_cpu = jax.default_backend() == "cpu"
    size = 1 if on_cpu else min(ACCELERATOR_LAYERS, len(layers))
    batch_size = 1 if on_cpu else len(plan.first)
    smaller = min(layers[0].shape[1:])
    width = min(FIRST_WIDTH, smaller)
    for chunk in _chunks(len(layers), size):
        stack = jnp.stack([jnp.asarray(layers[index]) for index in chunk])
        grids = as_merged(stack[0], names)
        weights = Merged(stack, *(np.tile(part, (size, 1)) for part in grids[1:]))
        start = width
        with linalg.scope(dtype):
            while True:
                factors, scales = programs.factor(weights, width, dtype, batch_size)
                pair_ranks = np.asarray(factors.ranks)
                needed = pair_ranks.max() if known is None else 2 * known
                if width == smaller or needed + HEADROOM <= width:
                    break
                width = min(2 * width, smaller)
            if known is not None:
                pair_ranks = np.full_like(pair_ranks, 2 * known)
            triples = pair_ranks[:, plan.triples]
            verdicts = [_feasible(ranks, smaller) for ranks in triples]
            fits = [verdict is Status.OK for verdict in verdicts]
            solved = {}
            if any(fits):
                max_rank = _rank_axis(triples[fits], width)
                found = programs.intersect(
                    weights, factors, scales, max_rank, solver, finest, len(set(names)) > 1
                )
                solved = {name: np.asarray(value) for name, value in found.items()}
        if not all(fits):
            width = start
        for position, index in enumerate(chunk[: len(set(chunk))]):
            if verdicts[position] is Status.OK:
                one = {name: value[position] for name, value in solved.items()}
                yield _finish(layers[index], one, dtype, solver)
            elif verdicts[position] is Status.RANK_TOO_LARGE and solver.polish:
                first, second, other = np.moveaxis(triples[position, :, 0], -1, 0)
                ranks = (first + second - other) // 2
                yield _solve_large(layers[index], ranks, solver, names)
            else:
                yield failed(layers[index], verdicts[position])


def _rank_axis(triples: np.ndarray, width: int) -> int:
    """Static size of the rank axis: the largest rank of any triple, in steps of 8."""
    twice = triples[..., 0] + triples[..., 1] - triples[..., 2]
    largest = int(np.max(twice + 1, initial=2) // 2)
    return max(min(-(-largest // 8) * 8, width), 1)


def _feasible(triples: np.ndarray, smaller: int) -> Status:
    """Whether the ranks of a layer's differences fit the shape at all."""
    if triples.max() >= smaller:
        return Status.NOT_LOW_RANK
    if triples.sum(axis=-1).max() > 2 * smaller:
        return Status.RANK_TOO_LARGE
    return Status.OK


def _identifiable(rank: int, shape: tuple[int, ...]) -> bool:
    """Whether one rank leaves the base determined, by counting; three models need three ranks."""
    n_models, row, col = shape
    smaller = min(row, col)
    fits = 3 * rank <= smaller if n_models == 3 else 2 * rank <= smaller
    return fits and n_models * (row - rank) * (col - rank) >= row * col


def iterate_group(
    layers: Sequence[np.ndarray | Array], solver: SpectralDeTuning
) -> Iterator[LayerResult]:
    """The paper's solver for finite same-shaped layers, in order, as many at a time as fit.

    Args:
      layers: [model, row, col] each, one shape and dtype.
      solver: hyperparameters.

    Yields:
      One result a layer; NOT_CONVERGED where the residual stayed above the rounding error.
    """
    if not _identifiable(solver.rank, layers[0].shape):
        yield from (failed(layer, Status.RANK_TOO_LARGE) for layer in layers)
        return
    size = max(1, min(len(layers), ITERATED_BYTES // (4 * math.prod(layers[0].shape))))
    for chunk in _chunks(len(layers), size):
        weights = jnp.stack([jnp.asarray(layers[index]) for index in chunk])
        with linalg.scope(solver.dtype):
            arrays = programs.iterate(weights, solver)
            found = {name: np.asarray(value) for name, value in arrays.items()}
        for position in range(len(set(chunk))):
            ratio = float(found["residual_ratio"][position])
            yield LayerResult(
                base=found["base"][position],
                left=found["left"][position],
                right=found["right"][position],
                ranks=found["ranks"][position],
                status=Status.OK
                if ratio < CONVERGED_RATIO[str(solver.dtype)]
                else Status.NOT_CONVERGED,
                stats={
                    "residual_ratio": ratio,
                    "loss": found["loss"][position],
                    "rank_history": found["rank_history"][position],
                },
            )


def _finish(
    stack: np.ndarray | Array,
    found: Mapping[str, Any],
    dtype: jnp.dtype,
    solver: SubspaceIntersection,
) -> LayerResult:
    names = [*programs.CLOSED_FORM, *(programs.CERTIFIED if solver.polish else ())]
    stats: dict[str, float | np.ndarray] = {
        name: float(found[name]) for name in names if name in found and name != "ranks"
    }
    if not float(found["tail_ratio"]) < TAIL_LIMIT[str(dtype)]:
        return failed(stack, Status.NOT_LOW_RANK)._replace(stats=stats)
    limit = RESIDUAL_LIMIT[str(dtype)] if solver.polish else UNREFINED_RESIDUAL_LIMIT
    explained = float(found["residual_ratio"]) < limit and _is_sane(found["base"], stack)
    if solver.polish:
        explained = explained and float(found["final_ratio"]) < 2 * limit
    if not explained and isinstance(solver.rank, int):
        return failed(stack, Status.NOT_LOW_RANK)._replace(stats=stats)
    if not found["agree"] or found["shared"] or not explained:
        return failed(stack, Status.SHARED_DIRECTIONS)._replace(stats=stats)
    status = Status.OK
    if not solver.polish:
        if not found["ranks"].any() and bool((stack != stack[:1]).any()):
            status = Status.NOISE_DOMINATED
    elif stats["expected_error"] > NO_BETTER * stats["mean_error"] > 0:
        status = Status.NOISE_DOMINATED
    base = found["base"]
    ranks, left, right = found["ranks"], found["left"], found["right"]
    if isinstance(solver.rank, float):
        ranks, left, right = _keep_energy(left, right, solver.rank)
    rank = max(int(ranks.max()), 1)
    return LayerResult(
        base=base.astype(STORAGE_DTYPES[found["grid"]]) if solver.polish else base,
        left=left[:, :, :rank],
        right=right[:, :rank],
        ranks=ranks,
        status=status,
        stats=stats,
        certain=found.get("certain"),
    )


def _is_sane(base: np.ndarray, stack: np.ndarray | Array) -> bool:
    """Whether the base is of the size of the models, not one that huge updates cancel."""
    largest = float(np.max(np.abs(np.asarray(stack, np.float32))))
    return bool(np.max(np.abs(base.astype(np.float32))) <= LARGER * largest)


def _keep_energy(
    left: np.ndarray, right: np.ndarray, share: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Balanced factors cut to the fewest columns that hold a share of each update's energy."""
    values = np.sum(np.square(left, dtype=np.float64), axis=1)  # singular values, largest first
    energy = np.cumsum(values**2, axis=1)
    below = energy < share * energy[:, -1:]
    ranks = np.where(energy[:, -1] > 0, below.sum(1) + 1, 0).astype(np.int32)
    keep = np.arange(left.shape[2]) < ranks[:, None]
    return ranks, np.where(keep[:, None], left, 0), np.where(keep[:, :, None], right, 0)


def _solve_large(
    stack: np.ndarray | Array,
    ranks: np.ndarray,
    solver: SubspaceIntersection,
    storage: Sequence[str],
) -> LayerResult:
    """Ranks that fit pairs of models but not triples: the iterative solver, then the refinement.

    Only where counting allows it; RANK_TOO_LARGE where it does not, where the iteration stays above
    the rounding error, or where the solution turns out not to be identifiable.
    """
    n_models, row, col = stack.shape
    freedom = sum((row - int(r)) * (col - int(r)) for r in ranks)
    if freedom < row * col or n_models == 3:
        return failed(stack, Status.RANK_TOO_LARGE)
    dtype = linalg.resolve_dtype(solver.precision)
    weights = as_merged(jnp.asarray(stack)[None][0], storage)
    weights = Merged(*(jnp.asarray(part)[None] for part in weights))
    iterative = SpectralDeTuning(
        rank=int(ranks.max()), steps=LARGE_STEPS, space="core", precision=solver.precision
    )
    finest = min(storage, key=STORAGE_DTYPES.index)
    with linalg.scope(dtype):
        start = programs.iterate(weights.values, iterative)
        ratio = float(start["residual_ratio"][0])
        if not ratio < CONVERGED_RATIO[str(dtype)]:
            return failed(stack, Status.RANK_TOO_LARGE)
        factors = (start[name].astype(dtype) for name in ("left", "right"))
        counts = jnp.asarray(ranks[None], jnp.int32)
        arrays = programs.polish(weights, *factors, counts, solver, finest, len(set(storage)) > 1)
        found = {name: np.asarray(value[0]) for name, value in arrays.items()}
    if not found["amplification"] < UNIDENTIFIABLE:
        return failed(stack, Status.RANK_TOO_LARGE)
    checks = {"ranks": np.asarray(ranks, np.int32), "agree": True, "shared": False}
    return _finish(stack, {**found, **checks, "tail_ratio": 1.0}, dtype, solver)
