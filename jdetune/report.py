"""Builds report.json: what happened to every tensor, in numbers or null, never NaN."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdetune.busy import COMPUTE, READ, TRANSFER, WRITE, Busy
from jdetune.certificate import verdict
from jdetune.checkpoint.index import Checkpoint, read_json
from jdetune.checkpoint.manifest import EXCLUDED, Plan, TensorPlan
from jdetune.errors import InputError
from jdetune.remerge import Remerged
from jdetune.remerge import entries as remerge_entries
from jdetune.report_check import is_whole
from jdetune.result import Recovery
from jdetune.slices import join_entries
from jdetune.status import Status

SCHEMA = "jdetune.report/1"
SHARED_PART = (
    "Whatever all models have in common (an earlier merged fine-tune, a PiSSA residual) is part of "
    "the recovered base; nothing in the weights can tell."
)


@dataclasses.dataclass(frozen=True)
class TensorResult:
    """One tensor's outcome.

    Attributes:
      plan: what was planned.
      status: ``recovered | identical | consensus | per_model | failed | skipped``.
      recovery: the solver's result without its arrays' use here, if there was one.
      method: the solver's name.
      remerged: what re-merging gives back, a model each.
      seconds: solver time, shared evenly in a group.
      reason: cause and remedy where it is not a plain success.
      base_dtype: dtype of the base written, None if it was left out.
      parts: of a stack, each matrix's own result; it has no recovery itself.
    """

    plan: TensorPlan
    status: str
    recovery: Recovery | None = None
    method: str | None = None
    remerged: tuple[Remerged, ...] | None = None
    seconds: float | None = None
    reason: str | None = None
    base_dtype: str | None = None
    parts: tuple["TensorResult", ...] = ()

    @property
    def code(self) -> Status | None:
        """The solver's status, None for tensors it never saw; of a stack, the first that is bad."""
        if self.parts:
            codes = [part.code for part in self.parts]
            return next((code for code in codes if code is not Status.OK), Status.OK)
        return None if self.recovery is None else Status(int(self.recovery.status))


def matrices(results: Sequence[TensorResult]) -> list[TensorResult]:
    """Results a matrix each: stacks are taken apart."""
    return [part for result in results for part in (result.parts or (result,))]


def number(value: Any, floor: float | None = None) -> float | None:
    """A JSON number, or None for what is unknown or not finite.

    Example:
      >>> number(float("nan")), number(-99.0, floor=-40.0)
      (None, -40.0)
    """
    if value is None or not math.isfinite(float(value)):
        return None
    return float(value) if floor is None else max(float(value), floor)


def tensor_entry(result: TensorResult) -> dict[str, Any]:
    """One entry of ``tensors``."""
    if result.parts:
        return join_entries(_entry(result), [_entry(part) for part in result.parts])
    return _entry(result)


def _entry(result: TensorResult) -> dict[str, Any]:
    found = result.recovery
    stats = {} if found is None else dict(found.stats)
    code, again = result.code, result.remerged
    ranks = None
    if found is not None and result.status == "recovered":
        ranks = [int(r) for r in np.ravel(np.asarray(found.ranks))]
    return {
        "name": result.plan.name,
        "shape": list(result.plan.shape),
        "dtype": result.plan.dtype,
        "base_dtype": result.base_dtype,
        "status": result.status,
        "code": None if code is None else code.name,
        "method": result.method,
        "ranks": ranks,
        "iterations": _integer(stats.get("iterations")),
        "residual_rms": number(stats.get("residual_rms")),
        "noise_rms_expected": _noise(stats.get("noise_rms_expected"), again),
        "residual_ratio": number(stats.get("residual_ratio")),
        "rank_gap": number(stats.get("rank_gap")),
        "predicted_error": None if found is None else number(found.predicted_error, floor=-40.0),
        "exact_fraction_est": None if found is None else number(found.exact_fraction),
        "ambiguous_fraction": number(stats.get("ambiguous_fraction")),
        "certain_fraction": None if found is None else _certain(found),
        "amplification": None if found is None else number(found.amplification),
        "verdict": None if found is None else _verdict(found),
        "detection_floor": number(stats.get("detection_floor")),
        "remerge_match": None if again is None else [figure.match for figure in again],
        **remerge_entries(again),
        "seconds": number(result.seconds),
        "reason": result.reason or result.plan.reason,
    }


def source_entry(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where a model is from: a path, or the hub's id and the commit."""
    return {"path": checkpoint.source, "revision": checkpoint.revision}


def source_text(entry: Mapping[str, Any]) -> str:
    """What to give as MODEL to get the model of an entry again.

    Example:
      >>> source_text({"path": "org/name", "revision": "0a1"}), source_text({"path": "/zoo/a"})
      ('org/name@0a1', '/zoo/a')
    """
    return f"{entry['path']}@{entry['revision']}" if entry.get("revision") else entry["path"]


def input_entries(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    plan: Plan,
    results: Sequence[TensorResult],
) -> list[dict[str, Any]]:
    """One entry a model, in the order given; duplicates name the model they equal."""
    twins = dict(plan.duplicates)
    kept = [c.name for c in plan.checkpoints]
    entries = []
    for checkpoint, name in zip(checkpoints, names, strict=True):
        index = kept.index(name) if name in kept else None
        entries.append(
            {
                "name": name,
                **source_entry(checkpoint),
                "dtype": main_dtype(checkpoint),
                "sha256": None,
                "duplicate_of": twins.get(name),
                "ranks": None if index is None else _ranks_of(results, index),
            }
        )
    return entries


def summary(results: Sequence[TensorResult], written: bool) -> dict[str, Any]:
    """Counts, means and the verdict."""
    count = {s: sum(r.status == s for r in results) for s in _STATUSES}
    good = [r for r in results if r.status == "recovered"]
    solved = [r for r in matrices(good) if r.recovery is not None]
    exact = _mean([number(r.recovery.exact_fraction) for r in solved if r.recovery is not None])
    error = _mean(
        [number(r.recovery.predicted_error, -40.0) for r in solved if r.recovery is not None]
    )
    code = exit_code_of(results)
    return {
        "tensors": len(results),
        "recovered": count["recovered"],
        "consensus": count["consensus"],
        "copied": count["identical"],
        "per_model": count["per_model"],
        "failed": count["failed"],
        "skipped": count["skipped"],
        "exact_fraction_est": exact,
        "predicted_error": error,
        "max_ulp_est": None,
        "verdict": {0: "recovered", 5: "partial"}.get(code, "failed"),
        "base_written": written,
        "exit_code": code,
        "note": SHARED_PART,
    }


def exit_code_of(results: Sequence[TensorResult]) -> int:
    """0 all recovered, 5 some, 3 or 4 none although matrices differ."""
    codes = [result.code for result in results if result.code is not None]
    bad = [code for code in codes if code is not Status.OK]
    if codes and len(bad) == len(codes):
        return max(code.exit_code for code in bad)
    rest = any(r.status in ("failed", "per_model") or _mismatched(r) for r in results)
    return 5 if bad or rest else 0


def main_dtype(checkpoint: Checkpoint) -> str | None:
    """The dtype that most parameters are stored in."""
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + math.prod(info.shape)
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def timing(
    laps: Mapping[str, float], seconds: float, results: Sequence[TensorResult], processes: int
) -> dict[str, Any]:
    """Where the time went, as the first process saw it.

    Args:
      laps: stage to seconds; waiting for other processes is part of a stage.
      seconds: of the whole run.
      results: what came of the tensors; their seconds are those of the solver alone.
      processes: how many worked.

    Returns:
      Seconds by stage, ``solve`` (the solver's, of the mean process) and ``not_in_solve``, the
      share of the run that is anything else.
    """
    solve = sum(r.seconds or 0.0 for r in results) / processes
    parts = {name: round(value, 3) for name, value in laps.items()}
    rest = max(0.0, 1 - solve / seconds) if seconds > 0 else 0.0
    return {
        "processes": processes,
        **parts,
        "solve": round(solve, 3),
        "not_in_solve": round(rest, 4),
    }


def overlap(busy: Busy, seconds: float) -> dict[str, float]:
    """How well reading, writing and computing overlapped, as the first process saw it.

    Args:
      busy: what was done when.
      seconds: of the whole run.

    Returns:
      Seconds in which anything was read, written, either of both (``transferring``) or computed
      (digests are), and ``over_larger``: the run's time over the larger of the last two.
    """
    transfer, compute = busy.seconds(TRANSFER), busy.seconds(COMPUTE)
    return {
        "reading": round(busy.seconds(READ), 3),
        "writing": round(busy.seconds(WRITE), 3),
        "transferring": round(transfer, 3),
        "computing": round(compute, 3),
        "over_larger": round(seconds / max(transfer, compute, 1e-9), 3),
    }


def read_report(out: str | Path) -> dict[str, Any]:
    """Reads OUT/report.json, or the file itself, and checks its schema."""
    path = Path(out) if Path(out).is_file() else Path(out) / "report.json"
    if not path.is_file():
        raise InputError(f"{path}: missing. Give the folder that `jdetune recover` wrote.")
    report = read_json(path)
    if report.get("schema") != SCHEMA:
        raise InputError(f"{path}: not a {SCHEMA} report. Recover again with this version.")
    if not is_whole(report):
        raise InputError(f"{path}: not what `jdetune recover` wrote. Recover again.")
    return report


_STATUSES = ("recovered", "identical", "consensus", "per_model", "failed", "skipped")


def _mismatched(result: TensorResult) -> bool:
    """Skipped although nobody asked for it."""
    return result.status == "skipped" and result.plan.reason != EXCLUDED


def _ranks_of(results: Sequence[TensorResult], index: int) -> dict[str, int]:
    """Rank a tensor in one model; of a stack, the largest."""
    ranks = {}
    for result in results:
        found = [part.recovery for part in matrices([result]) if part.recovery is not None]
        if result.status == "recovered" and found:
            own = [int(np.ravel(np.asarray(recovery.ranks))[index]) for recovery in found]
            ranks[result.plan.name] = max(own)
    return ranks


def _certain(found: Recovery) -> float | None:
    known = Status(int(found.status)).has_base and number(found.exact_fraction) is not None
    return float(np.mean(np.asarray(found.certain))) if known else None


def _verdict(found: Recovery) -> str | None:
    """The certificate in words; None for solvers without one."""
    status = Status(int(found.status))
    if status.has_base and number(found.exact_fraction) is None:
        return None
    return verdict(status, float(found.exact_fraction), float(found.amplification))


def _noise(known: Any, again: Sequence[Remerged] | None) -> float | None:
    """The solver's figure; where it has none, rms over the models that were merged again."""
    if known is not None or not again:
        return number(known)
    return number(math.sqrt(sum(figure.noise**2 for figure in again) / len(again)))


def _integer(value: Any) -> int | None:
    known = number(value)
    return None if known is None else int(known)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def top_level(
    *, command: str, started_at: str, seconds: float, device: str, version: str
) -> Mapping[str, Any]:
    """The keys of report.json that say how it came about."""
    return {
        "schema": SCHEMA,
        "jdetune_version": version,
        "command": command,
        "started_at": started_at,
        "seconds": round(seconds, 3),
        "device": device,
    }
