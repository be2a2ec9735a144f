"""Runs the paper's solver on same-shaped layers, and where ranks are too large for triples."""

import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from jdetune import linalg, programs
from jdetune.groups import LayerResult, chunks, failed, finish
from jdetune.noise import Merged, as_merged
from jdetune.solvers.intersection import SubspaceIntersection
from jdetune.solvers.spectral import SpectralDeTuning
from jdetune.status import Status
from jdetune.types import STORAGE_DTYPES

#: An iteration has converged if its residual is below this many times the rounding error.
CONVERGED_RATIO = {"float64": 2.0, "float32": 4.0}
#: Iterations where the ranks of three models do not fit the shape.
LARGE_STEPS = 5000
#: Amplification from which a base counts as not identifiable.
UNIDENTIFIABLE = 1e4
#: Merged weights that the iterative solver works on at a time, in bytes of float32.
ITERATED_BYTES = 2**29
#: Conditioning that is assumed of what the iterative solver has found, which has no closed form.
ITERATED_CONDITIONING = 1e-2


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
    for chunk in chunks(len(layers), size):
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


def solve_large(
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
        beginning = {name: start[name].astype(dtype) for name in ("left", "right")} | {
            "ranks": jnp.asarray(ranks[None], jnp.int32),
            "scales": programs.scales_of(weights),
            "conditioning": jnp.full(1, ITERATED_CONDITIONING, dtype),
            "rank_gap": jnp.full(1, jnp.inf, dtype),
        }
        arrays = programs.polish(weights, beginning, solver, finest, len(set(storage)) > 1)
        found = {name: np.asarray(value[0]) for name, value in arrays.items()}
    if not found["amplification"] < UNIDENTIFIABLE:
        return failed(stack, Status.RANK_TOO_LARGE)
    checks = {"ranks": np.asarray(ranks, np.int32), "agree": True, "shared": False}
    return finish(stack, {**found, **checks, "tail_ratio": 1.0}, dtype, solver)
