"""``jdetune pack``: many merged models in one store, from which each comes back byte for byte."""

from collections.abc import Sequence
from typing import Any

from jdetune.cli import common
from jdetune.cli.common import Command, UsageError

_NOTES = """\
example:
  jdetune pack tune-a tune-b tune-c --out=store
  jdetune unpack store --out=again

Of three or more models of one base the base is kept once, and of every model its LoRA factors and
what rounding leaves over. Everything else is kept as it is: equal tensors once, all compressed,
every other file too. The store is decoded and compared with sha256 before it is put in place.
Folders keep their files' names and bytes, not times, rights, links or empty folders.

exit codes: 0 packed; 2 usage; 3 bad input; 6 decoding does not give back what was read;
130 interrupted (the same command goes on)"""


def make_command() -> Command:
    """Flags of this command."""
    command = Command(
        "pack",
        "jdetune pack MODEL... --out=STORE [flags]",
        "Packs models into a store: base once, factors and residuals per model, bit for bit.\n"
        "MODEL is a folder or a .safetensors file.",
        _NOTES,
    )
    command.string("out", None, "Folder for the store: manifest.json, blobs/, report.json.")
    command.boolean("overwrite", False, "Replace a former store of jdetune in --out.")
    command.boolean("dry_run", False, "Say what would be packed, then stop.")
    command.integer("level", 3, "Level of zstandard, 1 to 19.")
    command.boolean(
        "polish",
        True,
        "Refine bases and updates before packing; --nopolish is many times faster and makes\n"
        "somewhat larger stores.",
    )
    command.boolean(
        "compare", True, "Measure what zstd of every file and storing equal tensors once take."
    )
    command.string(
        "max_memory",
        None,
        "Memory that a device may use at a time, such as 8GB; fewer layers are then worked on "
        "together. Default: a share of what is free.",
    )
    command.platform()
    return command


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    command = make_command()
    models = command.parse(argv)
    if not models:
        raise UsageError("no MODEL is given.\nTry: jdetune pack --help")
    if command["out"] is None and not command["dry_run"]:
        raise UsageError("--out=STORE is missing.\nTry: jdetune pack --help")
    if command["level"] > 19:
        raise UsageError(f"--level is 1 to 19; got {command['level']}.")
    memory = common.parse_size(command["max_memory"], "--max_memory")
    common.set_platform(command["platform"])
    from jdetune.zoo import packing

    options = packing.Options(
        level=command["level"],
        polish=command["polish"],
        compare=command["compare"],
        max_memory=memory,
        overwrite=command["overwrite"],
        command=command.command_line(argv),
    )
    if command["dry_run"]:
        value = packing.describe(models, command["out"], options)
        text = render_plan(value)
    else:
        with common.progress_bar(command["quiet"]) as progress:
            value = packing.run(models, command["out"], options, progress)
        text = render(value)
    if command["json"]:
        common.write_json(value)
    else:
        common.write_out(text)
    return value["exit_code"]


def render_plan(value: dict[str, Any]) -> str:
    """What would be packed, for people."""
    rows = [[m["name"], str(m["files"]), common.size(m["bytes"])] for m in value["models"]]
    rows.append(
        ["all", str(sum(m["files"] for m in value["models"])), common.size(value["bytes_in"])]
    )
    lines = [common.table(["model", "files", "bytes"], rows)]
    return "\n".join([*lines, *(f"warning: {text}" for text in value["warnings"])])


def render(value: dict[str, Any]) -> str:
    """The report for people."""
    total = value["bytes_in"]
    rows = [["the models' files", common.size(total), "1.00"]]
    names = {
        "per_file_zstd": f"zstd -{value['level']} of every file",
        "dedup": "equal tensors and files once",
        "dedup_zstd": f"the same, each by zstd -{value['level']}",
    }
    for key, what in names.items():
        if value["others"][key] is not None:
            rows.append(
                [what, common.size(value["others"][key]), _ratio(total, value["others"][key])]
            )
    rows.append(["this store", common.size(value["bytes_out"]), common.fixed(value["ratio"])])
    kinds = {
        "base": "  base and what all models share",
        "factors": "  LoRA factors",
        "residual": "  residuals of rounding",
        "other": "  other tensors and files, manifest",
    }
    rows += [[what, common.size(value["by_kind"][key]), ""] for key, what in kinds.items()]
    lines = [common.table(["", "bytes", "ratio"], rows), ""]
    rest = value["residual"]
    if rest["elements"]:
        lines.append(
            f"residual: {rest['bits']:.3f} bits for each of {rest['elements']} elements; the "
            f"entropy of its steps alone is {rest['entropy_bits']:.3f}"
        )
    count = len(value["models"])
    lines.append(
        f"{count} model(s) packed in {value['seconds']:.1f} s; every file was decoded again and "
        "has its sha256"
    )
    lines += [f"warning: {text}" for text in value["warnings"]]
    return "\n".join([*lines, "", f"next: jdetune unpack {value['store']} --out=DIR"])


def _ratio(total: int, part: int) -> str:
    return common.fixed(total / part) if part else "-"
