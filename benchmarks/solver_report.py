"""Machine, tables, checks, JSON and plot of the solver's benchmark."""

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jdetune
from benchmarks.tables import Check, at_least, at_most, table
from jdetune.cli import huge_pages
from jdetune.machine import cores

HEADER = (
    "case", "closed form, ms", "one layer, ms", "polish, ms", "exact and certificate, ms",
    "these two over the closed form", "paper's, s", "times faster", "of the limit",
    "W-error", "float64", "full", "paper's", "exact", "exact, full", "compile, s",
)  # fmt: skip
#: Times that the closed form should be faster than the paper's solver, by family; of SD 1.5 the
#: largest square shape.
FASTER = {"vit": 150, "sd15": 200, "mistral7b": 1000}
#: W-error that float32 products may cost, beside float64 throughout.
COST = 0.1
#: Refinement, exactness and certificate over the closed form of one layer.
OF_CLOSED_FORM = 10
#: Run time over the limit, for shapes of this side and larger.
OF_LIMIT, SIDE = 2.5, 1024


def machine(torch_threads: int) -> dict[str, Any]:
    """What the figures are measured on, and how busy it was before."""
    model = "unknown processor"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(x for x in lines if x.startswith("model name")).split(":")[1].strip()
    except (OSError, StopIteration):
        pass
    return {
        "device": jax.devices()[0].device_kind,
        "processor": model,
        "cores": cores(),
        "torch_threads": torch_threads,
        "load": os.getloadavg()[0],
        "huge_pages": huge_pages.TUNABLE in os.environ.get("GLIBC_TUNABLES", ""),
        "date": time.strftime("%Y-%m-%d"),
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "jdetune": jdetune.__version__,
    }


def about(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    parts = [
        f"{machine['processor']} ({machine['device']})",
        f"{machine['cores']} cores in JAX, {machine['torch_threads']} in PyTorch",
        f"load {machine['load']:.1f} before",
        *(["huge pages"] if machine.get("huge_pages") else []),
        f"Python {machine['python']}, JAX {machine['jax']}, PyTorch {machine.get('torch', '-')}",
        f"jdetune {machine['jdetune']}, {machine['date']}",
    ]
    return "; ".join(parts)


def figure(row: dict[str, Any], solver: str, key: str = "seconds") -> float | None:
    """One figure of one solver; None if there is none."""
    return row.get("solvers", {}).get(solver, {}).get(key)


def ratio(row: dict[str, Any]) -> float | None:
    """Times that the closed form is faster than the paper's algorithm; None if not measured."""
    ours, paper = figure(row, "closed form"), figure(row, "paper")
    return paper / ours if ours and paper else None


def of_limit(row: dict[str, Any]) -> float | None:
    """Run time of the closed form over the limit."""
    ours = figure(row, "closed form")
    return ours / row["limit"]["seconds"] if ours else None


def after(row: dict[str, Any]) -> tuple[float | None, float | None]:
    """Seconds of the refinement, and of what makes the base exact and certifies it."""
    one, full, polish = (figure(row, name) for name in ("one layer", "full", "polish"))
    rest = full - one - polish if one and full and polish else None
    return polish, rest


def of_closed_form(row: dict[str, Any]) -> float | None:
    """What follows the closed form over the closed form, both of one layer by itself."""
    one, full = figure(row, "one layer"), figure(row, "full")
    return (full - one) / one if one and full else None


def number(value: float | None, digits: int = 2, scale: float = 1.0) -> str:
    """A cell; "-" where nothing was measured."""
    return "-" if value is None else f"{scale * value:.{digits}f}"


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table; one that failed says so."""
    if "error" in row:
        return [f"{row['name']}: FAILED", *["-"] * (len(HEADER) - 1)]
    polish, rest = after(row)
    mark = " (extrapolated)" if row["extrapolated"] else ""
    paper = figure(row, "paper")
    return [
        row["name"],
        number(figure(row, "closed form"), 1, 1e3),
        number(figure(row, "one layer"), 1, 1e3),
        number(polish, 1, 1e3),
        number(rest, 1, 1e3),
        number(of_closed_form(row), 1),
        number(paper, 2) + (mark if paper else ""),
        number(ratio(row), 0),
        number(of_limit(row)),
        *(number(figure(row, s, "w_error")) for s in ("closed form", "float64", "full", "paper")),
        *(number(figure(row, solver, "exact"), 3) for solver in ("closed form", "full")),
        number(figure(row, "closed form", "compile_seconds"), 1),
    ]


def lines(row: dict[str, Any]) -> str:
    """One case in words, as soon as it is measured."""
    if "error" in row:
        return f"\n{row['name']}: FAILED: {row['error']}"
    least = row["limit"]
    found = [
        f"\n{row['name']}, {row['layers']} layers; limit {1e3 * least['seconds']:.2f} ms"
        f" ({least['stream'] / 1e9:.1f} GB/s, {least['gemm'] / 1e9:.0f} GFLOP/s)"
    ]
    for name, entry in row["solvers"].items():
        if "error" in entry:
            found.append(f"  {name:<12} FAILED: {entry['error'].splitlines()[0]}")
            continue
        text = f"  {name:<12} {1e3 * entry['seconds']:10.1f} ms a layer"
        if "spread" in entry:
            low, high = (1e3 * value for value in entry["spread"])
            text += f" ({low:.1f} to {high:.1f}), compile {entry['compile_seconds']:.1f} s"
        if "w_error" in entry:
            text += f", W-error {number(entry['w_error'])}, exact {number(entry['exact'], 3)}"
            text += f", {entry['failed']} failed" if entry["failed"] else ""
        if "step_seconds" in entry:
            steps = ", ".join(f"{rank}: {s:.3f}" for rank, s in entry["step_seconds"].items())
            text += f", extrapolated; s a step by rank {steps}"
        found.append(text)
    return "\n".join(found)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The table of all cases; failures are rows."""
    return "\n" + table(HEADER, [cells(row) for row in rows])


def checks(rows: Sequence[dict[str, Any]]) -> list[Check]:
    """Speed, accuracy and share of the limit against their targets; what failed fails."""
    found = []
    for row in rows:
        name, errors = row["name"], row.get("solvers", {})
        for solver, entry in errors.items():
            if "error" in entry or entry.get("failed"):
                found.append(Check(f"{name}: {solver}", "failed", "a base", solver == "paper"))
        if "error" in row:
            found.append(Check(name, "failed", "a result", False))
            continue
        times, share, rest = ratio(row), of_limit(row), of_closed_form(row)
        largest = row["family"] != "sd15" or row["row"] == row["col"] == 1280
        if times is not None and row["family"] in FASTER and largest:
            found.append(at_least(f"{name}: times faster", times, FASTER[row["family"]], 0))
        if share is not None and min(row["row"], row["col"]) >= SIDE:
            found.append(at_most(f"{name}: of the limit", share, OF_LIMIT, 2))
        if rest is not None and row["family"] in FASTER:
            what = f"{name}: all that follows over the closed form"
            found.append(at_most(what, rest, OF_CLOSED_FORM, 1))
        ours = figure(row, "closed form", "w_error")
        for other, more in (("float64", COST), ("paper", 0.0)):
            theirs = figure(row, other, "w_error")
            if ours is not None and theirs is not None:
                found.append(at_most(f"{name}: W-error less {other}'s", ours - theirs, more, 2))
    return found


def save(result: dict[str, Any], path: Path) -> None:
    """Writes the JSON; what is not finite is null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(result), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(result: dict[str, Any], path: Path) -> None:
    """Seconds of the solvers beside the limit, case by case; scaling curves if there are any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if "solvers" in row]
    curves = sorted({row["family"] for row in rows if row["family"].startswith("scaling")})
    bars = [row for row in rows if row["family"] not in curves]
    panels = len(curves) + bool(bars)
    if not panels:
        return
    across = min(panels, 2)
    down = -(-panels // across)
    size = (6.5 * across, max(4.2, 0.5 * len(bars) + 1.5) * down)
    figure, axes = pyplot.subplots(down, across, figsize=size, constrained_layout=True)
    places = iter(np.ravel(axes))
    if bars:
        _bars(next(places), bars)
    for family in curves:
        _curve(next(places), [row for row in rows if row["family"] == family], family)
    for unused in places:
        unused.set_axis_off()
    figure.suptitle(about(result["machine"]).replace("; Python", ";\nPython"), fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    kinds = {"closed form": "tab:blue", "full": "tab:green", "paper": "tab:red"}
    for shift, (kind, colour) in enumerate(kinds.items()):
        known = [(i + 0.25 * (shift - 1), figure(row, kind)) for i, row in enumerate(rows)]
        known = [(place, seconds) for place, seconds in known if seconds]
        if known:
            axis.barh(*zip(*known, strict=True), 0.25, color=colour, label=kind)
    for i, row in enumerate(rows):
        least, label = row["limit"]["seconds"], "limit" if i == 0 else None
        axis.plot([least, least], [i - 0.42, i + 0.42], "k-", linewidth=2, label=label)
    names = [row["name"] + (" *" if row["extrapolated"] else "") for row in rows]
    axis.set_yticks(range(len(rows)), [n.replace(" float32", "") for n in names], fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.grid(axis="x", alpha=0.25)
    axis.set_xlabel("seconds a layer (* paper's extrapolated)")
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)


def _curve(axis: Any, rows: Sequence[dict[str, Any]], family: str) -> None:
    key = {"scaling-n": "n_models", "scaling-rank": "rank", "scaling-size": "row"}[family]
    x = np.array([row[key] for row in rows], float)
    for kind, colour in (("closed form", "tab:blue"), ("paper", "tab:red")):
        y = np.array([figure(row, kind) or np.nan for row in rows])
        good = np.isfinite(y)
        if good.sum() < 2:
            continue
        slope = np.polyfit(np.log(x[good]), np.log(y[good]), 1)[0]
        note = ", extrapolated" if kind == "paper" else ""
        axis.loglog(x, y, "o-", color=colour, label=f"{kind}{note}: exponent {slope:.2f}")
    axis.loglog(x, [row["limit"]["seconds"] for row in rows], "k--", label="limit")
    axis.set_xticks(x, [f"{value:.0f}" for value in x])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    fixed = {"n_models": "models", "rank": "rank", "row": "rows = columns"}
    axis.set(xlabel=fixed[key], ylabel="seconds a layer", title=_fixed(rows[0], key))
    axis.legend(fontsize=8)


def _fixed(row: dict[str, Any], varied: str) -> str:
    """What a curve holds fixed."""
    said = {"row": f"{row['row']}x{row['col']}", "n_models": f"n={row['n_models']}"}
    said["rank"] = f"r={row['rank']}"
    return ", ".join(text for key, text in said.items() if key != varied)
