"""Checks what a recovery wrote: against a reference base, and by merging the adapters again."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdetune import metrics
from jdetune.checkpoint.adapter_formats import read_as
from jdetune.checkpoint.adapter_reader import Adapter, LoraUpdate, merge_peft
from jdetune.checkpoint.aliases import align_names
from jdetune.checkpoint.alignment import align
from jdetune.checkpoint.index import FLOATS, Checkpoint, TensorInfo, open_checkpoint
from jdetune.checkpoint.reader import raw_bytes, read_tensor
from jdetune.checkpoint.shapes import matrices, units, view_of
from jdetune.checkpoint.ties import is_tied, tie_pairs, with_ties
from jdetune.errors import InputError
from jdetune.report import read_report, source_text

#: Greatest miss of a re-merged element, in units of the rounding noise around it (``noise_unit``).
#: Real recoveries (MiniLM, rank 16, 5 models) miss by 6.5 units at most in 9 million elements:
#: errors of base and update have long tails where both are small. A factor that is wrong by 0.1%
#: misses by thousands.
REMERGE_TOLERANCE = 16.0

Progress = Callable[[str, int, int], None]


def verify(
    out: Path,
    reference: str | Path | None = None,
    models: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compares a recovery with a reference, with the merged models, or with both.

    Args:
      out: folder that ``jdetune recover`` wrote.
      reference: folder of the true base.
      models: merged models in the report's order; the report's own paths if left out. Models that
        are gone are passed over if there is a reference, else they are an error.
      progress: told of every model.

    Returns:
      ``reference``, ``w_error``, ``exact_fraction``, ``ulp``, ``tensors`` (one entry a recovered
      matrix), ``copied``, ``copied_equal``, ``missing``, ``not_in_models`` (tensors of the
      reference that no merged model has, such as buffers that newer versions do not save),
      ``passed_over`` (tensors that the report lists as skipped or failed), ``models`` and
      ``failures``; ready for JSON.

    Raises:
      InputError: there is nothing to compare with, or no reference and a merged model is gone.
    """
    report = read_report(out)
    if not report["summary"]["base_written"]:
        raise InputError(f"{out}: no base was written, so there is nothing to verify.")
    base = open_checkpoint(out / "base")
    by_status: dict[str, list[str]] = {}
    for tensor in report["tensors"]:
        by_status.setdefault(tensor["status"], []).append(tensor["name"])
    recovered = by_status.get("recovered", [])
    passed_over = {*by_status.get("skipped", ()), *by_status.get("failed", ())}
    merged = _find_models(report, models, reference is not None)
    result: dict[str, Any] = {"out": str(out), "reference": None, "failures": []}
    result |= {"tensors": [], "w_error": None, "exact_fraction": None, "ulp": None}
    result |= {"copied": 0, "copied_equal": 0, "missing": [], "not_in_models": []}
    result["passed_over"] = sorted(passed_over)
    if reference is not None:
        known = passed_over | set(by_status.get("per_model", ()))
        ours, truth = align([base, open_checkpoint(reference)]).checkpoints
        compared, differing = compare_base(ours, truth, recovered, known)
        listed = {name for names in by_status.values() for name in names}
        foreign = [name for name in compared["missing"] if name not in listed]
        compared["missing"] = [name for name in compared["missing"] if name in listed]
        result |= {**compared, "not_in_models": foreign}
        result["reference"] = str(reference)
        result["failures"] += [
            *(f"{name}: in the reference, but not in the base" for name in compared["missing"]),
            *(f"{name}: copied, but not equal to the reference" for name in differing),
        ]
        if recovered and not compared["tensors"]:
            result["failures"].append("no recovered matrix was compared with the reference")
    result["models"] = []
    for done, (name, path) in enumerate(merged.items()):
        adapter = read_as(out / "adapters" / name, base)
        _, model = align_names([base, open_checkpoint(path)])[0]
        entry = {"name": name, **remerge(base, adapter, model, passed_over)}
        result["models"].append(entry)
        if progress is not None:
            progress("re-merge", done + 1, len(merged))
        result["failures"] += [
            f"{name}: {tensor} is not given back by the merge" for tensor in entry["off"]
        ]
    if not (result["tensors"] or result["copied"] or any(m["tensors"] for m in result["models"])):
        result["failures"].append("nothing was compared")
    return result


def compare_base(
    base: Checkpoint, reference: Checkpoint, recovered: Sequence[str], absent: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Figures of every recovered matrix, and how many of the other tensors are equal.

    Args:
      base: what was recovered.
      reference: the truth.
      recovered: names of the recovered matrices.
      absent: names that the base may lack.

    Returns:
      The figures, and the names of copied tensors that are not equal.
    """
    names = [n for n in recovered if n in base.tensors and n in reference.tensors]
    rows = [_compare(name, base, reference) for name in names]
    others = [n for n in base.tensors if n not in recovered and n in reference.tensors]
    differing = [n for n in others if not _same(read_tensor(base, n), read_tensor(reference, n))]
    sizes = [int(np.prod(base.tensors[name].shape)) for name in names]
    exact = sum(row["exact_fraction"] * size for row, size in zip(rows, sizes, strict=True))
    ulps: dict[str, int] = {}
    for row in rows:
        for key, count in row["ulp"].items():
            ulps[key] = ulps.get(key, 0) + count
    missing = [n for n in reference.tensors if n not in base.tensors and n not in absent]
    figures = {
        "tensors": rows,
        "w_error": float(np.mean([row["w_error"] for row in rows])) if rows else None,
        "exact_fraction": exact / sum(sizes) if rows else None,
        "ulp": ulps if rows else None,
        "copied": len(others),
        "copied_equal": len(others) - len(differing),
        "missing": missing,
    }
    return figures, differing


def remerge(
    base: Checkpoint, adapter: Adapter, merged: Checkpoint, passed_over: Collection[str] = ()
) -> dict[str, Any]:
    """Merges an adapter into the recovered base and compares with the model it came from.

    Args:
      base: what was recovered.
      adapter: one model's.
      merged: that model.
      passed_over: names that are not compared.

    Returns:
      ``tensors`` (how many were compared),
      ``equal_fraction`` over the matrices with factors, ``worst`` (greatest miss over the
      tolerance of ``REMERGE_TOLERANCE`` noise units), ``max_ulp`` and the names that are ``off``.
    """
    equal = total = max_ulp = n_tensors = 0
    worst = 0.0
    off = []
    ties = tie_pairs([base, merged])
    base = with_ties(base, ties)
    for name, info in merged.tensors.items():
        if name in passed_over:
            continue
        n_tensors += 1
        target = read_tensor(merged, name)
        own = _stored_for(name, base, adapter, ties)
        again = _again(own, base, adapter, target.dtype)
        if again is None:
            off.append(name)
            continue
        if again.shape != target.shape:
            off.append(name)
        elif info.dtype not in FLOATS or not _updates_of(
            dataclasses.replace(info, name=own), adapter
        ):
            if not _same(again, target) and not _is_near(again, target, info):
                off.append(name)
        else:
            again = again.astype(target.dtype)
            ulps = metrics.ulp_distance(again, target)
            equal, total = equal + int(np.sum(ulps == 0)), total + target.size
            max_ulp = max(max_ulp, int(np.max(ulps)))
            miss = _miss(again, target, info)
            worst = max(worst, miss)
            if not miss <= 1.0:
                off.append(name)
    return {
        "tensors": n_tensors,
        "equal_fraction": equal / total if total else 1.0,
        "worst": worst if np.isfinite(worst) else None,
        "max_ulp": max_ulp,
        "off": off,
    }


def noise_unit(weights: np.ndarray) -> np.ndarray:
    """Size of rounding errors around every element, float64, [row, col].

    Half an ulp of the element, or the rms rounding error of its row or column if that is larger:
    a small element's low bits are lost in the sums with its neighbours' errors.
    """
    info = np.finfo(np.float32) if weights.dtype == np.float32 else _finfo(weights.dtype)
    magnitude = np.maximum(np.abs(weights.astype(np.float64)), float(info.smallest_normal))
    _, exponent = np.frexp(magnitude)
    ulp = np.ldexp(float(info.eps), exponent - 1)
    rows = np.sqrt(np.mean(ulp**2, axis=1, keepdims=True) / 12)
    cols = np.sqrt(np.mean(ulp**2, axis=0, keepdims=True) / 12)
    return np.maximum(ulp / 2, np.maximum(rows, cols))


def _miss(again: np.ndarray, target: np.ndarray, info: TensorInfo) -> float:
    """Greatest miss of a tensor's matrices."""
    view = view_of(info)
    assert view is not None
    pairs = zip(matrices(again, view), matrices(target, view), strict=True)
    return max(_matrix_miss(ours, theirs) for ours, theirs in pairs)


def _matrix_miss(again: np.ndarray, target: np.ndarray) -> float:
    finite = np.isfinite(target.astype(np.float32))  # a damaged model cannot be given back there
    target = np.where(finite, target, again)
    error = np.abs(again.astype(np.float64) - target.astype(np.float64))
    return float(np.max(error / noise_unit(target))) / REMERGE_TOLERANCE


def _is_near(again: np.ndarray, target: np.ndarray, info: TensorInfo) -> bool:
    """A matrix that this model did not change (rank 0) is the recovered base up to rounding."""
    if view_of(info) is None or str(again.dtype) not in FLOATS:
        return False
    return _miss(again.astype(target.dtype), target, info) <= 1.0


def _stored_for(name: str, base: Checkpoint, adapter: Adapter, ties: Mapping[str, str]) -> str:
    """The tensor whose merge gives another: the embedding's, for a head that is tied to it."""
    given = name in adapter.saved or name in adapter.updates
    return ties[name] if name in ties and is_tied(base.config) and not given else name


def _updates_of(info: TensorInfo, adapter: Adapter) -> dict[int, LoraUpdate]:
    """Updates of a tensor's matrices, by place."""
    found = enumerate(adapter.updates.get(unit) for unit in units(info))
    return {index: update for index, update in found if update is not None}


def _again(name: str, base: Checkpoint, adapter: Adapter, dtype: np.dtype) -> np.ndarray | None:
    if name in adapter.saved:
        return adapter.saved[name]
    if name not in base.tensors:
        return None
    info, weights = base.tensors[name], read_tensor(base, name)
    updates, view = _updates_of(info, adapter), view_of(info)
    if view is None or not updates:
        floats = {str(weights.dtype), str(dtype)} <= set(FLOATS)
        return weights.astype(dtype) if floats else weights
    merged = matrices(weights, view).astype(dtype)
    for index, update in updates.items():
        base_matrix = matrices(weights, view)[index]
        merged[index] = merge_peft(base_matrix, update.left, update.right, update.scaling, dtype)
    return merged.reshape(weights.shape)


def _compare(name: str, base: Checkpoint, reference: Checkpoint) -> dict[str, Any]:
    ours, truth = read_tensor(base, name), read_tensor(reference, name)
    if ours.shape != truth.shape:
        raise InputError(
            f"{reference.root}: tensor {name} has shape {truth.shape}, the recovered one "
            f"{ours.shape}. Give the base of these models."
        )
    if ours.dtype != truth.dtype:
        ours, truth = ours.astype(np.float32), truth.astype(np.float32)
    return {
        "name": name,
        "shape": list(ours.shape),
        "w_error": metrics.log_mse(ours, truth),
        "exact_fraction": metrics.exact_fraction(ours, truth),
        "ulp": metrics.ulp_histogram(ours, truth),
        "cosine": _finite(metrics.cosine(ours, truth)),
    }


def _find_models(
    report: Mapping[str, Any], given: Sequence[str | Path] | None, optional: bool
) -> dict[str, str | Path]:
    entries = [
        entry
        for entry in report["inputs"]
        if entry["duplicate_of"] is None and entry.get("left_out") is None
    ]
    if report.get("adapter_format") == "none":
        if not optional:
            raise InputError(
                "the recovery wrote no adapters (--adapter_format=none), so no model can be merged "
                "again. Give --reference."
            )
        return {}
    if given is not None:
        if len(given) != len(entries):
            names = ", ".join(entry["name"] for entry in entries)
            raise InputError(
                f"--models names {len(given)} models, the report {len(entries)} ({names}). Give "
                "them all, in this order."
            )
        return {entry["name"]: path for entry, path in zip(entries, given, strict=True)}
    present: dict[str, str | Path] = {
        entry["name"]: source_text(entry)
        for entry in entries
        if entry.get("revision") or Path(entry["path"]).exists()
    }
    gone = [entry["path"] for entry in entries if entry["name"] not in present]
    if gone and not optional:
        raise InputError(
            f"merged models are no longer where report.json says ({', '.join(gone)}). Give "
            "--models or --reference."
        )
    return present


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    kind = first.dtype == second.dtype and first.shape == second.shape
    return kind and np.array_equal(raw_bytes(first), raw_bytes(second))


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _finfo(dtype: np.dtype) -> Any:
    import ml_dtypes

    return ml_dtypes.finfo(dtype)
