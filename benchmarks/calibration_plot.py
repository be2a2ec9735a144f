"""The picture of the calibration: predicted against true error, and exact fractions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from benchmarks.calibration import Point

#: log10 MSE that stands for everything at or below it: exact layers.
LEAST = -25.0
#: Share of wrong elements that stands for none.
NONE_WRONG = 1e-7
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
    axes.annotate("exact", (LEAST, LEAST), (LEAST + 1.2, LEAST), va="center", fontsize=9)
    axes.grid(alpha=0.25)


def _differences(axes: Any, points: Sequence["Point"], colours: dict) -> None:
    axes.axhspan(-BAND, BAND, color="0.85")
    axes.axhline(0, color="0.4", linewidth=1)
    reach = 1.2

    def difference(p: "Point") -> float:
        return float(np.clip(_predicted(p) - _true(p), -reach, reach))

    _scatter(axes, points, colours, _true, difference)
    axes.set(ylim=(-1.1 * reach, 1.1 * reach), xlabel="true log10 MSE")
    beyond = sum(abs(_predicted(p) - _true(p)) > reach for p in points)
    more = f"\n({beyond} beyond {reach} drawn at the edge)" if beyond else ""
    axes.set_ylabel("predicted less true" + more)
    axes.grid(alpha=0.25)


def _fractions(axes: Any, points: Sequence["Point"], colours: dict) -> None:
    def true(p: "Point") -> float:
        return max(1 - p.score.found.exact, NONE_WRONG)

    def estimated(p: "Point") -> float:
        return max(1 - p.score.exact_estimate, NONE_WRONG)

    ends = (NONE_WRONG / 2, 1.5)
    axes.plot(ends, ends, color="0.4", linewidth=1)
    _scatter(axes, points, colours, true, estimated)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set(xlabel="true share of wrong elements", ylabel="estimated share of wrong elements")
    axes.set_title("Elements that are not exact: estimated, against the truth")
    axes.annotate("none", (NONE_WRONG, NONE_WRONG), (3 * NONE_WRONG, NONE_WRONG), va="center")
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
