"""``jdetune merge``: a PEFT adapter into its base, by a chosen rounding."""

from collections.abc import Sequence
from typing import Any

from jdetune.cli import common
from jdetune.cli.common import Command, UsageError

_NOTES = """\
r1 rounds the sum once (PEFT's default; embeddings follow r2 there, and here), r2 also the update
before (safe_merge=True), r3 the product and the update (16-bit adapters on a GPU). Sums of a
matrix product depend on their order: the share of weights that another order can change is printed.

exit codes: 0 merged; 2 usage; 3 bad input, or an adapter that is not plain LoRA (DoRA)"""


def make_command() -> Command:
    """Flags of this command."""
    command = Command(
        "merge",
        "jdetune merge BASE ADAPTER --out=DIR [--rounding=r1|r2|r3] [flags]",
        "Merges a PEFT LoRA adapter into its base and writes OUT/merged, with the base's shards.",
        _NOTES,
    )
    command.string("out", None, "Folder to write: merged/, report.json.")
    command.boolean("overwrite", False, "Replace a former output of jdetune in --out.")
    common.add_trust(command, "the base")
    command.choice("rounding", "r1", ("r1", "r2", "r3"), "What is rounded.")
    return command


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    command = make_command()
    paths = command.parse(argv)
    if len(paths) != 2:
        raise UsageError("give BASE and ADAPTER.\nTry: jdetune merge --help")
    if command["out"] is None:
        raise UsageError("--out=DIR is missing.\nTry: jdetune merge --help")
    from jdetune import merging

    base, adapter = paths
    rule, line = command["rounding"].upper(), command.command_line(argv)
    with common.progress_bar(command["quiet"]) as progress:
        value = merging.run(
            base,
            adapter,
            command["out"],
            rule,
            command["overwrite"],
            line,
            progress,
            command["trust_remote_code"],
        )
    if command["json"]:
        common.write_json(value)
    else:
        common.write_out(render(common.one_line(value), command["out"]))
    return value["summary"]["exit_code"]


def render(report: dict[str, Any], out: str) -> str:
    """The report for people."""
    summary = report["summary"]
    return "\n".join(
        [
            f"{summary['merged']} matrices merged by {report['rounding']}, {summary['replaced']} "
            f"tensors replaced, {summary['copied']} copied in {report['seconds']:.1f} s",
            "bound: the order of sums in another GEMM can change "
            f"{summary['sensitive_fraction']:.4%} of the merged weights, "
            f"by {summary['max_ulp']} ulp at most",
            *(f"note: {text}" for text in report["notes"]),
            f"merged    {out}/merged",
            f"report    {out}/report.json",
        ]
    )
