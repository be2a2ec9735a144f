"""Builds report.json: what happened to every tensor, in numbers or null, never NaN."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdetune.certificate import verdict
from jdetune.checkpoint.index import Checkpoint, read_json
from jdetune.checkpoint.manifest import EXCLUDED, Plan, TensorPlan
from jdetune.errors import InputError
from jdetune.result import Recovery
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
      remerge_match: share of elements, a model each, that re-merging gives back.
      seconds: solver time, shared evenly in a group.
      reason: cause and remedy where it is not a plain success.
      base_dtype: dtype of the base written, None if it was left out.
    """

    plan: TensorPlan
    status: str
    recovery: Recovery | None = None
    method: str | None = None
    remerge_match: tuple[float, ...] | None = None
    seconds: float | None = None
    reason: str | None = None
    base_dtype: str | None = None

    @property
    def code(self) -> Status | None:
        """The solver's status, None for tensors it never saw."""
        return None if self.recovery is None else Status(int(self.recovery.status))


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
    found = result.recovery
    stats = {} if found is None else dict(found.stats)
    code = result.code
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
        "noise_rms_expected": number(stats.get("noise_rms_expected")),
        "residual_ratio": number(stats.get("residual_ratio")),
        "rank_gap": number(stats.get("rank_gap")),
        "predicted_error": None if found is None else number(found.predicted_error, floor=-40.0),
        "exact_fraction_est": None if found is None else number(found.exact_fraction),
        "ambiguous_fraction": number(stats.get("ambiguous_fraction")),
        "certain_fraction": None if found is None else _certain(found),
        "amplification": None if found is None else number(found.amplification),
        "verdict": None if found is None else _verdict(found),
        "detection_floor": number(stats.get("detection_floor")),
        "remerge_match": None if result.remerge_match is None else list(result.remerge_match),
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
    solved = [r for r in results if r.status == "recovered" and r.recovery is not None]
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


def read_report(out: str | Path) -> dict[str, Any]:
    """Reads OUT/report.json and checks its schema."""
    path = Path(out) / "report.json"
    if not path.is_file():
        raise InputError(f"{path}: missing. Give the folder that `jdetune recover` wrote.")
    report = read_json(path)
    if report.get("schema") != SCHEMA:
        raise InputError(f"{path}: not a {SCHEMA} report. Recover again with this version.")
    return report


_STATUSES = ("recovered", "identical", "consensus", "per_model", "failed", "skipped")


def _mismatched(result: TensorResult) -> bool:
    """Skipped although nobody asked for it."""
    return result.status == "skipped" and result.plan.reason != EXCLUDED


def _ranks_of(results: Sequence[TensorResult], index: int) -> dict[str, int]:
    solved = (r for r in results if r.status == "recovered")
    return {
        r.plan.name: int(np.ravel(np.asarray(r.recovery.ranks))[index])
        for r in solved
        if r.recovery is not None
    }


def _certain(found: Recovery) -> float | None:
    known = Status(int(found.status)).has_base and number(found.exact_fraction) is not None
    return float(np.mean(np.asarray(found.certain))) if known else None


def _verdict(found: Recovery) -> str | None:
    """The certificate in words; None for solvers without one."""
    status = Status(int(found.status))
    if status.has_base and number(found.exact_fraction) is None:
        return None
    return verdict(status, float(found.exact_fraction), float(found.amplification))


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
