"""What came of every tensor of an extraction, and the parts of its report that say so."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jdetune import report
from jdetune.checkpoint.index import Checkpoint
from jdetune.checkpoint.shapes import smaller_side
from jdetune.status import Status

STATUSES = ("extracted", "identical", "kept_whole", "not_low_rank", "failed", "skipped")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one tensor of one model.

    Attributes:
      name: the tensor's name.
      status: one of ``STATUSES``.
      reason: cause and remedy, where it is neither extracted nor identical.
      code: what the numbers say, None for tensors that were not solved.
      factors: B and A, if there are any.
      slices: those of each slice of a stack, by matrix name.
      figures: the report's numbers of this tensor.
    """

    name: str
    status: str
    reason: str | None = None
    code: Status | None = None
    factors: tuple[np.ndarray, np.ndarray] | None = None
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    slices: Mapping[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)


#: Figure of a stack to what is said of all its slices together.
_JOINED: Mapping[str, Callable[[Sequence[float]], float]] = {
    "residual_rms": lambda values: float(np.sqrt(np.mean(np.square(values)))),
    "noise_rms_expected": lambda values: float(np.sqrt(np.mean(np.square(values)))),
    "residual_ratio": max,
    "detection_floor": max,
    "rank": max,
    "rank_gap": min,
    "remerge_match": lambda values: float(np.mean(values)),
    "seconds": sum,
}


def join_slices(name: str, parts: Mapping[str, Outcome], reason: str | None) -> Outcome:
    """A stack's outcome from those of its slices that differ.

    Args:
      name: the stack's.
      parts: outcome of every slice that differs, by matrix name.
      reason: what the tensor was taken for.
    """
    bad = [part for part in parts.values() if part.status != "extracted"]
    if bad:
        text = f"{bad[0].name}: {bad[0].reason} ({len(bad)} slice(s) so)"
        return dataclasses.replace(bad[0], name=name, reason=text)
    figures = {}
    for key, join in _JOINED.items():
        values = [part.figures.get(key) for part in parts.values()]
        known = [value for value in values if value is not None]
        figures[key] = join(known) if known else None
    slices = {unit: part.factors for unit, part in parts.items() if part.factors is not None}
    return Outcome(name, "extracted", reason, Status.OK, None, figures, slices)


def judge_heads(outcomes: Sequence[Outcome], base: Checkpoint) -> list[Outcome]:
    """Calls a matrix too small to tell low rank from full rank kept, not failed.

    A head of three classes has rank three at most; with updates of rank 16 around it, nothing says
    whether it was trained whole. That is usual (PEFT's ``modules_to_save``).
    """
    top = max((o.figures["rank"] for o in outcomes if o.status == "extracted"), default=0)
    note = "as small as the updates' ranks allow: trained whole, and kept whole"
    return [
        dataclasses.replace(o, status="kept_whole", reason=note)
        if o.status == "not_low_rank" and smaller_side(base.tensors[o.name]) <= 2 * top
        else o
        for o in outcomes
    ]


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 all good, 5 partial; 3 or 4 where no differing matrix could be extracted.

    Example:
      >>> exit_code([Outcome("a", "extracted"), Outcome("b", "not_low_rank")])
      5
    """
    bad = [o for o in outcomes if o.status in ("not_low_rank", "failed", "skipped")]
    codes = [o.code.exit_code for o in bad if o.code is not None]
    if codes and not any(o.status == "extracted" for o in outcomes):
        return max(codes)
    return 5 if bad else 0


def tensor_entry(base: Checkpoint, model: Checkpoint, outcome: Outcome) -> dict[str, Any]:
    """One entry of ``tensors``."""
    holder = base if outcome.name in base.tensors else model
    info = holder.tensors[outcome.name]
    numbers = ("rank", "residual_rms", "noise_rms_expected", "residual_ratio", "rank_gap")
    numbers += ("detection_floor", "remerge_match", "seconds")
    return {
        "model": model.name,
        "name": outcome.name,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "status": outcome.status,
        "code": None if outcome.code is None else outcome.code.name,
        **{key: outcome.figures.get(key) for key in numbers},
        "reason": outcome.reason,
    }


def input_entry(
    model: Checkpoint, outcomes: Sequence[Outcome], code: int, written: bool
) -> dict[str, Any]:
    """One entry of ``inputs``."""
    return {
        "name": model.name,
        **report.source_entry(model),
        "dtype": report.main_dtype(model),
        "exit_code": code,
        "written": written,
        "ranks": {o.name: o.figures["rank"] for o in outcomes if o.status == "extracted"},
    }


def summary(found: Sequence[Sequence[Outcome]], codes: Sequence[int]) -> dict[str, Any]:
    """Counts and the verdict: every model's exit code, or 5 where they differ."""
    everything = [outcome for outcomes in found for outcome in outcomes]
    counts = {status: sum(o.status == status for o in everything) for status in STATUSES}
    code = codes[0] if len(set(codes)) == 1 else 5
    return {
        "tensors": len(everything),
        **counts,
        "verdict": {0: "extracted", 5: "partial"}.get(code, "failed"),
        "base_written": False,
        "exit_code": code,
    }
