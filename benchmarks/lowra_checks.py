"""What LoWRA Bench has to show here, each beside its target; and what exposes a layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.tables import Check, at_least, at_most
from jdetune.bench import summary
from jdetune.bench.summary import Cell

#: How much worse ours may be in any cell, and how much better it should be for few models.
WORSE, BETTER, FEW = 0.02, 0.5, 5
#: Correlation of loss and W-error.
CORRELATION = 0.99


def gaps(cells: Sequence[Cell]) -> dict[str, Any]:
    """Ours less the paper's solver: by n over cells where both have a base, and cell by cell.

    A cell where ours has no base counts in ``without_base``.
    """
    known: dict[tuple, dict[str, Cell]] = {}
    for cell in cells:
        known.setdefault((cell["layer"], cell["n"], cell["repeat"]), {})[cell["method"]] = cell
    rows, worst, without = [], [], 0
    for (layer, n, repeat), own in known.items():
        if n < 3 or not {"paper", "jdetune"} <= set(own):
            continue
        ours, papers = own["jdetune"]["w_error"], own["paper"]["w_error"]
        without += ours is None
        if ours is not None and papers is not None:
            rows.append((n, repeat, ours - papers))
            worst.append((ours - papers, layer, n, repeat))
    by_n = {}
    for n in sorted({row[0] for row in rows}):
        by_n[n] = float(np.mean([gap for count, _, gap in rows if count == n]))
    worst.sort(reverse=True)
    return {
        "by_n": by_n,
        "cells": len(rows),
        "cells_worse": sum(gap > WORSE for gap, *_ in worst),
        "worst_cells": [
            {"gap": gap, "layer": layer, "n": n, "repeat": repeat}
            for gap, layer, n, repeat in worst[:5]
        ],
        "without_base": without,
    }


def checks(results: Mapping[str, Any]) -> list[Check]:
    """All checks that the results allow.

    Args:
      results: with ``subsets`` by name, each with ``real``, ``gaps``, and where they were made
        ``traces`` and ``whole``.
    """
    found = []
    for name, subset in results["subsets"].items():
        if not subset["real"]:
            continue
        gap = subset["gaps"]
        for n, value in gap["by_n"].items():
            found.append(at_most(f"{name}, n={n}: ours less the paper's, mean", value, WORSE))
            if int(n) <= FEW:
                found.append(at_least(f"{name}, n={n}: better by", -value, BETTER, 2))
        found.append(at_most(f"{name}: single cells worse by {WORSE}", gap["cells_worse"], 0, 0))
        found.append(at_most(f"{name}: cells without a base", gap["without_base"], 0, 0))
        whole = subset.get("whole")
        if whole:
            ours = whole["methods"]["jdetune"]
            what = f"{name}: greedy answers equal to the base's, of {ours['answers']}, n=3"
            found.append(at_least(what, ours["equal"], ours["answers"], 0))
        traces = subset.get("traces")
        if traces:
            effects = traces["effects"]
            for effect in ("speed", "spread", "precision"):
                found.append(
                    Check(
                        f"{name}: rank scheduler, {effect}",
                        _said(effects, effect),
                        "with better than without",
                        effects[effect],
                    )
                )
            for field, what in (("curve", "means over layers"), ("pooled", "single layers pooled")):
                value = traces["correlation"][field]
                found.append(at_least(f"{name}: loss and W-error, {what}", value, CORRELATION))
    return found


def _said(effects: Mapping[str, Any], effect: str) -> str:
    if effect == "speed":
        return f"{effects['median_step_on']:.0f} steps against {effects['median_step_off']:.0f}"
    field = "std" if effect == "spread" else "mean"
    return f"{effects[field + '_on']:.2f} against {effects[field + '_off']:.2f}"


def exposure(cells: Sequence[Cell], noise: Mapping[str, float]) -> dict[str, Any]:
    """What goes with ours' W-error of single layers, as Pearson correlations over cells.

    Args:
      cells: of one subset.
      noise: layer to log10 of the rounding error's variance.
    """
    mean = {
        (c["layer"], c["n"], c["repeat"]): c["w_error"] for c in cells if c["method"] == "mean-lora"
    }
    own = [c for c in cells if c["method"] == "jdetune" and c["w_error"] is not None]
    own = [c for c in own if c.get("predicted_error") is not None]
    if len(own) < 3:
        return {}
    error = np.array([c["w_error"] for c in own])
    features = {
        "predicted error (certificate)": [c["predicted_error"] for c in own],
        "log amplification (certificate)": [np.log10(c["amplification"]) for c in own],
        "rounding error / n": [noise[c["layer"]] - np.log10(c["n"]) for c in own],
        "size of the updates (Mean LoRA's W-error)": [
            mean.get((c["layer"], c["n"], c["repeat"]), np.nan) for c in own
        ],
        "depth": [np.nan if c["depth"] is None else c["depth"] for c in own],
    }
    gap = np.array(features["predicted error (certificate)"]) - error
    return {
        "cells": len(own),
        "correlation": {
            name: _correlation(np.array(values, float), error) for name, values in features.items()
        },
        "predicted_less_true": {
            "median": float(np.median(gap)),
            "largest": float(np.max(np.abs(gap))),
            "within_0.3": float(np.mean(np.abs(gap) <= 0.3)),
        },
        "by_kind": summary.by(own, "kind"),
        "by_depth": summary.by(own, "depth"),
    }


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    if not np.isfinite(x).all() or np.std(x) == 0 or np.std(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])
