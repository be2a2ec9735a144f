"""The picture of the calibration: predicted against true error, and exact fractions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from benchmarks.calibration import Point

#: log10 MSE that stands for everything at or below it: exact layers.
LEAST = -25.0
BAND = 0.3
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}


def draw(points: Sequence["Point"], path: Path) -> None:
    """Writes the picture.

    Args:
      points: all layers; those without a base are left out.
      path: where to; the ending says the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    known = [p for p in points if p.score.has_base]
    groups = list(dict.fromkeys(p.group for p in known))
    palette = plt.get_cmap("tab10")
    colours = {group: palette(i % 10) for i, group in enumerate(groups)}
    figure = plt.figure(figsize=(13, 7.2), constrained_layout=True)
    left, right = np.ravel(np.array(figure.subfigures(1, 2, width_ratios=[1.15, 1])))
    above, below = left.subplots(2, 1, sharex=True, height_ratios=[1.6, 1])
    _errors(above, known, colours)
    _differences(below, known, colours)
    _fractions(right.subplots(), known, colours)
    _legend(right, groups, colours, known)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _scatter(axes: Any, points: Sequence["Point"], colours: dict, x: Any, y: Any) -> None:
    for p in points:
        colour = colours[p.group]
        axes.scatter(
            x(p), y(p), s=26, marker=MARKERS[p.dtype], linewidths=1.1,
            facecolors="none" if p.held_out else [(*colour[:3], 0.55)], edgecolors=[colour],
        )  # fmt: skip


def _true(p: "Point") -> float:
    return max(p.score.error, LEAST)


def _predicted(p: "Point") -> float:
    return max(p.score.predicted, LEAST)


def _errors(axes: Any, points: Sequence["Point"], colours: dict) -> None:
    ends = np.array([LEAST - 0.7, max(max(_true(p), _predicted(p)) for p in points) + 0.7])
    axes.fill_between(ends, ends - BAND, ends + BAND, color="0.85", label=f"within {BAND}")
    axes.plot(ends, ends, color="0.4", linewidth=1)
    _scatter(axes, points, colours, _true, _predicted)
    axes.set(xlim=ends, ylim=ends, ylabel="predicted log10 MSE")
    axes.set_title("Error of the base: predicted without the truth, against the truth")
    axes.text(LEAST, LEAST + 1.1, "exact", ha="center", fontsize=9, color="0.3")
    axes.grid(alpha=0.25)


def _differences(axes: Any, points: Sequence["Point"], colours: dict) -> None:
    axes.axhspan(-BAND, BAND, color="0.85")
    axes.axhline(0, color="0.4", linewidth=1)
    _scatter(axes, points, colours, _true, lambda p: _predicted(p) - _true(p))
    largest = max(abs(_predicted(p) - _true(p)) for p in points)
    reach = min(max(1.1 * largest, 2 * BAND), 3.0)
    axes.set(ylim=(-reach, reach), xlabel="true log10 MSE", ylabel="predicted less true")
    axes.grid(alpha=0.25)


def _fractions(axes: Any, points: Sequence["Point"], colours: dict) -> None:
    axes.plot([0, 1], [0, 1], color="0.4", linewidth=1)
    found = [(p.score.found.exact, p.score.exact_estimate) for p in points]
    _scatter(axes, points, colours, lambda p: p.score.found.exact, lambda p: p.score.exact_estimate)
    least = max(min(map(min, found)) - 0.02, -0.02)
    axes.set(xlim=(least, 1.01), ylim=(least, 1.01), xlabel="true exact fraction")
    axes.set(ylabel="estimated exact fraction", title="Share of elements that are exact")
    axes.grid(alpha=0.25)


def _legend(figure: Any, groups: list[str], colours: dict, points: Sequence["Point"]) -> None:
    from matplotlib.lines import Line2D

    def entry(label: str, marker: str, colour: Any, filled: bool) -> Line2D:
        face = colour if filled else "none"
        return Line2D(
            [], [], linestyle="", marker=marker, label=label,
            markerfacecolor=face, markeredgecolor=colour,
        )  # fmt: skip

    held = {p.group for p in points if p.held_out}
    entries = [
        entry(g + (" (held out)" if g in held else ""), "o", colours[g], g not in held)
        for g in groups
    ]
    used = {p.dtype for p in points}
    entries += [entry(f"stored as {d}", m, "0.3", False) for d, m in MARKERS.items() if d in used]
    figure.legend(handles=entries, loc="outside lower center", ncols=3, fontsize=9)
