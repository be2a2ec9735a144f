"""Report entries of stacked matrices: one entry a stack, from those of its slices."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: Key of an entry to what is said of all slices together.
_JOINED: Mapping[str, Callable[[Sequence[float]], float]] = {
    "iterations": max,
    "residual_rms": lambda values: math.sqrt(sum(v * v for v in values) / len(values)),
    "noise_rms_expected": lambda values: math.sqrt(sum(v * v for v in values) / len(values)),
    "residual_ratio": max,
    "rank_gap": min,
    "predicted_error": lambda values: _mean_error(values),
    "exact_fraction_est": lambda values: sum(values) / len(values),
    "ambiguous_fraction": lambda values: sum(values) / len(values),
    "certain_fraction": lambda values: sum(values) / len(values),
    "amplification": max,
    "detection_floor": max,
}


def join_entries(entry: dict[str, Any], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A stack's entry of ``tensors``.

    Ranks are each model's largest, ``slices.lowest_ranks`` its smallest. Errors are those of all
    elements together; ratios and floors those of the worst slice.

    Args:
      entry: what is known of the stack as a whole.
      parts: entry of every slice, in order.
    """
    joined = {}
    for key, join in _JOINED.items():
        values = [part[key] for part in parts if part[key] is not None]
        joined[key] = join(values) if len(values) == len(parts) else None
    ranks = [part["ranks"] for part in parts if part["ranks"] is not None]
    whole = entry["status"] == "recovered"
    codes = [part["code"] for part in parts]
    worst = next((part for part in parts if part["code"] != "OK"), None)
    worst = worst or max(parts, key=lambda part: part["amplification"] or 0.0)
    return {
        **entry,
        **joined,
        "ranks": [max(own) for own in zip(*ranks, strict=True)] if whole else None,
        "verdict": worst["verdict"],
        "slices": {
            "count": len(parts),
            "lowest_ranks": [min(own) for own in zip(*ranks, strict=True)] if whole else None,
            "not_ok": [index for index, code in enumerate(codes) if code != "OK"],
        },
    }


def _mean_error(logs: Sequence[float]) -> float:
    """log10 of the mean of errors that are given as log10."""
    return math.log10(sum(10.0**value for value in logs) / len(logs))
