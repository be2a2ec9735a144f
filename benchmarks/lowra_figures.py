"""The paper's figures from the results, each a PNG and a JSON of what it shows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdetune.bench import figures, summary
from jdetune.bench.methods import TITLES
from jdetune.checkpoint.writer import save_json

Results = Mapping[str, Any]
#: Lines and their colours for the rank scheduler.
_ON, _OFF = "#0072B2", "#D55E00"
_METRICS = {
    "log_cosine": "SBERT log10(1 - cosine)",
    "activation_distance": "activation distance",
}


def draw(results: Results, keys: Sequence[str], out: Path) -> dict[str, list[str]]:
    """Draws the figures named, as far as the results have what they show.

    Args:
      results: of `benchmarks.lowra`.
      keys: of `FIGURES`.
      out: folder.

    Returns:
      Key to the names of its files.
    """
    made = {}
    for key in keys:
        files = []
        for name, title, data, paint, grid in FIGURES[key](results):
            with figures.canvas(out / f"{name}.png", *grid) as axes:
                paint(axes)
            save_json(out / f"{name}.json", {"figure": key, "title": title, "data": data})
            files.append(f"{name}.png")
        if files:
            made[key] = files
    return made


Figure = tuple[str, str, Any, Callable[[Any], None], tuple]


def _subsets(results: Results, field: str = "rows") -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, s) for name, s in results["subsets"].items() if s.get(field)]


def _grid(count: int) -> tuple[int, int]:
    cols = min(3, count)
    return -(-count // cols), cols


def _panels(axes: Any, count: int) -> list[Any]:
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_axis_off()
    return flat[:count]


def _histograms(results: Results) -> Iterator[Figure]:
    """Figure 4: W-errors of single layers."""
    chosen = _subsets(results)
    if not chosen:
        return
    shown = {}
    for name, subset in chosen:
        counts = sorted({c["n"] for c in subset["cells"]})
        n = 5 if 5 in counts else counts[-1]
        own = [c for c in subset["cells"] if c["n"] == n]
        shown[name] = (f"{subset['title']}, n = {n}", own)

    def paint(axes: Any) -> None:
        for axis, (title, own) in zip(_panels(axes, len(shown)), shown.values(), strict=True):
            figures.histogram(axis, own, title)

    data = {
        name: {m: [c["w_error"] for c in own if c["method"] == m] for m in TITLES}
        for name, (_, own) in shown.items()
    }
    yield "fig4_layers", "W-errors of single layers", data, paint, _grid(len(shown))


def _convergence(results: Results) -> Iterator[Figure]:
    """Figure 5: W-error by step, with and without the scheduler; mean and deviation over layers."""
    chosen = _subsets(results, "traces")
    if not chosen:
        return

    def paint(axes: Any) -> None:
        for axis, (_, subset) in zip(_panels(axes, len(chosen)), chosen, strict=True):
            for label, field, colour in (
                ("with rank scheduler", "on", _ON),
                ("without", "off", _OFF),
            ):
                errors = np.array([t["errors"] for t in subset["traces"][field]])
                steps = np.arange(1, errors.shape[1] + 1)
                mean, spread = errors.mean(0), errors.std(0)
                axis.plot(steps, mean, color=colour, label=label)
                axis.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2)
            ours = subset["traces"]["ours"]
            axis.axhline(ours, color="#009E73", linestyle="--", label="jdetune (no steps)")
            axis.set(title=_about(subset), xlabel="step", ylabel="W-error (log10 MSE)")
            axis.legend(fontsize=8)

    data = {
        name: {f: [t["errors"] for t in s["traces"][f]] for f in ("on", "off")}
        | {"ours": s["traces"]["ours"]}
        for name, s in chosen
    }
    title = "Convergence with and without the rank scheduler, float32 as published"
    yield "fig5_scheduler", title, data, paint, _grid(len(chosen))


def _about(subset: Mapping[str, Any]) -> str:
    return f"{subset['title']}, n = {subset['traces']['n']}"


def _cumulative(results: Results) -> Iterator[Figure]:
    """Figure 6: share of layers whose last W-error is at or below a value."""
    chosen = _subsets(results, "traces")
    if not chosen:
        return

    def ends(subset: Mapping[str, Any]) -> dict[str, list[float]]:
        traces = subset["traces"]
        return {
            "with rank scheduler": sorted(t["errors"][-1] for t in traces["on"]),
            "without": sorted(t["errors"][-1] for t in traces["off"]),
            "jdetune": sorted(traces["ours_layers"]),
        }

    def paint(axes: Any) -> None:
        for axis, (_, subset) in zip(_panels(axes, len(chosen)), chosen, strict=True):
            for (label, last), colour in zip(
                ends(subset).items(), (_ON, _OFF, "#009E73"), strict=True
            ):
                if not last:
                    continue
                share = np.arange(1, len(last) + 1) / len(last)
                axis.step([last[0], *last], [0.0, *share], where="post", color=colour, label=label)
            axis.set(title=_about(subset), xlabel="W-error (log10 MSE)", ylabel="share of layers")
            axis.legend(fontsize=8)

    data = {name: ends(subset) for name, subset in chosen}
    yield "fig6_cumulative", "Cumulative share of layers", data, paint, _grid(len(chosen))


def _counts(results: Results) -> Iterator[Figure]:
    """Figure 7: number of models against W-error."""
    chosen = _subsets(results)
    if not chosen:
        return

    def paint(axes: Any) -> None:
        for axis, (_, subset) in zip(_panels(axes, len(chosen)), chosen, strict=True):
            figures.by_count(axis, subset["rows"], subset["title"])

    data = {name: subset["rows"] for name, subset in chosen}
    yield "fig7_models", "Number of models against W-error", data, paint, _grid(len(chosen))


def _counts_and_meaning(results: Results) -> Iterator[Figure]:
    """Figures 8 to 11: number of models against W-error and semantic metric, a subset each."""
    for name, subset in _subsets(results, "sampled"):
        metric = next(m for m in _METRICS if m in subset["sampled"][0])

        def paint(axes: Any, subset=subset, metric=metric) -> None:
            left, right = axes.flat
            figures.by_count(left, subset["rows"], subset["title"])
            for method, own in summary.split(subset["sampled"], lambda r: r["method"]).items():
                line = [(row["n"], max(row[metric], 1e-9)) for row in own]
                right.plot(*zip(*line, strict=True), **figures.style(method))
            if metric == "activation_distance":
                right.set_yscale("log")
            right.set(
                title="sampled layers replaced",
                xlabel="number of models n",
                ylabel=_METRICS[metric],
            )
            right.legend(fontsize=8)

        data = {"rows": subset["rows"], "sampled": subset["sampled"]}
        title = f"{subset['title']}: number of models against W-error and {_METRICS[metric]}"
        yield f"fig8_11_{name}", title, data, paint, (1, 2)


def _losses(results: Results) -> Iterator[Figure]:
    """Figure 12: loss of the paper's solver against its W-error, every step of every layer."""
    chosen = _subsets(results, "traces")
    if not chosen:
        return

    def paint(axes: Any) -> None:
        for axis, (_, subset) in zip(_panels(axes, len(chosen)), chosen, strict=True):
            for trace in subset["traces"]["on"]:
                axis.plot(
                    np.log10(np.maximum(trace["losses"], 1e-40)),
                    trace["errors"],
                    ".",
                    markersize=3,
                    alpha=0.5,
                )
            found = subset["traces"]["correlation"]
            said = f"r = {found['curve']:.4f} of means over layers, {found['pooled']:.4f} pooled"
            axis.set(
                title=f"{_about(subset)}\n{said}",
                xlabel="log10 loss",
                ylabel="W-error (log10 MSE)",
            )

    data = {
        name: {
            "correlation": s["traces"]["correlation"],
            "points": [{"losses": t["losses"], "errors": t["errors"]} for t in s["traces"]["on"]],
        }
        for name, s in chosen
    }
    yield "fig12_loss", "Loss against W-error, Spectral DeTuning", data, paint, _grid(len(chosen))


def _meaning(results: Results) -> Iterator[Figure]:
    """Figure 13: semantic metric against W-error, a point for every n and method."""
    chosen = _subsets(results, "sampled")
    if not chosen:
        return

    def points(subset: Mapping[str, Any]) -> list[dict[str, Any]]:
        metric = next(m for m in _METRICS if m in subset["sampled"][0])
        error = {(r["n"], r["method"]): r["w_error"] for r in subset["rows"]}
        return [
            {
                "method": row["method"],
                "n": row["n"],
                "w_error": error[row["n"], row["method"]],
                "metric": metric,
                "value": row[metric],
            }
            for row in subset["sampled"]
            if error.get((row["n"], row["method"])) is not None
        ]

    def paint(axes: Any) -> None:
        for axis, (_, subset) in zip(_panels(axes, len(chosen)), chosen, strict=True):
            metric = next(m for m in _METRICS if m in subset["sampled"][0])
            for method, own in summary.split(points(subset), lambda p: p["method"]).items():
                values = [p["value"] for p in own]
                if metric == "activation_distance":
                    values = [max(value, 1e-9) for value in values]  # zero has no place on it
                axis.plot(
                    [p["w_error"] for p in own], values, linestyle="", **figures.style(method)
                )
            if metric == "activation_distance":
                axis.set_yscale("log")
            axis.set(title=subset["title"], xlabel="W-error (log10 MSE)", ylabel=_METRICS[metric])
            axis.legend(fontsize=8)

    data = {name: points(subset) for name, subset in chosen}
    yield "fig13_meaning", "Semantic metric against W-error", data, paint, _grid(len(chosen))


def _exposure(results: Results) -> Iterator[Figure]:
    """Beyond the paper: W-error as predicted without the base, and over depth by type."""
    chosen = _subsets(results)
    if not chosen:
        return

    def paint(axes: Any) -> None:
        for axis, (_, subset) in zip(_panels(axes, len(chosen)), chosen, strict=True):
            figures.predicted(axis, subset["cells"], subset["title"])

    def depth(axes: Any) -> None:
        for axis, (_, subset) in zip(_panels(axes, len(chosen)), chosen, strict=True):
            figures.by_depth(axis, subset["cells"], "jdetune", f"{subset['title']}, jdetune, all n")

    data = {name: subset["exposure"] for name, subset in chosen}
    yield "exposure_predicted", "Predicted error against W-error", data, paint, _grid(len(chosen))
    yield "exposure_depth", "W-error over depth", data, depth, _grid(len(chosen))


def _runtime(results: Results) -> Iterator[Figure]:
    """Seconds of a layer by n."""
    chosen = _subsets(results)
    if not chosen:
        return

    def paint(axes: Any) -> None:
        for axis, (_, subset) in zip(_panels(axes, len(chosen)), chosen, strict=True):
            for method in ("paper", "jdetune"):
                own = [r for r in subset["rows"] if r["method"] == method and r["seconds"]]
                axis.plot(
                    [r["n"] for r in own], [r["seconds"] for r in own], **figures.style(method)
                )
            axis.set(
                title=subset["title"],
                xlabel="number of models n",
                ylabel="seconds a layer",
                yscale="log",
            )
            axis.legend(fontsize=8)

    data = {
        name: {"rows": [[r["method"], r["n"], r["seconds"]] for r in s["rows"]],
               "runtime": s.get("runtime")}
        for name, s in chosen
    }  # fmt: skip
    yield "runtime", "Seconds a layer, warm", data, paint, _grid(len(chosen))


FIGURES: dict[str, Callable[[Results], Iterator[Figure]]] = {
    "fig4": _histograms,
    "fig5": _convergence,
    "fig6": _cumulative,
    "fig7": _counts,
    "fig8": _counts_and_meaning,
    "fig12": _losses,
    "fig13": _meaning,
    "exposure": _exposure,
    "runtime": _runtime,
}
