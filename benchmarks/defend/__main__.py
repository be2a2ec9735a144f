"""What protects a release from recovery: every defence, its cost, recovery before and after.

    python -m benchmarks.defend --quick          # one block, n = 3, ten of the 14 rows
    python -m benchmarks.defend --block --docs   # one block, n = 3, 4, 5, 8; docs/defend.md
    python -m benchmarks.defend                  # the whole model, n = 3, 4, 5, 8
    python -m benchmarks.defend --again --docs   # tables and figure of a former run

prints tables, writes OUT/defend.json (after every step: a run that was stopped goes on, and
``--block`` goes on where ``--quick`` ended) and OUT/defend.png, and with ``--docs`` the tables
between the markers of docs/defend.md and its figure. More models are tried until they are enough.
Ends with exit code 1 if a check fails: a base of status OK that is worse than predicted, or
coordinates whose change moved the model's outputs.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jdetune.cli.main import prepare_environment

if __name__ == "__main__":  # before JAX starts
    prepare_environment()

import jax  # noqa: E402
from absl import app, flags  # noqa: E402

from benchmarks import real_models, tables  # noqa: E402
from benchmarks.defend import attacks, cases, page  # noqa: E402
from benchmarks.watch import figures  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
_SET = flags.DEFINE_enum("set", "minilm-same", ["minilm-same", "minilm-distinct"], "Adapters.")
_QUICK = flags.DEFINE_boolean(
    "quick", False, "One block, n = 3, fewer defences, without the paper's solver."
)
_BLOCK = flags.DEFINE_boolean("block", False, "One block, all else as in the full form.")
_ONLY = flags.DEFINE_list("only", [], "Defences whose names begin so; others are left as known.")
_OUT = flags.DEFINE_string("out", "defend-out", "Folder for defend.json and defend.png.")
_DOCS = flags.DEFINE_boolean("docs", False, "Write the tables and the figure of docs/defend.md.")
_AGAIN = flags.DEFINE_boolean("again", False, "Tables and figure of a former run.")


def measure(
    of: cases.Family,
    settings: dict[str, Any],
    paper: int | None,
    chosen: Sequence[str],
    say: Callable[[str], None],
    known: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """All rows: every defence with the fewest models, then with more what is not recovered yet.

    Args:
      of: the models.
      settings: of the run, for the page.
      paper: number of models at which the paper's solver runs; it does not if None.
      chosen: names of the defences that are run.
      say: told of every step.
      known: what a former run on the same models had, which is not run again.

    Yields:
      The result so far.
    """
    result = {"rows": [], "costs": {}, "paper": {}, "seconds": 0, "processor": 0}
    if _models(known.get("settings", {})) == _models(settings):
        result = known
    result["settings"] = settings
    probe, begin = None, time.perf_counter() - result["seconds"]
    used = time.process_time() - result["processor"]
    every = {case.name: case for case in cases.cases()}
    names = list(every)
    for name, count, step in _steps(result, chosen, paper):
        probe = probe or attacks.Probe(of, real_models.weights_file("minilm").parent)
        release = every[name].defend(of)
        by = attacks.Countered(of, release, every[name], count)
        if step == "paper":
            found = result["paper"][name] = attacks.papers(by)
        else:
            row = attacks.attack(by, probe)
            result["rows"] = sorted([*result["rows"], row], key=lambda r: names.index(r["case"]))
            found = row["after"]
        if name not in result["costs"]:
            result["costs"][name] = attacks.cost(release, probe)
        result["seconds"] = round(time.perf_counter() - begin)
        result["processor"] = round(time.process_time() - used)
        say(f"{name}, n = {count}, {step}: {page.words(found)}")
        yield result


def _steps(
    result: dict[str, Any], names: Sequence[str], paper: int | None
) -> Iterator[tuple[str, int, str]]:
    """What is still to be run: defence, number of models, solver."""
    for count in result["settings"]["n"]:
        for name in names:
            rows = [row for row in result["rows"] if row["case"] == name]
            enough = any(page.recovered(row) for row in rows if row["n"] < count)
            if not enough and all(row["n"] != count for row in rows):
                yield name, count, "default solver"
    for name in names:
        if paper is not None and name not in result["paper"]:
            yield name, paper, "paper"


def _models(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that only say which rows there are."""
    return {key: value for key, value in settings.items() if key not in ("n", "paper's solver")}


def form(
    quick: bool, block: bool, set_name: str
) -> tuple[cases.Family, dict[str, Any], int | None]:
    """Models and settings of a form, and where the paper's solver runs.

    Args:
      quick: one block, three models.
      block: one block.
      set_name: the adapters.
    """
    counts, paper = ([3], None) if quick else ([3, 4, 5, 8], page.PAPER_MODELS)
    of = cases.family(set_name, quick or block)
    settings = {
        "set": set_name,
        "matrices": len(of.targets),
        "with real adapters": len(of.real),
        "rank of the adapters": of.rank,
        "rank of random updates in MLPs": cases.MLP_RANK,
        "rows of an MLP matrix": of.rows or "all",
        "n": counts,
        "paper's solver": f"n = {paper}, {attacks.STEPS} steps, core space" if paper else "not run",
        "texts": attacks.TEXTS,
    }
    return of, settings, paper


def _chosen() -> list[str]:
    """Names of the defences that the flags ask for."""
    if _ONLY.value:
        return [case.name for case in cases.cases() if case.name.startswith(tuple(_ONLY.value))]
    return [case.name for case in cases.cases() if case.quick or not _QUICK.value]


def main(argv: list[str]) -> int:
    """Runs the benchmark; 1 if a check fails."""
    if len(argv) > 1:
        raise app.UsageError("no arguments are expected")
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "defend.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    if not _AGAIN.value:
        begin = time.perf_counter()

        def say(text: str) -> None:
            print(f"{time.perf_counter() - begin:6.0f} s  {text}", file=sys.stderr, flush=True)

        machine = f"{jax.default_backend()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        of, settings, paper = form(_QUICK.value, _BLOCK.value, _SET.value)
        for so_far in measure(of, settings, paper, _chosen(), say, result):
            result = so_far | {"machine": machine}
            path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    figures.write(page.draw, result, path.with_suffix(".png"))
    text = page.text(result)
    print(text)
    if _DOCS.value:
        docs = ROOT / "docs" / "defend.md"
        docs.write_text(tables.put_between(docs.read_text(), page.MARKED, text))
        shutil.copy(path.with_suffix(".png"), docs.with_suffix(".png"))
    found = page.checks(result)
    print(f"\n{tables.checks_table(found)}")
    return tables.exit_code(found)


if __name__ == "__main__":
    app.run(main)
