"""``jdetune group``: which models share a base, and one recover per group."""

import datetime
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jdetune.cli import common, recover
from jdetune.cli.common import Command, UsageError
from jdetune.cli.group_tree import ASCII, UNICODE, tree

_NOTES = """\
examples:
  jdetune group zoo/*                          # a tree, and a recover command for every group
  jdetune group zoo/* --recover --out=bases    # recovers them all: bases/family-of-.../

Two models share a base if what they differ by is of low rank, down to the rounding. Models of other
shapes are told apart by their headers. --masks and all flags below it go to recover; --include and
--exclude also limit what is compared.

With --recover the same command goes on after an interruption. Groups that are finished are kept,
also with --overwrite, as long as their models and the flags stay the same.

exit codes: 0 every model is in a group of three or more (and recovered); 2 usage; 3 bad input;
5 some are not; 130 interrupted; with --recover 3 or 4 where no group could be recovered"""
_RECOVERED = "recovered"
#: Flags that a recover command does not get.
_OWN = ("layers", "seed", "recover", "out", "dry_run", "json", "quiet", "debug", "flagfile")


def make_command() -> Command:
    """Flags of this command."""
    command = Command(
        "group",
        "jdetune group MODEL... [--recover --out=DIR] [flags]",
        "Says which models share a base, by rank tests on a few matrices, and how to recover each\n"
        "base. MODEL is a folder, a .safetensors file or a hub id (org/name@revision).",
        _NOTES,
    )
    command.integer("layers", 4, "Differing matrices to test for every two models.")
    command.integer("seed", 0, "Of the draw of layers.", lower=0)
    command.boolean("recover", False, "Recover every group of three or more.")
    command.string("out", None, "With --recover: folder to write, one folder a group, groups.json.")
    command.boolean("overwrite", False, "Replace results of groups that have changed.")
    command.platform()
    recover.add_run_flags(command)
    return command


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    command = make_command()
    models = command.parse(argv)
    if not models:
        raise UsageError("no MODEL is given.\nTry: jdetune group --help")
    going = command["recover"] and not command["dry_run"]
    if going and command["out"] is None:
        raise UsageError("--recover needs --out=DIR.\nTry: jdetune group --help")
    common.set_platform(command["platform"])
    options = recover.make_options(command, argv)
    value = _run(command, models, options, going)
    if command["json"]:
        common.write_json(value)
    else:
        encoding = sys.stdout.encoding or "ascii"
        common.write_out(render(value, UNICODE if encoding.lower().startswith("utf") else ASCII))
    return value["summary"]["exit_code"]


def _run(command: Command, models: Sequence[str], options: Any, going: bool) -> dict[str, Any]:
    from jdetune import pipeline
    from jdetune.checkpoint import select
    from jdetune.zoo import group_report, grouping, runs

    started, begin = datetime.datetime.now(datetime.UTC), time.monotonic()
    checkpoints = grouping.open_zoo(models)
    out = Path(command["out"] or _RECOVERED)
    if going:
        runs.check_out(out, [checkpoint.path for checkpoint in checkpoints])
    wanted = select(command["include"], command["exclude"])
    flags = command.given(skip=_OWN)
    with common.progress_bar(command["quiet"]) as progress:
        zoo = grouping.group_models(
            checkpoints, command["layers"], command["seed"], wanted, progress
        )
        jobs = []
        for group in zoo.groups:
            if group.recoverable:
                name = group_report.name_of(zoo, group)
                given = tuple(models[m] for m in group.members)
                line = group_report.command_line(given, str(out / name), flags)
                own = tuple(checkpoints[m] for m in group.members)
                jobs.append(runs.Job(name, given, own, line))
        value = {
            "schema": group_report.SCHEMA,
            "jdetune_version": pipeline.version(),
            "command": options.command,
            "started_at": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - begin, 3),
            "device": pipeline.device_name(),
            "layers": command["layers"],
            "seed": command["seed"],
            **group_report.content(zoo, {job.name: job.command for job in jobs}),
        }
        return runs.run_all(jobs, out, options, value, progress) if going else value


def render(value: Mapping[str, Any], marks: Sequence[str] = UNICODE) -> str:
    """The result for people."""
    summary = value["summary"]
    read = common.size(value["bytes_read"])
    lines = [
        f"{summary['models']} models: {summary['grouped']} in {summary['recoverable']} group(s) of "
        f"three or more, {summary['alone']} alone; read {read} in {value['seconds']:.1f} s",
        "",
        tree(value, marks),
    ]
    if "runs" in value:
        return "\n".join([*lines, "", _runs_table(value["runs"])])
    commands = [group["command"] for group in value["groups"] if group["command"]]
    if commands:
        lines += ["", "to recover:", *(f"  {line}" for line in commands)]
    return "\n".join(lines)


def _runs_table(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            entry["group"],
            entry["verdict"] + (" (kept)" if entry["kept"] else ""),
            "-" if entry["recovered"] is None else str(entry["recovered"]),
            common.fixed(entry["predicted_error"]),
            common.fixed(entry["exact_fraction_est"], 3),
            common.fixed(entry["seconds"], 1),
        ]
        for entry in entries
    ]
    headers = ["group", "verdict", "matrices", "log10 MSE (est.)", "exact (est.)", "seconds"]
    lines = [common.table(headers, rows), ""]
    lines += [f"{entry['group']}: {entry['error']}" for entry in entries if entry["error"]]
    return "\n".join([*lines, *(entry["out"] for entry in entries if not entry["error"])])
