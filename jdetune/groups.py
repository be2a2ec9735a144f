"""Solves a group of same-shaped layers: host loops around the compiled solvers."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jdetune import certificate, exact, linalg
from jdetune.factors import balanced_factors
from jdetune.noise import Merged, as_merged
from jdetune.ranks import plan_pairs
from jdetune.solvers import intersection, likelihood, spectral
from jdetune.solvers.intersection import PairFactors, Scales, SubspaceIntersection
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
NO_BETTER = 0.9
#: Figures of a solution that become its ``stats``.
CLOSED_FORM = (
    "residual_ratio",
    "tail_ratio",
    "rank_gap",
    "shared_margin",
    "conditioning",
    "detection_floor",
    "ranks",
)
CERTIFIED = (
    "iterations",
    "amplification",
    "expected_error",
    "mean_error",
    "exact_fraction",
    "ambiguous_fraction",
    "rounds",
    "slack",
)
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


@functools.partial(jax.jit, static_argnames=("width", "dtype", "batch_size"))
def _factor(
    weights: Merged, width: int, dtype: jnp.dtype, batch_size: int
) -> tuple[PairFactors, Scales]:
    run = functools.partial(
        intersection.factor_pairs, width=width, dtype=dtype, batch_size=batch_size
    )
    return jax.vmap(run)(weights)


@functools.partial(jax.jit, static_argnames=("max_rank", "solver", "finest", "mixed"))
def _intersect(
    weights: Merged,
    factors: PairFactors,
    scales: Scales,
    max_rank: int,
    solver: SubspaceIntersection,
    finest: str,
    mixed: bool,
) -> dict[str, Array]:
    def one(weights: Merged, factors: PairFactors, scales: Scales) -> dict[str, Array]:
        found = intersection.intersect(weights, factors, scales, max_rank, solver.rank)
        left, right = linalg.matmul(found.left, found.core), jnp.swapaxes(found.right, 1, 2)
        fields = {name: getattr(found, name) for name in (*CLOSED_FORM, "agree", "shared")}
        if not solver.polish:
            base = found.base.astype(finest)
            return {**fields, "base": base, **_balanced(left, right, found.ranks)}
        rule = solver.rounding
        likely, base, variance, ratio = likelihood.most_likely(
            weights,
            left,
            right,
            found.ranks,
            scales,
            rounding=rule,
            conditioning=found.conditioning,
        )
        if solver.base_dtype == "auto":
            amplification = None
            if mixed or finest != "float32":
                active = jnp.arange(max_rank, dtype=jnp.int32) < found.ranks[:, None]
                nothing = jnp.zeros(base.shape, bool)
                amplification = certificate.spread(
                    weights,
                    likely.left,
                    likely.right,
                    active,
                    scales,
                    nothing,
                    rule,
                    found.conditioning,
                ).amplification.astype(base.dtype)
            grid = exact.find_grid(base, variance, finest, amplification, ratio)
        else:
            grid = jnp.int32(STORAGE_DTYPES.index(solver.base_dtype))
        grids = [exact.grid(name) for name in STORAGE_DTYPES]
        on = jax.tree.map(lambda *parts: jnp.stack(parts)[grid], *grids)
        final = exact.resolve(
            weights,
            likely.left,
            likely.right,
            found.ranks,
            scales,
            on,
            ratio,
            rule,
            found.conditioning,
        )
        snapped = final.snapped
        certain = snapped.wrong < exact.certain_below(final.amplification)
        return {
            **fields,
            **_balanced(final.left, final.right, found.ranks),
            "base": snapped.base.astype(jnp.float32),
            "grid": grid,
            "certain": certain,
            "residual_ratio": ratio,
            "iterations": likely.steps + final.steps,
            "rounds": likely.rounds + final.rounds,
            "amplification": final.amplification,
            "slack": jnp.max(final.slack),
            "expected_error": jnp.mean(snapped.error),
            "mean_error": snapped.mean_error,
            "exact_fraction": 1 - jnp.mean(snapped.wrong, dtype=base.dtype),
            "ambiguous_fraction": 1 - jnp.mean(certain, dtype=base.dtype),
        }

    return jax.vmap(one)(weights, factors, scales)


def _balanced(left: Array, right: Array, ranks: Array) -> dict[str, Array]:
    """Factors in the form that ``Adapters`` promises, float32."""
    eye = jnp.eye(left.shape[2], dtype=left.dtype)
    eye = jnp.broadcast_to(eye, (left.shape[0], *eye.shape))
    b, a = balanced_factors(left, eye, jnp.swapaxes(right, 1, 2), ranks)
    return {"left": b.astype(jnp.float32), "right": a.astype(jnp.float32)}


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
                factors, scales = _factor(weights, width, dtype, batch_size)
                pair_ranks = np.asarray(factors.ranks)
                needed = pair_ranks.max() if solver.rank is None else 2 * solver.rank
                if width == smaller or needed + HEADROOM <= width:
                    break
                width = min(2 * width, smaller)
            if solver.rank is not None:
                pair_ranks = np.full_like(pair_ranks, 2 * solver.rank)
            triples = pair_ranks[:, plan.triples]
            verdicts = [_feasible(ranks, smaller) for ranks in triples]
            fits = [verdict is Status.OK for verdict in verdicts]
            solved = {}
            if any(fits):
                max_rank = _rank_axis(triples[fits], width)
                found = _intersect(
                    weights, factors, scales, max_rank, solver, finest, len(set(names)) > 1
                )
                solved = {name: np.asarray(value) for name, value in found.items()}
        if not all(fits):
            width = start
        for position, index in enumerate(chunk[: len(set(chunk))]):
            if verdicts[position] is not Status.OK:
                yield failed(layers[index], verdicts[position])
            else:
                one = {name: value[position] for name, value in solved.items()}
                yield _finish(layers[index], one, dtype, solver.polish)


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


@functools.partial(jax.jit, static_argnames=("solver",))
def _iterate(
    weights: Float[Array, "layer model row col"], solver: SpectralDeTuning
) -> dict[str, Array]:
    found = spectral.solve(weights, solver)
    left, right = jax.vmap(balanced_factors)(found.left, found.core, found.right, found.ranks)
    return {
        "base": found.base.astype(weights.dtype),
        "left": left.astype(jnp.float32),
        "right": right.astype(jnp.float32),
        "ranks": found.ranks,
        "residual_ratio": found.residual_ratio.astype(jnp.float32),
        "loss": found.loss,
        "rank_history": found.rank_history,
    }


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
            arrays = _iterate(weights, solver)
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
    stack: np.ndarray | Array, found: Mapping[str, Any], dtype: jnp.dtype, polish: bool
) -> LayerResult:
    names = [*CLOSED_FORM, *(CERTIFIED if polish else ())]
    stats: dict[str, float | np.ndarray] = {
        name: float(found[name]) for name in names if name != "ranks"
    }
    if not float(found["tail_ratio"]) < TAIL_LIMIT[str(dtype)]:
        return failed(stack, Status.NOT_LOW_RANK)._replace(stats=stats)
    limit = RESIDUAL_LIMIT[str(dtype)] if polish else UNREFINED_RESIDUAL_LIMIT
    explained = float(found["residual_ratio"]) < limit
    if not found["agree"] or found["shared"] or not explained:
        return failed(stack, Status.SHARED_DIRECTIONS)._replace(stats=stats)
    status = Status.OK
    if not polish:
        if not found["ranks"].any() and bool((stack != stack[:1]).any()):
            status = Status.NOISE_DOMINATED
    elif stats["expected_error"] > NO_BETTER * stats["mean_error"] > 0:
        status = Status.NOISE_DOMINATED
    rank = max(int(found["ranks"].max()), 1)
    return LayerResult(
        base=found["base"].astype(STORAGE_DTYPES[found["grid"]]) if polish else found["base"],
        left=found["left"][:, :, :rank],
        right=found["right"][:, :rank],
        ranks=found["ranks"],
        status=status,
        stats=stats,
        certain=found.get("certain"),
    )
