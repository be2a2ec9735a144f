"""Figures of the benchmark, each a PNG that reads on light and dark pages."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jdetune.bench.methods import TITLES
from jdetune.bench.summary import Cell, mean_and_deviation, split
from jdetune.checkpoint.writer import save_bytes
from jdetune.errors import InputError

#: A method's colour and marker; told apart by colour-blind eyes too.
STYLES = {
    "lora-ft": ("#999999", "x"),
    "mean-lora": ("#CC79A7", "v"),
    "paper": ("#D55E00", "s"),
    "paper-full": ("#E69F00", "D"),
    "jdetune": ("#0072B2", "o"),
}
_RC: Any = {
    "font.size": 10,
    "axes.titlesize": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "white",  # a ground of its own: dark pages show it as a card
    "savefig.facecolor": "white",
}


@contextlib.contextmanager
def canvas(path: Path, rows: int = 1, cols: int = 1, size: tuple[float, float] = (5.2, 3.8)):
    """Axes to draw on, [rows][cols]; written to ``path`` at the end.

    Args:
      path: of the PNG.
      rows: panels below each other.
      cols: panels beside each other.
      size: of a panel, inches.

    Raises:
      InputError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "figures need the package matplotlib: pip install 'jdetune[bench]', or pip install "
            "matplotlib. --nofigures leaves them out."
        ) from error
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(size[0] * cols, size[1] * rows), constrained_layout=True)
        yield figure.subplots(rows, cols, squeeze=False)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120)
    save_bytes(path, image.getvalue())


def style(method: str) -> dict[str, Any]:
    """How a method is drawn."""
    colour, marker = STYLES[method]
    return {"color": colour, "marker": marker, "label": TITLES[method], "markersize": 5}


def by_count(axes: Any, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """W-error against the number of models, with deviations (the paper's Figure 7)."""
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method and row["w_error"] is not None]
        if own:
            axes.errorbar(
                [row["n"] for row in own],
                [row["w_error"] for row in own],
                yerr=[row["w_error_std"] for row in own],
                capsize=3,
                **style(method),
            )
    axes.set(title=title, xlabel="number of models n", ylabel="W-error (log10 MSE)")
    counts = sorted({row["n"] for row in rows})
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.legend(fontsize=8)


def histogram(axes: Any, cells: Sequence[Cell], title: str) -> None:
    """How the layers' W-errors are spread, by method (the paper's Figure 4)."""
    known = [cell for cell in cells if cell["w_error"] is not None]
    if not known:
        axes.set(title=f"{title}: no layer with a base")
        return
    low = min(cell["w_error"] for cell in known)
    high = max(cell["w_error"] for cell in known)
    edges = [low + (high - low or 1.0) * i / 40 for i in range(41)]
    for method, own in split(known, lambda cell: cell["method"]).items():
        colour, _ = STYLES[method]
        values = [cell["w_error"] for cell in own]
        axes.hist(values, bins=edges, alpha=0.65, color=colour, label=TITLES[method])
    axes.set(title=title, xlabel="W-error of a layer (log10 MSE)", ylabel="layers")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)


def by_depth(axes: Any, cells: Sequence[Cell], method: str, title: str) -> None:
    """W-error over depth, a line for each type of layer."""
    own = [c for c in cells if c["method"] == method and c["depth"] is not None]
    for kind, part in split(own, lambda cell: cell["kind"]).items():
        depths = split(part, lambda cell: cell["depth"])
        line = {
            depth: mean_and_deviation([cell["w_error"] for cell in some])[0]
            for depth, some in sorted(depths.items())
        }
        line = {depth: value for depth, value in line.items() if value is not None}
        axes.plot(list(line), list(line.values()), marker="o", markersize=4, label=kind)
    axes.set(title=title, xlabel="depth", ylabel="W-error (log10 MSE)")
    if own:
        axes.legend(fontsize=8)


def predicted(axes: Any, cells: Sequence[Cell], title: str) -> None:
    """W-error as the certificate predicts it, without the truth, against the W-error."""
    own = [c for c in cells if c.get("predicted_error") is not None and c["w_error"] is not None]
    x, y = [c["w_error"] for c in own], [c["predicted_error"] for c in own]
    axes.scatter(x, y, s=14, color=STYLES["jdetune"][0], alpha=0.6)
    if own:
        ends = [min(*x, *y), max(*x, *y)]
        axes.plot(ends, ends, color="0.4", linewidth=1)
    axes.set(title=title, xlabel="W-error", ylabel="predicted without the base")


def draw(
    cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]], subset: str, folder: Path
) -> list[str]:
    """Draws all figures of one subset.

    Args:
      cells: all of them.
      rows: of ``summary.summarize``.
      subset: its name.
      folder: to write to.

    Returns:
      Names of the files.
    """
    return list(_draw(cells, rows, subset, folder))


def _draw(
    cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]], subset: str, folder: Path
) -> Iterator[str]:
    n = max(row["n"] for row in rows)
    last = [cell for cell in cells if cell["n"] == n]
    with canvas(folder / "number_of_models.png") as axes:
        by_count(axes[0][0], rows, subset)
    yield "number_of_models.png"
    with canvas(folder / "layers.png") as axes:
        histogram(axes[0][0], last, f"{subset}, n = {n}")
    yield "layers.png"
    method = "jdetune" if any(cell["method"] == "jdetune" for cell in last) else last[0]["method"]
    with canvas(folder / "depth.png") as axes:
        by_depth(axes[0][0], last, method, f"{subset}, n = {n}, {TITLES[method]}")
    yield "depth.png"
    if any(cell.get("predicted_error") is not None for cell in cells):
        with canvas(folder / "predicted.png") as axes:
            predicted(axes[0][0], cells, subset)
        yield "predicted.png"
