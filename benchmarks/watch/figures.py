"""Figures of the experiments."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_COLOURS = ("#0072b2", "#c25100", "#00805f", "#a9568a", "#8a6d00", "#2f93d1", "#5b5b5b")


def bars(
    axes: Any, labels: Sequence[str], groups: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Grouped bars of means with their intervals; of two values, with both.

    Args:
      axes: of matplotlib.
      labels: below each group.
      groups: name in the legend to one `scoring.over` for each label.
    """
    wide = 0.8 / len(groups)
    for place, (name, figures) in enumerate(groups.items()):
        x = np.arange(len(labels)) + (place - (len(groups) - 1) / 2) * wide
        means = [f["mean"] or 0.0 for f in figures]
        halves = np.transpose([_whisker(f) for f in figures])
        colour = _COLOURS[place % len(_COLOURS)]
        axes.bar(x, means, wide, yerr=halves, color=colour, label=name, capsize=2, ecolor="0.3")
    axes.set_xticks(np.arange(len(labels)), labels, fontsize=8)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(fontsize=8)


def _whisker(figure: Mapping[str, Any]) -> tuple[float, float]:
    """How far it reaches down and up."""
    if figure["n"] == 2:
        return figure["mean"] - figure["least"], figure["most"] - figure["mean"]
    return figure["half"] or 0.0, figure["half"] or 0.0


def write(draw: Callable[[Any, Any], None], result: Any, path: Path) -> None:
    """Writes a figure as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 4.4), constrained_layout=True)
    draw(result, figure)
    figure.savefig(path, dpi=110)
    plt.close(figure)
