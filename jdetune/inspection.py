"""Looks at checkpoints without recovering them: headers, and the ranks of a few matrices."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jdetune import explain
from jdetune.checkpoint.alignment import align
from jdetune.checkpoint.compare import is_common
from jdetune.checkpoint.index import Checkpoint
from jdetune.checkpoint.manifest import GROUP_BYTES
from jdetune.checkpoint.reader import digest, numpy_dtype
from jdetune.checkpoint.shapes import read_stack, units, view_of
from jdetune.report import main_dtype, number
from jdetune.result import Recovery
from jdetune.status import Status

#: Working arrays of a solve, in copies of the stack it solves, taken as float64.
_WORKING_COPIES = 3


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a model's headers say."""
    return {
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "dtype": main_dtype(checkpoint),
        "tensors": len(checkpoint.tensors),
        "parameters": checkpoint.n_parameters,
        "bytes": stored_bytes(checkpoint),
        "files": len(checkpoint.files),
        "model_type": checkpoint.config.get("model_type"),
    }


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors."""
    return sum(info.n_bytes for info in checkpoint.tensors.values())


def common_names(checkpoints: Sequence[Checkpoint]) -> tuple[list[str], list[str]]:
    """Names of one shape and kind in all models, and the names that are not."""
    everything = dict.fromkeys(name for c in checkpoints for name in c.tensors)
    alike = [name for name in everything if is_common(checkpoints, name)]
    return alike, [name for name in everything if name not in set(alike)]


def sample_differing(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], count: int
) -> dict[str, np.ndarray]:
    """The first differing matrices, shape after shape, so that every shape gets its turn.

    Reading goes on past ``count`` until three models are distinct in what was found, or nothing is
    left; of those further matrices only the ones that tell more models apart are kept.

    Args:
      checkpoints: opened models.
      names: tensors that all of them have alike.
      count: how many to find.

    Returns:
      Name to [model, row, col].
    """
    by_shape: dict[tuple, list[str]] = {}
    for name in names:
        info = checkpoints[0].tensors[name]
        view = view_of(info)
        if view is not None:
            key = (view.row, view.col, info.dtype)
            by_shape.setdefault(key, []).extend(units(info))
    queues = [iter(queue) for queue in by_shape.values()]
    found: dict[str, np.ndarray] = {}
    seen: list[tuple[bytes, ...]] = [() for _ in checkpoints]
    while queues and (len(found) < count or len(set(seen)) < 3):
        alive = []
        for queue in queues:
            for name in queue:
                stack = read_stack(checkpoints, name)
                marks = [digest(matrix) for matrix in stack]
                refined = [(*old, mark) for old, mark in zip(seen, marks, strict=True)]
                more = len(set(refined)) > len(set(seen))
                if len(set(marks)) > 1 and (more or len(found) < count):
                    found[name], seen = stack, refined
                    alive.append(queue)
                    break
            if len(found) >= count and len(set(seen)) >= 3:
                break
        queues = alive
    return found


def distinct_models(sample: Mapping[str, np.ndarray], n_models: int) -> int:
    """How many models differ in the sample; below three, that is all there are."""
    marks = {tuple(digest(stack[i]) for stack in sample.values()) for i in range(n_models)}
    return len(marks)


def memory_estimate(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> int:
    """Bytes of memory that ``recover`` needs if every matrix differs: an upper estimate.

    The largest group of equal-shaped matrices with its working copies in float64, and all
    recovered bases, which are kept until they are written.
    """
    sizes: dict[tuple, list[int]] = {}
    for name in names:
        info = checkpoints[0].tensors[name]
        view = view_of(info)
        if view is not None:
            width = numpy_dtype(info.dtype).itemsize
            stored = view.row * view.col * width * len(checkpoints)
            key = (view.row, view.col, info.dtype, 8 // width)
            sizes.setdefault(key, []).extend([stored] * (view.slices or 1))
    groups = [
        max(min(sum(group), GROUP_BYTES), max(group)) * factor * _WORKING_COPIES
        for (*_, factor), group in sizes.items()
    ]
    bases = sum(sum(group) for group in sizes.values()) // max(1, len(checkpoints))
    return max(groups, default=0) + bases


def inspect(
    checkpoints: Sequence[Checkpoint],
    count: int,
    recover: Callable[..., Mapping[str, Recovery]],
) -> dict[str, Any]:
    """Headers of all models and the solver's word on a few matrices.

    Args:
      checkpoints: opened models.
      count: matrices to try.
      recover: ``jdetune.recover``.

    Returns:
      A dict for JSON with ``models``, ``sample``, ``exit_code`` and a ``verdict``.
    """
    described = [describe(checkpoint) for checkpoint in checkpoints]
    read_bytes = sum(stored_bytes(c) for c in checkpoints)
    write_bytes = stored_bytes(checkpoints[0])
    aligned = align(checkpoints)
    checkpoints = aligned.checkpoints
    alike, unlike = common_names(checkpoints)
    sample = sample_differing(checkpoints, alike, count)
    n_distinct = distinct_models(sample, len(checkpoints)) if sample else 1
    entries = []
    if sample:
        solved = recover(sample)
        names = [checkpoint.name for checkpoint in checkpoints]
        entries = [_sample_entry(name, solved[name], sample[name], names) for name in sample]
    code, verdict = _judge(entries, n_distinct, bool(alike))
    if code == Status.TOO_FEW_MODELS.exit_code and n_distinct < 3:
        entries = []  # what a solver says of two models means nothing
    views = [view_of(checkpoints[0].tensors[name]) for name in alike]
    return {
        "models": described,
        "notes": list(aligned.notes),
        "alike": len(alike),
        "matrices": sum(view.slices or 1 for view in views if view is not None),
        "unlike": unlike,
        "distinct_in_sample": n_distinct,
        "sample": entries,
        "memory_bytes": memory_estimate(checkpoints, alike),
        "read_bytes": read_bytes,
        "write_bytes": write_bytes,
        "verdict": verdict,
        "exit_code": code,
    }


def _sample_entry(
    name: str, found: Recovery, stack: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    code = Status(int(found.status))
    groups = np.asarray(found.stats.get("base_group", np.zeros(len(stack)))).astype(np.int32)
    notes = explain.notes_of(name, groups, stack, names) if code.has_base else []
    text = [] if code is Status.OK else [explain.failure(code, groups, stack, names)]
    reason = " ".join([*text, *(f"{note.model} {note.text}" for note in notes)])
    return {
        "name": name,
        "shape": list(stack.shape[1:]),
        "dtype": str(stack.dtype),
        "code": code.name,
        "ranks": [int(rank) for rank in np.asarray(found.ranks)] if code.has_base else None,
        "predicted_error": number(found.predicted_error, floor=-40.0),
        "residual_ratio": number(found.stats.get("residual_ratio")),
        "reason": reason or None,
    }


def _judge(
    entries: Sequence[Mapping[str, Any]], n_distinct: int, any_alike: bool
) -> tuple[int, str]:
    if not any_alike:
        return 4, "the models have no tensor in common: they are not fine-tunes of one base"
    if n_distinct < 3:
        alien = entries and all(e["code"] == Status.NOT_LOW_RANK.name for e in entries)
        code = Status.NOT_LOW_RANK if alien else Status.TOO_FEW_MODELS
        return code.exit_code, f"not recoverable: {code.message}"
    bad = [Status[e["code"]] for e in entries if e["code"] != "OK"]
    repaired = [e["reason"] for e in entries if e["code"] == "OK" and e["reason"]]
    if not bad and repaired:
        return 0, f"recoverable with repairs: {repaired[0]}"
    if not bad:
        return 0, "recoverable: run `jdetune recover` with these models and --out=DIR"
    if len(bad) < len(entries):
        return 0, f"recoverable in part: {len(bad)} of {len(entries)} sampled matrices are not"
    worst = max(bad, key=lambda code: code.exit_code)
    why = next(e["reason"] for e in entries if e["code"] == worst.name)
    return worst.exit_code, f"not recoverable: {why}"
