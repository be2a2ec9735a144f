"""``jdetune inspect``: what recover would do, from headers and a few matrices."""

from collections.abc import Mapping, Sequence
from typing import Any

from jdetune.cli import common
from jdetune.cli.common import Command, UsageError


def make_command() -> Command:
    """Flags of this command."""
    command = Command(
        "inspect",
        "jdetune inspect MODEL MODEL MODEL... [flags]",
        "Reads the models' headers, recovers a few matrices in which they differ, and says what\n"
        "`jdetune recover` would do, with ranks, bytes and memory. Writes nothing.",
        "exit codes: 0 recoverable; 2 usage; 3 bad input or fewer than three distinct models;\n"
        "4 the models do not share a base",
    )
    command.integer("sample", 4, "How many differing matrices to try.")
    command.platform()
    return command


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    from jdetune import inspection, pipeline

    command = make_command()
    models = command.parse(argv)
    if not models:
        raise UsageError("no MODEL is given.\nTry: jdetune inspect --help")
    common.set_platform(command["platform"])
    checkpoints = pipeline.open_models(models)
    result = inspection.inspect(checkpoints, command["sample"], pipeline.default_recover)
    if command["json"]:
        common.write_json(result)
    else:
        common.write_out(render(common.one_line(result)))
    return result["exit_code"]


def render(result: Mapping[str, Any]) -> str:
    """The result for people."""
    rows = [
        [
            entry["name"],
            str(entry["dtype"]),
            str(entry["tensors"]),
            f"{entry['parameters']:,}",
            common.size(entry["bytes"]),
        ]
        for entry in result["models"]
    ]
    lines = [
        common.table(["model", "dtype", "tensors", "parameters", "size"], rows),
        "",
        f"{result['alike']} tensors alike in all models, {result['matrices']} of them matrices",
    ]
    lines += [f"note: {text}" for text in result["notes"]]
    if result["unlike"]:
        lines.append(
            f"{len(result['unlike'])} tensors missing in a model or of another shape or dtype, "
            f"e.g. {result['unlike'][0]}: not recovered"
        )
    if result["sample"]:
        lines += ["", _sample_table(result["sample"])]
    lines += [
        "",
        f"recover reads {common.size(result['read_bytes'])}, writes a base of "
        f"{common.size(result['write_bytes'])}, needs at most about "
        f"{common.size(result['memory_bytes'])} of memory",
        "",
        result["verdict"],
    ]
    return "\n".join(lines)


def _sample_table(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            entry["name"],
            "x".join(str(side) for side in entry["shape"]),
            entry["code"],
            ",".join(str(rank) for rank in entry["ranks"]) if entry["ranks"] else "-",
            common.fixed(entry["predicted_error"]),
            common.fixed(entry["residual_ratio"]),
        ]
        for entry in entries
    ]
    headers = ["sampled matrix", "shape", "status", "ranks", "log10 MSE (est.)", "residual"]
    return common.table(headers, rows)
