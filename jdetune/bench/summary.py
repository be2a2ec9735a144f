"""Means, deviations and tables of the cells."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jdetune.bench.methods import TITLES

Cell = Mapping[str, Any]


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of the known values; a single one has a deviation of 0.

    Example:
      >>> mean_and_deviation([1.0, 3.0, None])
      (2.0, 1.4142135623730951)
    """
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def split(cells: Iterable[Cell], key: Callable[[Cell], Any]) -> dict[Any, list[Cell]]:
    """Cells by a key, in order of their first appearance."""
    parts: dict[Any, list[Cell]] = {}
    for cell in cells:
        parts.setdefault(key(cell), []).append(cell)
    return parts


def per_repeat(cells: Sequence[Cell], field: str) -> list[float | None]:
    """Mean over layers of a figure, one a repeat (Eq. 8 for the W-error); layers without count not.

    Args:
      cells: of one method and one n.
      field: of a cell.
    """
    parts = split(cells, lambda cell: cell["repeat"]).values()
    return [mean_and_deviation([cell.get(field) for cell in part])[0] for part in parts]


def seconds(cells: Sequence[Cell]) -> float | None:
    """Median seconds of a layer, without calls that compiled unless there are no others."""
    warm = [cell["seconds"] for cell in cells if not cell["first_call"]]
    every = warm or [cell["seconds"] for cell in cells]
    return statistics.median(every) if every else None


def summarize(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row for every n and method: means over layers, mean and deviation over repeats.

    Example:
      >>> summarize([])
      []
    """
    rows = []
    for (n, method), own in split(cells, lambda c: (c["n"], c["method"])).items():
        row: dict[str, Any] = {"n": n, "method": method, "title": TITLES[method]}
        for field in ("w_error", "w_error_wide", "exact_fraction"):
            row[field], row[field + "_std"] = mean_and_deviation(per_repeat(own, field))
        row["repeats"] = len({cell["repeat"] for cell in own})
        row["layers"] = len({cell["layer"] for cell in own})
        row["failed"] = sum(cell["w_error"] is None for cell in own)
        row["not_ok"] = sum(cell["status"] != "OK" for cell in own)
        row["cells"] = len(own)
        row["seconds"] = seconds(own)
        rows.append(row)
    return sorted(rows, key=lambda row: (row["n"], list(TITLES).index(row["method"])))


def failures(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Cells whose status is not OK, gathered by method, n, status and reason."""
    bad = [cell for cell in cells if cell["status"] != "OK"]
    parts = split(bad, lambda c: (c["method"], c["n"], c["status"], c["reason"]))
    return [
        {"method": method, "n": n, "status": status, "reason": reason, "cells": len(own)}
        for (method, n, status, reason), own in parts.items()
    ]


def by(cells: Sequence[Cell], field: str) -> list[dict[str, Any]]:
    """Mean W-error by n, method and a field of the layer: its kind or its depth."""
    parts = split(cells, lambda c: (c["n"], c["method"], c[field]))
    return [
        {
            "n": n,
            "method": method,
            field: value,
            "w_error": mean_and_deviation([cell["w_error"] for cell in own])[0],
            "cells": len(own),
        }
        for (n, method, value), own in parts.items()
    ]


def number(value: float | None, digits: int = 2) -> str:
    """A number with fixed digits, a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def plus_minus(value: float | None, deviation: float | None, digits: int = 2) -> str:
    """Mean and deviation.

    Example:
      >>> plus_minus(-7.125, 0.5)
      '-7.12 ± 0.50'
    """
    return "-" if value is None else f"{value:.{digits}f} ± {number(deviation, digits)}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right.

    Example:
      >>> print(markdown(["a", "b"], [["x", "2"]]))
      | a | b |
      |---|--:|
      | x | 2 |
    """
    rule = "|".join(["---", *["--:"] * (len(header) - 1)])
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (header, *rows)]
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def main_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of methods by n."""
    header = ["method", "n", "W-error", "before rounding", "exact", "failed", "s a layer"]
    return markdown(
        header,
        [
            [
                row["title"],
                str(row["n"]),
                plus_minus(row["w_error"], row["w_error_std"]),
                number(row["w_error_wide"]),
                number(row["exact_fraction"], 3),
                f"{row['failed']} of {row['cells']}" if row["failed"] else "0",
                number(row["seconds"], 3),
            ]
            for row in rows
        ],
    )


def breakdown_table(cells: Sequence[Cell], field: str, title: str) -> str:
    """Methods' W-errors by a field of the layer, a row for each of its values and n."""
    rows = by(cells, field)
    used = list(dict.fromkeys(row["method"] for row in rows))
    places = sorted({(row[field], row["n"]) for row in rows}, key=lambda p: (str(type(p[0])), p))
    known = {(row[field], row["n"], row["method"]): row["w_error"] for row in rows}
    body = [
        [str(value), str(n), *(number(known.get((value, n, method))) for method in used)]
        for value, n in places
    ]
    return markdown([title, "n", *(TITLES[method] for method in used)], body)
