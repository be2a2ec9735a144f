"""Writes the README's performance table from benchmarks/results/*.json.

python -m benchmarks.readme_table            # rewrites the block between the markers
python -m benchmarks.readme_table --check    # exit code 1 if README is not in step
"""

import json
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.solver_report import about, figure, number, of_closed_form, of_limit, ratio
from benchmarks.tables import put_between, table

ROOT = Path(__file__).parent.parent
#: Of the markers in README.
MARKED = "performance"
HEADER = (
    "case", "ms a layer", "times faster than the paper's", "of the limit",
    "W-error", "float64 throughout", "paper's W-error",
    "default solver, ms", "what it adds, closed forms", "its W-error",
)  # fmt: skip
#: Families that are no case of their own.
LEFT_OUT = ("scaling", "made", "tiny")


def cells(row: dict[str, Any]) -> list[str]:
    """A case of ``benchmarks.solver``."""
    times = ratio(row)
    errors = (figure(row, name, "w_error") for name in ("closed form", "float64", "paper"))
    return [
        row["name"],
        number(figure(row, "closed form"), 1, 1e3),
        number(times, 0) + ("*" if times is not None and row.get("extrapolated") else ""),
        number(of_limit(row), 1),
        *(number(error) for error in errors),
        number(figure(row, "full"), 0, 1e3),
        number(of_closed_form(row), 1),
        number(figure(row, "full", "w_error")),
    ]


def resident_cells(found: dict[str, Any]) -> list[str]:
    """All layers of ``benchmarks.accelerator`` in one row."""
    part, paper = found["resident"], found.get("baseline", {})
    times = paper.get("times_faster")
    worst = max(one["w_error"] for one in part["sample"].values())
    return [
        f"{part['layers']} layers on the device, n={part['n_models']} r={part['rank']}"
        f" {part['dtype']}, {part['seconds']:.2f} s in all",
        number(part["seconds"] / part["layers"], 1, 1e3),
        number(times, 0) + ("*" if times is not None and paper.get("extrapolated") else ""),
        number(part["of_limit"], 1),
        number(worst),
        *["-"] * 5,
    ]


def block(results: list[dict[str, Any]]) -> str:
    """The tables of all runs, a line about the machine before each; nothing for no results."""
    parts = []
    for result in results:
        kept = [row for row in result.get("rows", []) if not row["family"].startswith(LEFT_OUT)]
        rows = [cells(row) for row in kept if figure(row, "closed form", "w_error") is not None]
        if "seconds" in result.get("accelerator", {}).get("resident", {}):
            rows.append(resident_cells(result["accelerator"]))
        if rows:
            parts.append(f"{about(result['machine'])}:\n\n{table(HEADER, rows)}")
    if any("*" in part for part in parts):
        parts.append(
            "\\* extrapolated from a few steps at every rank, the shortest way through the paper's"
            " schedule; its W-error is then not known."
        )
    return "\n\n".join(parts)


def results() -> list[dict[str, Any]]:
    """Every run that is kept, by file name."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def main(argv: list[str]) -> int:
    """Rewrites or checks."""
    if len(argv) > 1:
        raise app.UsageError("python -m benchmarks.readme_table takes flags only")
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = put_between(before, MARKED, block(results()))
    if flags.FLAGS.check:
        return int(before != after)
    path.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    flags.DEFINE_boolean("check", False, "Change nothing; say whether README is in step.")
    app.run(main)
