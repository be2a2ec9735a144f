"""Runs the closed form on a group of same-shaped layers: host loops around the programs."""

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jdetune import linalg, machine, programs
from jdetune.folded import guess_pair_rank
from jdetune.groups import LayerResult, chunks, failed, finish
from jdetune.iterated import solve_large
from jdetune.noise import Merged, as_merged
from jdetune.ranks import plan_pairs
from jdetune.sharding import layer_mesh, put
from jdetune.solvers import rowspace
from jdetune.solvers.intersection import SubspaceIntersection
from jdetune.stack import storage_dtypes
from jdetune.staging import Staging
from jdetune.status import Status
from jdetune.types import STORAGE_DTYPES

#: First sketch width; it doubles while a pair's rank comes within ``HEADROOM`` of it.
FIRST_WIDTH = 48
HEADROOM = 8
#: The rank axis comes in steps of this, so that few programs are compiled.
RANK_STEP = 4
#: Layers from which the first is solved before the others; fixed, as results must not depend on
#: the number of threads.
FEW = 8


class _Group(NamedTuple):
    """What all layers of a group share."""

    solver: SubspaceIntersection
    names: tuple[str, ...]
    dtype: jnp.dtype
    smaller: int
    batch_size: int
    mesh: Mesh | None

    @property
    def finest(self) -> str:
        """The finest grid that a model was rounded to."""
        return min(self.names, key=STORAGE_DTYPES.index)


class _Widths(NamedTuple):
    """Sizes that were enough so far: rank axis of the short way (0: not taken), sketch width."""

    short: int
    width: int


def intersect_group(
    layers: Sequence[np.ndarray | Array],
    solver: SubspaceIntersection,
    storage: Sequence[str] | None = None,
    max_memory: int | None = None,
) -> Iterator[LayerResult]:
    """Closed form for finite same-shaped layers of three models or more, in order.

    On CPU a layer at a time on every core; on GPUs and TPUs, or several host devices, many layers
    at a time, a share on each device.

    Args:
      layers: [model, row, col] each, one shape and dtype.
      solver: hyperparameters.
      storage: dtype that each model was rounded to; found from the first layer if None.
      max_memory: bytes that may be in use at a time; a share of what is free if None.

    Yields:
      One result a layer.
    """
    dtype = linalg.resolve_dtype(solver.precision)
    n_models, *shape = layers[0].shape
    names = tuple(storage or storage_dtypes(layers[0]))
    sizes = machine.plan(layers[0].shape, len(layers), solver.polish, max_memory)
    mesh = layer_mesh(sizes.devices)
    group = _Group(solver, names, dtype, min(shape), sizes.batch_size, mesh)
    widths = _Widths(_first_rank(layers[0], group), min(FIRST_WIDTH, min(shape)))
    some = list(chunks(len(layers), sizes.layers))
    solve = functools.partial(_solve_chunk, group, Staging())
    if len(some) >= FEW:  # the first tells the others the sizes
        results, widths = solve([layers[index] for index in some[0]], widths)
        yield from results[: len(set(some.pop(0)))]
    with ThreadPoolExecutor(sizes.threads) as pool:
        waiting: deque = deque()
        for chunk in some:
            stacks = [layers[index] for index in chunk]
            waiting.append((len(set(chunk)), pool.submit(solve, stacks, widths)))
            if len(waiting) > sizes.threads:
                count, done = waiting.popleft()
                yield from done.result()[0][:count]
        for count, done in waiting:
            yield from done.result()[0][:count]


def _solve_chunk(
    group: _Group, staging: Staging, stacks: Sequence[np.ndarray | Array], widths: _Widths
) -> tuple[list[LayerResult], _Widths]:
    """Results of layers that are worked on together, and the sizes that were enough."""
    if group.mesh is None and jax.default_backend() == "cpu" and isinstance(stacks[0], np.ndarray):
        stack = staging.fill([np.asarray(one) for one in stacks])
    elif len(stacks) == 1:
        stack = stacks[0][None]
    else:
        stack = (np if isinstance(stacks[0], np.ndarray) else jnp).stack(stacks)
    grids = as_merged(stack[0], group.names)
    size = len(stacks)
    weights = put(Merged(stack, *(np.tile(part, (size, 1)) for part in grids[1:])), group.mesh)
    with linalg.scope(group.dtype):
        if widths.short:
            found, clear, short = _short_way(weights, widths.short, group)
            if clear:
                solved = _to_host(found, weights, group)
                return [
                    finish(layer, one, group.dtype, group.solver)
                    for layer, one in zip(stacks, solved, strict=True)
                ], widths._replace(short=short)
            widths = widths._replace(short=0)
        return _long_way(stacks, weights, widths, group)


def _first_rank(stack: np.ndarray | Array, group: _Group) -> int:
    """Rank axis that the short way starts with; 0 if it is not to be taken."""
    if group.dtype != jnp.float64 or group.solver.precision != "auto":
        return 0
    if isinstance(group.solver.rank, int):
        return 0
    pair = guess_pair_rank(np.asarray(stack[0]), np.asarray(stack[1]))
    return _rank_step((pair + 1) // 2, group) if pair else 0


def _rank_step(rank: int, group: _Group) -> int:
    """The rank axis that holds a rank; 0 where the sketch would not fit the shape."""
    axis = max(-(-rank // RANK_STEP) * RANK_STEP, RANK_STEP)
    return axis if 2 * axis + rowspace.OVERSAMPLING <= group.smaller else 0


def _short_way(weights: Merged, rank: int, group: _Group) -> tuple[dict[str, Any], bool, int]:
    """Row spaces and least squares, with a larger rank axis where the first was too small."""
    while True:
        finest = None if group.solver.polish else group.finest
        found = programs.row_spaces(weights, rank, group.batch_size, group.mesh, finest)
        if bool(jnp.all(found["clear"])):
            return found, True, rank
        pairs, ranks = int(jnp.max(found["pair_ranks"])), int(jnp.max(found["ranks"]))
        full = pairs >= 2 * rank + rowspace.OVERSAMPLING
        needed = 2 * rank if full else max((pairs + 1) // 2, ranks)
        larger = _rank_step(needed, group)
        if larger <= rank:
            return found, False, rank
        rank = larger


def _to_host(found: dict[str, Any], weights: Merged, group: _Group) -> list[dict[str, Any]]:
    """The closed form, polished or as it is, one layer after another on the host."""
    if group.solver.polish:
        start = {name: found[name] for name in programs.START}
        mixed = len(set(group.names)) > 1
        ready = programs.polish(weights, start, group.solver, group.finest, mixed, group.mesh)
    elif found["left"].dtype == jnp.float32:  # ready as they are
        ready = {name: found[name] for name in ("base", "left", "right")}
    else:
        start = {name: found[name] for name in ("base", "left", "right", "ranks")}
        ready = programs.unpolished(start, group.finest, group.mesh)
    figures = {name: found[name] for name in (*programs.CLOSED_FORM, "agree", "shared")}
    arrays = {name: np.asarray(value) for name, value in (figures | ready).items()}
    count = len(arrays["ranks"])
    return [{name: value[k] for name, value in arrays.items()} for k in range(count)]


def _long_way(
    stacks: Sequence[np.ndarray | Array], weights: Merged, widths: _Widths, group: _Group
) -> tuple[list[LayerResult], _Widths]:
    """Subspace intersection, which sees directions down to the rounding."""
    solver, smaller, width = group.solver, group.smaller, widths.width
    known = solver.rank if isinstance(solver.rank, int) else None
    plan = plan_pairs(stacks[0].shape[0])
    while True:
        factors, scales = programs.factor(weights, width, group.dtype, group.batch_size, group.mesh)
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
    solved = []
    if any(fits):
        max_rank = _rank_axis(triples[fits], width)
        found = programs.intersect(weights, factors, scales, max_rank, known, group.mesh)
        solved = _to_host(found, weights, group)
    results = []
    for position, (layer, verdict) in enumerate(zip(stacks, verdicts, strict=True)):
        if verdict is Status.OK:
            results.append(finish(layer, solved[position], group.dtype, solver))
        elif verdict is Status.RANK_TOO_LARGE and solver.polish:
            first, second, other = np.moveaxis(triples[position, :, 0], -1, 0)
            ranks = (first + second - other) // 2
            results.append(solve_large(layer, ranks, solver, group.names))
        else:
            results.append(failed(layer, verdict))
    return results, widths._replace(width=width if all(fits) else widths.width)


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
