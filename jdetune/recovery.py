"""The one verb: base weights and LoRA factors from stacks of merged weights."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np

from jdetune import explain, repair
from jdetune.closed_form import intersect_group
from jdetune.errors import RecoveryFailed
from jdetune.groups import LayerResult, failed
from jdetune.iterated import iterate_group
from jdetune.linalg import resolve_dtype
from jdetune.metrics import LOG_MSE_FLOOR
from jdetune.result import Adapters, Recoveries, Recovery
from jdetune.solvers.intersection import SubspaceIntersection
from jdetune.solvers.spectral import SpectralDeTuning
from jdetune.stack import as_mapping, distinct_models, group_layers, narrowest, same_model
from jdetune.status import Status
from jdetune.types import Array

Solver: TypeAlias = SubspaceIntersection | SpectralDeTuning

#: Called with the number of layers done and the number of all layers.
Progress: TypeAlias = Callable[[int, int], None]


@overload
def recover(
    stack: Array,
    solver: Solver | None = None,
    *,
    throw: bool = False,
    progress: Progress | None = None,
    drop_duplicates: bool = True,
    max_memory: int | None = None,
) -> Recovery: ...


@overload
def recover(
    stack: Mapping[str, Array],
    solver: Solver | None = None,
    *,
    throw: bool = False,
    progress: Progress | None = None,
    drop_duplicates: bool = True,
    max_memory: int | None = None,
) -> Recoveries: ...


def recover(
    stack: Array | Mapping[str, Array],
    solver: Solver | None = None,
    *,
    throw: bool = False,
    progress: Progress | None = None,
    drop_duplicates: bool = True,
    max_memory: int | None = None,
) -> Recovery | Recoveries:
    r"""Recovers the base and every model's update from merged weights.

    Given :math:`W'_i = \mathrm{round}(W + B_i A_i)` for three models or more, finds W, the ranks
    and the factors; nothing else is needed. Whatever all models have in common is part of W.

    Single models that have another base in a layer, or hold NaN there, are left out of it where
    three others remain; a ``RepairWarning`` says so, and ``stats["base_group"]`` is not 0 for them
    (see ``jdetune.repair``).

    Args:
      stack: merged weights as stored (float32, float16 or bfloat16; NumPy or JAX):
        [model, row, col], [layer, model, row, col], or a mapping of names to [model, row, col]
        of any shapes.
      solver: ``SubspaceIntersection()`` by default, or ``SpectralDeTuning(rank=...)``.
      throw: raise if any layer's status is not OK.
      progress: called with (layers done, layers in all).
      drop_duplicates: leave out models that equal an earlier one in every layer handed in. False
        where the caller knows that the models are distinct in layers that are not handed in.
      max_memory: bytes that a device may use at a time, roughly; fewer layers are then worked on
        together. A share of what is free if None.

    Returns:
      A ``Recovery`` (no layer axis for a 3-D stack), or ``Recoveries`` by name for a mapping.
      Arrays are NumPy if the input was, else JAX. A layer that cannot be recovered has a status
      other than 0 and a base of NaN.

    Raises:
      ValueError: shapes, dtypes or types that cannot be a stack.
      RecoveryFailed: with ``throw``, naming the layers, causes and remedies.

    Source: design of this library; the task is that of Horwitz, Kahana and Hoshen,
    "Recovering the Pre-Fine-Tuning Weights of Generative Models", ICML 2024 (arXiv 2402.10208).

    Example:
      >>> from jdetune import synth
      >>> family = synth.family(n_models=3, row=64, col=48, rank=4, seed=0)
      >>> recovery = recover(family.merged)
      >>> recovery.ranks.tolist(), int(recovery.status)
      ([4, 4, 4], 0)
    """
    solver = SubspaceIntersection() if solver is None else solver
    if not isinstance(solver, SubspaceIntersection | SpectralDeTuning):
        raise ValueError(f"solver is a jdetune solver, got {type(solver).__name__}")
    layers = as_mapping(stack)
    n_models = next(iter(layers.values())).shape[0]
    kept = distinct_models(layers) if drop_duplicates else tuple(range(n_models))
    if len(kept) < n_models:
        dropped = sorted(set(range(n_models)) - set(kept))
        warnings.warn(
            f"models {dropped} equal an earlier model in every tensor and add nothing; "
            "they share its ranks and adapters",
            stacklevel=2,
        )
    source = [_first_equal(layers, model, kept) for model in range(n_models)]
    results = _solve_all(layers, kept, source, solver, progress, max_memory)
    names = [f"model {index}" for index in range(n_models)]
    for line in explain.repairs(_notes(results, layers, names), len(layers)):
        warnings.warn(line, explain.RepairWarning, stacklevel=2)
    if throw:
        _raise_failures(results, layers, names)
    if isinstance(stack, Mapping):
        return Recoveries(
            {name: _recovery([result], stack[name]).layer(0) for name, result in results.items()}
        )
    recovery = _recovery(list(results.values()), stack)
    return recovery if stack.ndim == 4 else recovery.layer(0)


def _first_equal(layers: Mapping[str, Array], model: int, kept: Sequence[int]) -> int:
    """Position in ``kept`` of the model that equals ``model``."""
    if model in kept:
        return kept.index(model)
    return next(i for i, other in enumerate(kept) if same_model(layers, model, other))


def _solve_all(
    layers: dict[str, Array],
    kept: Sequence[int],
    source: Sequence[int],
    solver: Solver,
    progress: Progress | None,
    max_memory: int | None,
) -> dict[str, LayerResult]:
    results: dict[str, LayerResult] = {}
    for group in group_layers(layers):
        stacks = [narrowest(layers[name], group.storage) for name in group.names]
        solved = _solve_group(stacks, kept, solver, max_memory)
        for name, result in zip(group.names, solved, strict=True):
            results[name] = result._replace(
                left=result.left[source],
                right=result.right[source],
                ranks=result.ranks[source],
                stats={**result.stats, "base_group": _groups(result, kept)[source]},
            )
            if progress is not None:
                progress(len(results), len(layers))
    return {name: results[name] for name in layers}


def _groups(result: LayerResult, kept: Sequence[int]) -> np.ndarray:
    return np.asarray(result.stats.get("base_group", np.zeros(len(kept), np.float32)))


def _solve_group(
    stacks: Sequence[Array], kept: Sequence[int], solver: Solver, max_memory: int | None
) -> Iterator[LayerResult]:
    every = len(kept) == stacks[0].shape[0]
    distinct = list(stacks) if every else [stack[np.asarray(kept)] for stack in stacks]
    if len(kept) < 3:
        return (failed(stack, Status.TOO_FEW_MODELS) for stack in distinct)
    closed_form = isinstance(solver, SubspaceIntersection)
    dtype = resolve_dtype(solver.precision)
    return repair.solve_group(
        distinct, lambda some: _run(some, solver, max_memory), dtype, closed_form
    )


def _run(stacks: Sequence[Array], solver: Solver, max_memory: int | None) -> Iterator[LayerResult]:
    if isinstance(solver, SpectralDeTuning):
        return iterate_group(stacks, solver)
    return intersect_group(stacks, solver, max_memory=max_memory)


def _notes(
    results: Mapping[str, LayerResult], layers: Mapping[str, Array], names: Sequence[str]
) -> list[explain.Note]:
    """What was repaired in which layer."""
    notes = []
    for name, result in results.items():
        groups = repair.group_of(result)
        if result.status.has_base and groups.any():
            notes += explain.notes_of(name, groups, np.asarray(layers[name]), names)
    return notes


def _raise_failures(
    results: Mapping[str, LayerResult], layers: Mapping[str, Array], names: Sequence[str]
) -> None:
    lines = []
    for name, result in results.items():
        if result.status is not Status.OK:
            groups = repair.group_of(result)
            why = explain.failure(result.status, groups, np.asarray(layers[name]), names)
            lines.append(f"{name}: {result.status.name}: {why}")
    if lines:
        raise RecoveryFailed(f"{len(lines)} of {len(results)} layers failed\n" + "\n".join(lines))


def _recovery(results: Sequence[LayerResult], like: Array) -> Recovery:
    """Stacks results along a layer axis, in the array type of ``like``."""
    rank = max(result.left.shape[2] for result in results)
    names = sorted({name for result in results for name in result.stats})

    def column(name: str) -> np.ndarray:
        known = next(result.stats[name] for result in results if name in result.stats)
        unknown = np.full_like(known, np.nan, np.float32)
        return np.stack([np.asarray(r.stats.get(name, unknown), np.float32) for r in results])

    dtypes = {result.base.dtype for result in results if result.status.has_base}
    dtype = dtypes.pop() if len(dtypes) == 1 else like.dtype
    unknown = np.full(len(results), np.nan, np.float32)
    figures = {name: column(name) for name in names}
    error = figures.pop("expected_error", unknown)
    recovery = Recovery(
        base=np.stack([result.base.astype(dtype, copy=False) for result in results]),
        ranks=np.stack([result.ranks for result in results]),
        adapters=Adapters(
            left=np.stack(
                [_pad(result.left, (0, 0, rank - result.left.shape[2])) for result in results]
            ),
            right=np.stack(
                [_pad(result.right, (0, rank - result.right.shape[1], 0)) for result in results]
            ),
        ),
        status=np.array([result.status for result in results], np.int32),
        predicted_error=np.log10(np.maximum(error, 10.0**LOG_MSE_FLOOR, dtype=np.float64)),
        exact_fraction=figures.pop("exact_fraction", unknown),
        amplification=figures.pop("amplification", unknown),
        certain=np.stack(
            [np.zeros(r.base.shape, bool) if r.certain is None else r.certain for r in results]
        ),
        stats=figures,
    )
    return recovery if isinstance(like, np.ndarray) else jax.tree.map(jnp.asarray, recovery)


def _pad(array: np.ndarray, after: tuple[int, ...]) -> np.ndarray:
    return np.pad(array, [(0, count) for count in after]) if any(after) else array
