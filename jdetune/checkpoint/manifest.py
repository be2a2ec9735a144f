"""Compares checkpoints tensor by tensor and plans what to do with each."""

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from jdetune.checkpoint.alignment import align
from jdetune.checkpoint.compare import Marks, all_marks, entries, first_equal, is_common
from jdetune.checkpoint.index import Checkpoint, TensorInfo
from jdetune.checkpoint.plan import Plan, TensorPlan
from jdetune.checkpoint.reader import numpy_dtype
from jdetune.checkpoint.shapes import View, units, view_of
from jdetune.distributed import ALONE, Processes
from jdetune.errors import InputError, NotOneBaseError

#: Bytes of merged weights that are read at once, all models together.
GROUP_BYTES = 2 << 30
#: Matrices that are solved together at most.
GROUP_LAYERS = 32
#: Threads that compare.
READERS = 4
#: Reason of a matrix that the caller's regular expressions left out.
EXCLUDED = "left out by --include or --exclude"


def select(include: str | None = None, exclude: str | None = None) -> Callable[[str], bool]:
    """A test of tensor names by two regular expressions, searched anywhere in the name.

    Example:
      >>> select("query|key", "layer.0")("encoder.layer.1.query.weight")
      True
    """
    try:
        wanted, unwanted = re.compile(include or ""), re.compile(exclude or r"(?!)")
    except re.error as error:
        raise InputError(f"{error.pattern!r} is not a regular expression: {error}.") from error
    return lambda name: bool(wanted.search(name)) and not unwanted.search(name)


def make_plan(
    checkpoints: Sequence[Checkpoint],
    wanted: Callable[[str], bool] = lambda name: True,
    progress: Callable[[int, int], None] | None = None,
    processes: Processes = ALONE,
    group_bytes: int = GROUP_BYTES,
) -> Plan:
    """Compares the models' bytes and decides what happens to every tensor.

    Args:
      checkpoints: at least two opened checkpoints.
      wanted: which differing matrices to recover; the others are skipped.
      progress: called with the tensors compared so far and their number.
      processes: who compares along; each reads its share of the tensors.
      group_bytes: size of a group of matrices at most, all models together.

    Raises:
      NotOneBaseError: nothing in common.
    """
    given, aligned = checkpoints, align(checkpoints)
    checkpoints = aligned.checkpoints
    names = list(dict.fromkeys(name for c in checkpoints for name in c.tensors))
    if not any(is_common(checkpoints, name) for name in names):
        return _plan_one_architecture(given, wanted, progress, processes, group_bytes)
    marks = all_marks(checkpoints, names, progress, processes)
    keep, duplicates = _distinct(checkpoints, marks)
    differing = [name for name in names if _is_differing(checkpoints, name, marks[name])]
    kept = tuple(checkpoints[i] for i in keep)
    ties = {}
    for head, embedding in aligned.ties.items():
        same = [a == b for a, b in zip(marks[head], marks[embedding], strict=True)]
        ties[head] = (embedding, tuple(same[i] for i in keep))
    plans = []
    for name in names:
        if any(name in c.tensors for c in kept):
            tensor = _plan_tensor(kept, name, [marks[name][i] for i in keep], wanted)
            tensor = _tie(tensor, ties)
            if tensor.action != "skipped" and name in aligned.cut:
                reason = "; ".join(filter(None, [tensor.reason, aligned.cut[name]]))
                tensor = dataclasses.replace(tensor, reason=reason)
            plans.append(tensor)
    groups = group_tensors(kept, [p.name for p in plans if p.action == "recover"], group_bytes)
    alike = first_equal([tuple(marks[name][i] for name in differing) for i in keep])
    return Plan(
        checkpoints=kept,
        duplicates=duplicates,
        tensors=tuple(plans),
        groups=groups,
        warnings=(*aligned.notes, *_config_warnings(kept)),
        alike=alike,
        ties=ties,
        fingerprint=hashlib.sha256(repr(list(marks.items())).encode()).hexdigest(),
    )


def _plan_one_architecture(
    checkpoints: Sequence[Checkpoint],
    wanted: Callable[[str], bool],
    progress: Callable[[int, int], None] | None,
    processes: Processes,
    group_bytes: int,
) -> Plan:
    """The plan without single models of another architecture, where three others remain."""
    groups = group_by_architecture(checkpoints)
    large = [group for group in groups if len(group) > 1]
    if len(groups) > 1 and len(large) == 1 and len(large[0]) >= 3:
        plan = make_plan(
            [checkpoints[i] for i in large[0]], wanted, progress, processes, group_bytes
        )
        others = [c.name for i, c in enumerate(checkpoints) if i not in large[0]]
        first = plan.checkpoints[0].name
        reasons = [
            f"{name} was left out: it has no tensor in common with {first} by name, shape and "
            "dtype, so it is no fine-tune of that base. Recover it with models of its own base."
            for name in others
        ]
        left_out = (*plan.left_out, *zip(others, reasons, strict=True))
        warnings = (*plan.warnings, *reasons)
        return dataclasses.replace(plan, left_out=left_out, warnings=warnings)
    said = "; ".join(", ".join(checkpoints[i].name for i in group) for group in groups)
    raise NotOneBaseError(
        "the models have no tensor in common by name and shape: they are not fine-tunes of "
        f"one base. Models by architecture: {said}. Recover each group of three or more alone."
    )


def group_by_architecture(checkpoints: Sequence[Checkpoint]) -> list[list[int]]:
    """Indices of models that have half of their tensors' names and shapes or more in common."""
    kinds = [{(name, i.shape) for name, i in c.tensors.items()} for c in checkpoints]
    groups: list[list[int]] = []
    for index, own in enumerate(kinds):
        for group in groups:
            if 2 * len(own & kinds[group[0]]) >= max(len(own), len(kinds[group[0]])):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def group_tensors(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], limit: int = GROUP_BYTES
) -> tuple[tuple[str, ...], ...]:
    """Groups tensors' matrices by shape and dtype, in order, each group within the limits."""
    groups: dict[tuple, list[list[str]]] = {}
    for name in names:
        info = checkpoints[0].tensors[name]
        view = view_of(info)
        assert view is not None, f"{name} is no matrix"
        size = view.row * view.col * numpy_dtype(info.dtype).itemsize * len(checkpoints)
        room = min(max(1, limit // max(1, size)), GROUP_LAYERS)
        parts = groups.setdefault((view.row, view.col, info.dtype), [[]])
        for unit in units(info):
            if len(parts[-1]) >= room:
                parts.append([])
            parts[-1].append(unit)
    return tuple(tuple(part) for parts in groups.values() for part in parts)


def _distinct(
    checkpoints: Sequence[Checkpoint], marks: dict[str, Marks]
) -> tuple[list[int], tuple[tuple[str, str], ...]]:
    first = first_equal(list(zip(*marks.values(), strict=True)))
    keep = [i for i, twin in enumerate(first) if twin == i]
    twins = [(i, twin) for i, twin in enumerate(first) if twin != i]
    return keep, tuple((checkpoints[i].name, checkpoints[twin].name) for i, twin in twins)


def _is_differing(checkpoints: Sequence[Checkpoint], name: str, marks: Marks) -> bool:
    """Whether it is made of matrices of one kind in all models, in which they differ."""
    info = checkpoints[0].tensors.get(name)
    kind = info is not None and view_of(info) is not None and is_common(checkpoints, name)
    return kind and len(set(marks)) > 1


def _plan_tensor(
    checkpoints: Sequence[Checkpoint],
    name: str,
    marks: Marks,
    wanted: Callable[[str], bool],
) -> TensorPlan:
    info = next(i for i in entries(checkpoints, name) if i is not None)
    fields = (name, info.shape, info.dtype)
    if not all(i.is_known for i in entries(checkpoints, name) if i is not None):
        return TensorPlan(*fields, "skipped", f"dtype {info.dtype} is not known here")
    if len(set(marks)) == 1:
        return TensorPlan(*fields, "identical", source=0)
    common, view = is_common(checkpoints, name), view_of(info)
    if common and view is not None:
        if wanted(name):
            return _plan_matrices(checkpoints, info, view)
        return TensorPlan(*fields, "skipped", EXCLUDED)
    mark, count = Counter(m for m in marks if m is not None).most_common(1)[0]
    if 2 * count > len(marks):
        odd = [c.name for c, m in zip(checkpoints, marks, strict=True) if m != mark]
        reason = f"{count} of {len(marks)} models hold the same copy, not so {', '.join(odd)}"
        return TensorPlan(*fields, "consensus", reason, marks.index(mark))
    if not common:
        return TensorPlan(*fields, "skipped", _mismatch(checkpoints, name))
    return TensorPlan(*fields, "per_model", "differs in most models and is not a float matrix")


def _tie(tensor: TensorPlan, ties: Mapping[str, tuple[str, tuple[bool, ...]]]) -> TensorPlan:
    """A head that equals its embedding in every model is not worked on again."""
    embedding, same = ties.get(tensor.name, ("", ()))
    if tensor.action not in ("recover", "per_model") or not all(same) or not same:
        return tensor
    reason = f"tied to {embedding}: the same in every model"
    return dataclasses.replace(tensor, action="tied", tied_to=embedding, reason=reason)


def _plan_matrices(checkpoints: Sequence[Checkpoint], info: TensorInfo, view: View) -> TensorPlan:
    fields = (info.name, info.shape, info.dtype)
    slices = units(info) if view.slices is not None else ()
    if any(name in c.tensors for c in checkpoints for name in slices):
        reason = f"another tensor is called like a slice of it, {info.name}[0]. Rename one of them."
        return TensorPlan(*fields, "failed", reason)
    return TensorPlan(*fields, "recover", view.reason)


def _mismatch(checkpoints: Sequence[Checkpoint], name: str) -> str:
    parts = []
    for checkpoint, info in zip(checkpoints, entries(checkpoints, name), strict=True):
        what = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
        parts.append(f"{checkpoint.name}: {what}")
    return "not the same kind in all models (" + ", ".join(parts) + ")"


def _config_warnings(checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    types = {c.name: c.config.get("model_type") for c in checkpoints if c.config}
    if len(set(types.values())) > 1:
        said = ", ".join(f"{name}: {kind}" for name, kind in types.items())
        return (f"the models' config.json name different model types ({said})",)
    return ()
