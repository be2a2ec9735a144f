"""``jdetune verify``: a recovery against a reference base and against the merged models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdetune.cli import common
from jdetune.cli.common import Command, UsageError

_NOTES = """\
The W-error is the mean over recovered matrices of log10 of the mean squared error, -40 where
exact. A re-merge fails where an element misses the model's by more than 16 noise units: half an
ulp, or the rms rounding error of the element's row or column if that is larger.

verify computes in NumPy: it takes --platform as the other commands do, but runs on the CPU.

exit codes: 0 as good as asked; 2 usage; 3 bad input; 6 verification failed"""


def make_command() -> Command:
    """Flags of this command."""
    command = Command(
        "verify",
        "jdetune verify OUT [--reference=DIR] [--models=a,b,c] [flags]",
        "Compares OUT/base with the true base, bit by bit, and merges every recovered adapter\n"
        "into it again to compare with the merged models that report.json names.",
        _NOTES,
    )
    command.string("reference", None, "Folder of the true base.")
    command.string("models", None, "Merged models, comma separated, in the order of the report.")
    command.number("max_error", None, "Greatest W-error (log10 MSE) that passes.")
    command.number("min_exact", None, "Least exact fraction of the recovered matrices that passes.")
    command.platform()
    return command


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    from jdetune import verification

    command = make_command()
    arguments = command.parse(argv)
    if len(arguments) != 1:
        raise UsageError("give one OUT folder.\nTry: jdetune verify --help")
    if command["reference"] is None and not (command["max_error"] is command["min_exact"] is None):
        raise UsageError("--max_error and --min_exact need --reference.")
    models = command["models"].split(",") if command["models"] else None
    with common.progress_bar(command["quiet"]) as progress:
        result = verification.verify(Path(arguments[0]), command["reference"], models, progress)
    result["failures"] += thresholds(result, command["max_error"], command["min_exact"])
    result["passed"] = not result["failures"]
    if command["json"]:
        common.write_json(result)
    else:
        common.write_out(render(common.one_line(result)))
    return 0 if result["passed"] else 6


def thresholds(
    result: dict[str, Any], max_error: float | None, min_exact: float | None
) -> list[str]:
    """What was asked for and missed."""
    missed = []
    error, exact = result["w_error"], result["exact_fraction"]
    if max_error is not None and (error is None or error > max_error):
        missed.append(f"W-error {common.fixed(error)} is above --max_error={max_error}")
    if min_exact is not None and (exact is None or exact < min_exact):
        missed.append(f"exact fraction {common.fixed(exact, 4)} is below --min_exact={min_exact}")
    return missed


def render(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = []
    if result["tensors"]:
        rows = [
            [
                row["name"],
                common.fixed(row["w_error"]),
                common.fixed(row["exact_fraction"], 4),
                *(str(count) for count in row["ulp"].values()),
            ]
            for row in result["tensors"]
        ]
        bins = ["0 ulp", *list(result["tensors"][0]["ulp"])[1:]]
        headers = ["recovered matrix", "W-error", "exact", *bins]
        lines += [common.table(headers, rows), ""]
        lines.append(
            f"mean W-error {common.fixed(result['w_error'])}, exact fraction "
            f"{common.fixed(result['exact_fraction'], 4)}"
        )
    if result["reference"] is not None:
        lines.append(f"{result['copied_equal']} of {result['copied']} other tensors equal")
    if result["not_in_models"]:
        lines.append(
            f"{len(result['not_in_models'])} tensor(s) of the reference are in no merged model, "
            f"e.g. {result['not_in_models'][0]}"
        )
    if result["passed_over"]:
        lines.append(
            f"{len(result['passed_over'])} tensors passed over: skipped or failed by the report"
        )
    if result["models"]:
        rows = [
            [
                row["name"],
                common.fixed(row["equal_fraction"], 4),
                common.fixed(row["worst"], 2),
            ]
            for row in result["models"]
        ]
        headers = ["re-merged model", "equal elements", "worst / tolerance"]
        lines += ["", common.table(headers, rows)]
    lines += [""] if lines else []
    lines += [f"failed: {text}" for text in result["failures"]] or ["passed"]
    return "\n".join(lines)
