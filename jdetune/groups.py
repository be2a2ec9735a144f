"""What solving one layer gives, and when it counts as solved."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdetune import programs
from jdetune.factors import keep_energy
from jdetune.solvers.intersection import SubspaceIntersection
from jdetune.status import Status
from jdetune.types import STORAGE_DTYPES

#: What low rank leaves over is not rounding if it is above this many times the rounding error.
TAIL_LIMIT = {"float64": 2.0, "float32": 10.0}
#: Updates that do not explain the models within this many times the rounding error are not the
#: updates: the closed form fails so where directions are nearly shared, and refinement with it.
RESIDUAL_LIMIT = {"float64": 2.0, "float32": 10.0}
UNREFINED_RESIDUAL_LIMIT = 30.0
#: Squared sines of the smallest angles, columns times rows, below which no digit of the directions
#: is left that tells them apart. In float32 they are too inexact to judge by.
LEAST_CONDITIONING = {"float64": 1e-16, "float32": 0.0}
#: A predicted error above this share of the mean of the models' says that solving did not help.
NO_BETTER = 0.8
#: A base whose largest element is this many times the models' is none.
LARGER = 10.0


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


def chunks(count: int, size: int) -> Iterator[list[int]]:
    """Index lists of one fixed size, so that one program serves all; the last is filled up."""
    for start in range(0, count, size):
        chunk = list(range(start, min(start + size, count)))
        yield chunk + [chunk[-1]] * (size - len(chunk))


def finish(
    stack: np.ndarray | Array,
    found: Mapping[str, Any],
    dtype: jnp.dtype,
    solver: SubspaceIntersection,
) -> LayerResult:
    """The result of a layer from what the programs found: its status, and arrays cut to its rank.

    Args:
      stack: merged weights.
      found: what the closed form and, with ``polish``, the refinement gave.
      dtype: of the algebra.
      solver: hyperparameters.
    """
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
    parted = not float(found.get("conditioning", 1.0)) < LEAST_CONDITIONING[str(dtype)]
    if not found["agree"] or found["shared"] or not (explained and parted):
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
        ranks, left, right = keep_energy(left, right, solver.rank)
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
    largest = _largest(base)
    return any(largest <= LARGER * _largest(model) for model in stack)


def _largest(array: np.ndarray | Array) -> float:
    """Largest magnitude, without a copy of the array."""
    return float(max(array.max(), -array.min()))
