"""``jdetune bench lowra``: the paper's benchmark on a local copy of its data."""

import datetime
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jdetune.cli import common
from jdetune.cli.common import Command, UsageError

SCHEMA = "jdetune.bench/1"
BENCHES = ("lowra",)
_NOTES = """\
examples:
  hf download Eliahu/LoWRA-Bench --repo-type dataset --local-dir data
  jdetune bench lowra --subset=vit --data=data --out=results/vit
  jdetune bench lowra --data=data --out=results/vit --flagfile=configs/bench_vit.flags

Random subsets of n models, merged in memory and recovered layer by layer; W-error is the mean over
layers of log10 MSE, its deviation that over repeats. Every result is kept in OUT/cells.jsonl as
soon as it is known: the same command goes on after an interruption, and more --n, --repeats,
--layers or --methods add to it.

methods: lora-ft (single models), mean-lora, paper (Spectral DeTuning in float64 core space, rank
given), paper-full (the same in float32 as published, slow), jdetune (no rank given).

exit codes: 0 all done; 2 usage; 3 bad input; 5 jdetune has no base for some cells (they are rows
with their reason); 130 interrupted"""


def make_command() -> Command:
    """Flags of this command."""
    from jdetune.bench.layers import MERGE_DTYPES
    from jdetune.bench.methods import DEFAULT
    from jdetune.bench.subsets import SUBSETS

    command = Command(
        "bench",
        "jdetune bench lowra --subset=SUBSET --data=DIR --out=DIR [flags]",
        "Runs LoWRA Bench (Horwitz et al., ICML 2024): solvers and baselines by W-error.",
        _NOTES,
    )
    command.choice("subset", "vit", tuple(SUBSETS), "Which subset.")
    command.string("data", None, "Folder of a local copy of the data (parquet).")
    command.string("out", None, "Folder to write: tables.md, results.json, figures, cells.jsonl.")
    command.string("n", None, "Numbers of models, such as 3,5,8; the paper's if left out.")
    command.integer("repeats", 10, "Random subsets for each n.")
    command.integer("layers", None, "At most so many layers, across depth and type; else all.")
    command.string("methods", ",".join(DEFAULT), "Methods, separated by commas.")
    command.integer("steps", None, "Steps of the paper's solver; the paper's if left out.")
    command.choice(
        "merge_dtype", "float32", tuple(MERGE_DTYPES), "Dtype of the merged models (R1 in 16 bits)."
    )
    command.integer("seed", 0, "Of the random subsets.", lower=0)
    command.boolean("figures", True, "Draw figures.")
    command.boolean("overwrite", False, "Drop results of other settings in --out.")
    command.platform()
    return command


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    command = make_command()
    given = command.parse(argv)
    if len(given) != 1 or given[0] not in BENCHES:
        raise UsageError(f"say which benchmark: {', '.join(BENCHES)}.\nTry: jdetune bench --help")
    for name in ("data", "out"):
        if command[name] is None:
            raise UsageError(f"--{name}=DIR is missing.\nTry: jdetune bench --help")
    common.set_platform(command["platform"])
    value = _run(command, argv)
    if command["json"]:
        common.write_json(value)
    else:
        common.write_out(render(value))
    return value["exit_code"]


def _run(command: Command, argv: Sequence[str]) -> dict[str, Any]:
    from jdetune.bench import figures, protocol, report
    from jdetune.bench.dataset import open_dataset
    from jdetune.bench.layers import spread
    from jdetune.bench.subsets import SUBSETS

    started, begin = datetime.datetime.now(datetime.UTC), time.monotonic()
    subset, out = SUBSETS[command["subset"]], Path(command["out"])
    source = open_dataset(command["data"], subset.name)
    settings = protocol.Settings(
        subset=subset.name,
        layers=tuple(spread(source.names, command["layers"])),
        counts=_counts(command["n"]) or (subset.n,),
        repeats=command["repeats"],
        methods=_words(command["methods"]),
        steps=command["steps"] or subset.steps,
        merge_dtype=command["merge_dtype"],
        seed=command["seed"],
    )
    with common.progress_bar(command["quiet"]) as progress:
        cells = protocol.run(source, settings, out, progress, command["overwrite"])
    value = report.content(source, settings, cells) | {
        "schema": SCHEMA,
        "command": command.command_line(argv),
        "started_at": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begin, 3),
    }
    value["figures"] = (
        figures.draw(cells, value["rows"], subset.name, out) if command["figures"] else []
    )
    report.write(out, value, cells)
    return value | {"out": str(out)}


def _counts(text: str | None) -> tuple[int, ...]:
    try:
        counts = tuple(dict.fromkeys(int(word) for word in _words(text or "")))
    except ValueError as error:
        raise UsageError(f"--n is numbers separated by commas, got {text!r}.") from error
    return tuple(sorted(counts))


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def render(value: Mapping[str, Any]) -> str:
    """The result for people."""
    rows = [
        [
            row["title"],
            str(row["n"]),
            common.fixed(row["w_error"]),
            common.fixed(row["w_error_std"]),
            common.fixed(row["exact_fraction"], 3),
            f"{row['failed']}/{row['cells']}" if row["failed"] else "0",
            common.fixed(row["seconds"], 3),
        ]
        for row in value["rows"]
    ]
    headers = ["method", "n", "W-error", "std", "exact", "failed", "s a layer"]
    sampling = value["sampling"]
    lines = [
        f"{value['subset']}: {sampling['layers']} of {sampling['layers_in_all']} layers, at most "
        f"{sampling['repeats']} random subsets of {sampling['models_in_all']} models, merged in "
        f"{value['settings']['merge_dtype']}",
        "",
        common.table(headers, rows),
        "",
        *(f"note: {note}" for note in value["notes"]),
        f"tables    {value['out']}/tables.md",
        f"results   {value['out']}/results.json",
        *(f"figure    {value['out']}/{name}" for name in value["figures"]),
    ]
    return "\n".join(lines)
