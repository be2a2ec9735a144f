"""Writes the README's performance table from benchmarks/results/*.json.

python -m benchmarks.readme_table            # rewrites the block between the markers
python -m benchmarks.readme_table --check    # exit code 1 if README is not in step
"""

import json
import sys
from pathlib import Path

from absl import app, flags

from benchmarks.solver_report import about, of_limit, ratio
from benchmarks.tables import table

FLAGS = flags.FLAGS
flags.DEFINE_boolean("check", False, "Change nothing; say whether README is in step.")

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
HEADER = ("case", "times faster than the paper's", "of the limit", "W-error", "paper's W-error")


def block(results: list[dict]) -> str:
    """The tables of all runs, a line about the machine before each."""
    parts = []
    for result in results:
        rows = []
        for row in result["rows"]:
            entries = row.get("solvers", {})
            ours, paper = (entries.get(name, {}) for name in ("closed form", "paper"))
            if "w_error" not in ours:
                continue
            times, share = ratio(row), of_limit(row)
            mark = "*" if row.get("extrapolated") else ""
            theirs = paper.get("w_error")
            rows.append(
                [
                    row["name"],
                    "-" if times is None else f"{times:.0f}{mark}",
                    "-" if share is None else f"{share:.1f}",
                    f"{ours['w_error']:.2f}",
                    "-" if theirs is None else f"{theirs:.2f}",
                ]
            )
        parts.append(f"{about(result['machine'])}:\n\n{table(HEADER, rows)}")
    return "\n\n".join(parts)


def replace_block(readme: str, text: str) -> str:
    """README with its block replaced; ValueError without the two markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README has no single pair of markers {BEGIN} and {END}")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main(argv: list[str]) -> None:
    """Rewrites or checks."""
    del argv
    path = ROOT / "README.md"
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    before = path.read_text(encoding="utf-8")
    after = replace_block(before, block([r for r in results if "rows" in r]))
    if FLAGS.check:
        sys.exit(int(before != after))
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
