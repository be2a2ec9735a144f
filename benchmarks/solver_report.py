"""Tables, plot and README block of the solver's benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import table

HEADER = (
    "case",
    "closed form, ms",
    "times faster than the paper",
    "of the limit",
    "W-error",
    "float64",
    "paper's",
    "exact",
    "compile, s",
)


def about(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    return (
        f"{machine['processor']} ({machine['device']}), {machine['cores']} cores, "
        f"{machine['torch_threads']} threads in PyTorch; Python {machine['python']}, "
        f"JAX {machine['jax']}, PyTorch {machine['torch']}, jdetune {machine['jdetune']}"
    )


def ratio(row: dict[str, Any]) -> float | None:
    """Times that the closed form is faster than the paper's algorithm; None if not measured."""
    entries = row.get("solvers", {})
    ours, paper = (entries.get(name, {}).get("seconds") for name in ("closed form", "paper"))
    return paper / ours if ours and paper else None


def of_limit(row: dict[str, Any]) -> float | None:
    """Run time of the closed form over the limit."""
    ours = row.get("solvers", {}).get("closed form", {}).get("seconds")
    return ours / row["limit"]["seconds"] if ours else None


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    entries = row.get("solvers", {})
    ours, exact, paper = (entries.get(n, {}) for n in ("closed form", "float64", "paper"))
    seconds, times = ours.get("seconds"), ratio(row)
    note = " (extrapolated)" if row.get("extrapolated") and times else ""
    return [
        row["name"],
        _number(None if seconds is None else 1000 * seconds, 1),
        ("-" if times is None else f"{times:.0f}") + note,
        _number(of_limit(row)),
        _number(ours.get("w_error")),
        _number(exact.get("w_error")),
        _number(paper.get("w_error")),
        _number(ours.get("exact"), 3),
        _number(ours.get("compile_seconds"), 1),
    ]


def lines(row: dict[str, Any]) -> str:
    """One case in words, as soon as it is measured."""
    if "error" in row:
        return f"\n{row['name']}: FAILED: {row['error']}"
    found = [
        f"\n{row['name']}, {row['layers']} layers; limit {1000 * row['limit']['seconds']:.1f} ms"
    ]
    found[0] += (
        f" ({row['limit']['stream'] / 1e9:.1f} GB/s, {row['limit']['gemm'] / 1e9:.0f} GFLOP/s)"
    )
    for name, entry in row["solvers"].items():
        if "error" in entry:
            found.append(f"  {name:<12} FAILED: {entry['error'].splitlines()[0]}")
            continue
        text = f"  {name:<12} {1000 * entry['seconds']:10.1f} ms a layer"
        if "spread" in entry:
            low, high = (1000 * value for value in entry["spread"])
            text += f" ({low:.1f} to {high:.1f}), W-error {entry['w_error']:.2f}"
            text += f", exact {entry['exact']:.3f}, compile {entry['compile_seconds']:.1f} s"
        else:
            text += (
                f", extrapolated: {entry['first']:.3f} s a step at rank 1, {entry['last']:.3f} s"
            )
        found.append(text)
    times, share, after = ratio(row), of_limit(row), _after(row)
    if times is not None:
        found.append(f"  {times:.0f} times faster than the paper's algorithm")
    if share is not None:
        found.append(f"  {share:.2f} times the limit")
    if after is not None:
        found.append(f"  refinement, exactness and certificate: {after:.1f} times the closed form")
    return "\n".join(found)


def _after(row: dict[str, Any]) -> float | None:
    """What follows the closed form, over the closed form."""
    full = row["solvers"].get("full", {}).get("seconds")
    ours = row["solvers"].get("closed form", {}).get("seconds")
    return full / ours - 1 if full and ours else None


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The table of all cases; failures are rows."""
    return "\n" + table(HEADER, [cells(row) for row in rows])


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
    figure, axes = pyplot.subplots(1, panels, figsize=(5.5 * panels, 4.5), squeeze=False)
    places = iter(axes[0])
    if bars:
        _bars(next(places), bars)
    for family in curves:
        _curve(next(places), [row for row in rows if row["family"] == family], family)
    figure.suptitle(about(result["machine"]), fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    kinds = {"closed form": "tab:blue", "full": "tab:green", "paper": "tab:red"}
    for shift, (kind, colour) in enumerate(kinds.items()):
        here = [(i, row["solvers"].get(kind, {}).get("seconds")) for i, row in enumerate(rows)]
        known = [(i + 0.25 * (shift - 1), s) for i, s in here if s]
        axis.barh([i for i, _ in known], [s for _, s in known], 0.25, color=colour, label=kind)
    for i, row in enumerate(rows):
        least = row["limit"]["seconds"]
        axis.plot([least, least], [i - 0.4, i + 0.4], "k-", label="limit" if i == 0 else None)
    axis.set_yticks(range(len(rows)), [row["name"].replace(" float32", "") for row in rows])
    axis.tick_params(axis="y", labelsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("seconds a layer")
    axis.legend(fontsize=7)


def _curve(axis: Any, rows: Sequence[dict[str, Any]], family: str) -> None:
    key = {"scaling-n": "n_models", "scaling-rank": "rank", "scaling-size": "row"}[family]
    x = np.array([row[key] for row in rows], float)
    for kind, colour in (("closed form", "tab:blue"), ("paper", "tab:red")):
        y = np.array([row["solvers"].get(kind, {}).get("seconds") or np.nan for row in rows])
        good = np.isfinite(y)
        if good.sum() < 2:
            continue
        slope = np.polyfit(np.log(x[good]), np.log(y[good]), 1)[0]
        axis.loglog(x, y, "o-", color=colour, label=f"{kind}, slope {slope:.1f}")
    axis.loglog(x, [row["limit"]["seconds"] for row in rows], "k--", label="limit")
    axis.set_xticks(x, [f"{value:.0f}" for value in x])
    axis.minorticks_off()
    axis.set_xlabel({"n_models": "models", "rank": "rank", "row": "rows = columns"}[key])
    axis.set_ylabel("seconds a layer")
    axis.legend(fontsize=7)
