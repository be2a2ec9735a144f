"""``jdetune unpack``: the models of a store, byte for byte."""

from collections.abc import Sequence
from typing import Any

from jdetune.cli import common
from jdetune.cli.common import Command, UsageError

_NOTES = """\
example:
  jdetune unpack store --out=again
  jdetune unpack store --out=again --only=tune-a

A store is not trusted: names that leave DIR, blobs that hold more than they say, and wrong digests
are refused, and DIR is put in place only when all of it is there.

exit codes: 0 unpacked; 2 usage; 3 a damaged or hostile store; 6 a blob or file has another digest
than the store says; 130 interrupted (the same command goes on)"""


def make_command() -> Command:
    """Flags of this command."""
    command = Command(
        "unpack",
        "jdetune unpack STORE --out=DIR [--only=MODEL] [flags]",
        "Writes the models of a store that jdetune pack made, each into DIR/<model>.",
        _NOTES,
    )
    command.string("out", None, "Folder to write; must be empty or not there.")
    command.string("only", None, "Names of models, with commas between; all if left out.")
    command.boolean("dry_run", False, "Check the manifest, say what it holds, and stop.")
    return command


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    command = make_command()
    stores = command.parse(argv)
    if len(stores) != 1:
        raise UsageError("give one STORE.\nTry: jdetune unpack --help")
    if command["out"] is None and not command["dry_run"]:
        raise UsageError("--out=DIR is missing.\nTry: jdetune unpack --help")
    only = [name for name in (command["only"] or "").split(",") if name]
    from jdetune.zoo import unpacking

    if command["dry_run"]:
        value = unpacking.describe(stores[0], only)
    else:
        with common.progress_bar(command["quiet"]) as progress:
            value = unpacking.run(stores[0], command["out"], only, progress)
    if command["json"]:
        common.write_json(value)
    else:
        common.write_out(render(value))
    return value["exit_code"]


def render(value: dict[str, Any]) -> str:
    """What was written, for people."""
    rows = [[m["name"], str(m["files"]), common.size(m["bytes"])] for m in value["models"]]
    lines = [common.table(["model", "files", "bytes"], rows)]
    if value["out"] is not None:
        lines += [
            "",
            f"{common.size(value['bytes'])} in {value['seconds']:.1f} s; every file has its sha256",
            f"models    {value['out']}",
        ]
    return "\n".join(lines)
