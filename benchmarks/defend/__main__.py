"""What protects a release from recovery: every defence, its cost, recovery before and after.

    python -m benchmarks.defend --quick          # one block, n = 3
    python -m benchmarks.defend --docs           # the whole model, n = 3, 4, 5, 8; docs/defend.md
    python -m benchmarks.defend --again --docs   # tables and figure of a former run

prints tables, writes OUT/defend.json (after every case: a run that was stopped goes on) and
OUT/defend.png, and with ``--docs`` the tables between the markers of docs/defend.md and its figure.
Ends with exit code 1 if a check fails: a base of status
OK that is worse than predicted, or coordinates whose change moved the model's outputs.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
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
_QUICK = flags.DEFINE_boolean("quick", False, "One block, n = 3, without the paper's solver.")
_OUT = flags.DEFINE_string("out", "defend-out", "Folder for defend.json and defend.png.")
_DOCS = flags.DEFINE_boolean("docs", False, "Write the tables and the figure of docs/defend.md.")
_AGAIN = flags.DEFINE_boolean("again", False, "Tables and figure of a former run.")


def measure(
    quick: bool, set_name: str, say: Callable[[str], None], known: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """All rows, case by case.

    Args:
      quick: fewer matrices and models.
      set_name: the adapters.
      say: told of every case.
      known: what a run that was stopped had; its cases are not run again.

    Yields:
      The result so far.
    """
    counts, paper = ([3], None) if quick else ([3, 4, 5, 8], 5)
    of = cases.family(set_name, max(counts), quick)
    settings = {
        "set": set_name,
        "matrices": len(of.targets),
        "with real adapters": len(of.real),
        "rank of the adapters": of.rank,
        "rank of random updates in MLPs": cases.MLP_RANK,
        "n": counts,
        "paper's solver": f"n = {paper}, {attacks.STEPS} steps, core space" if paper else "not run",
        "texts": attacks.TEXTS,
    }
    result = {"settings": settings, "rows": [], "costs": {}, "seconds": 0}
    if known.get("settings") == settings:
        result = known
    probe, begin = None, time.perf_counter() - result["seconds"]
    for case in cases.cases():
        if case.name in result["costs"]:
            continue
        probe = probe or attacks.Probe(of, real_models.weights_file("minilm").parent)
        release = case.defend(of)
        result["rows"] += attacks.attack(of, release, case, counts, paper, probe)
        result["costs"][case.name] = attacks.cost(release, probe)
        result["seconds"] = round(time.perf_counter() - begin)
        say(f"{case.name}: {page.words(result['rows'][-1]['after'])}")
        yield result


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
        for so_far in measure(_QUICK.value, _SET.value, say, result):
            result = so_far | {"machine": machine}
            path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    figures.write(page.draw, result, path.with_suffix(".png"))
    text = page.text(result)
    print(text)
    if _DOCS.value:
        page.put(text, ROOT / "docs" / "defend.md")
        shutil.copy(path.with_suffix(".png"), ROOT / "docs" / "defend.png")
    found = page.checks(result)
    print(f"\n{tables.checks_table(found)}")
    return tables.exit_code(found)


if __name__ == "__main__":
    app.run(main)
