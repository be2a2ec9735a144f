"""Experiments with `jdetune.watch`, each with tables, checks against targets, JSON and a figure.

    python -m benchmarks.watch --experiment=unlearning
    python -m benchmarks.watch --experiment=backdoors --quick
    python -m benchmarks.watch --experiment=audit --again --docs

``--again`` makes tables and figure from the JSON of a former run. ``--docs`` puts them into
docs/watch.md, between the markers of the experiment, and docs/watch.
"""

import importlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from benchmarks import tables
from benchmarks.watch import EXPERIMENTS, figures

_NAME = flags.DEFINE_enum("experiment", None, EXPERIMENTS, "Which one.", required=True)
_QUICK = flags.DEFINE_boolean("quick", False, "Fewer seeds and inputs, to see that it runs.")
_SEEDS = flags.DEFINE_integer("seeds", None, "How many; 5, or 1 with --quick.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "watch-out", "Folder for NAME.json and NAME.png.")
_AGAIN = flags.DEFINE_boolean("again", False, "Tables and figure of a former run.")
_DOCS = flags.DEFINE_boolean("docs", False, "Put tables and figure into docs/watch.md.")
DOCS = Path(__file__).parent.parent.parent / "docs"


def main(argv: list[str]) -> int:
    """Runs an experiment; 1 if a check fails."""
    if len(argv) > 1:
        raise app.UsageError("no arguments are expected")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    experiment = importlib.import_module(f"benchmarks.watch.{_NAME.value}")
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{_NAME.value}.json"
    if _AGAIN.value:
        result = json.loads(path.read_text())
    else:
        begin, seeds = time.perf_counter(), _SEEDS.value or (1 if _QUICK.value else 5)

        def say(text: str) -> None:
            print(f"{time.perf_counter() - begin:6.0f} s  {text}", file=sys.stderr, flush=True)

        result = experiment.run(_QUICK.value, seeds, say, out / "models")
        result["seconds"] = round(time.perf_counter() - begin)
        result["machine"] = (
            f"{jax.default_backend()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        )
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    figures.write(experiment.draw, result, path.with_suffix(".png"))
    text = shown(result, experiment.tables(result))
    print(text)
    if _DOCS.value:
        page = DOCS / "watch.md"
        page.write_text(tables.put_between(page.read_text(), _NAME.value, text))
        shutil.copy(path.with_suffix(".png"), DOCS / "watch")
    found = experiment.checks(result)
    print(f"\n{tables.checks_table(found)}")
    return tables.exit_code(found)


def shown(result: dict[str, Any], found: dict[str, tuple[list[str], list[list[str]]]]) -> str:
    """Settings, seconds, and tables under their titles."""
    rows = (f"{title}:\n\n{tables.table(head, body)}" for title, (head, body) in found.items())
    said = f"{result['seconds']} s on {result['machine']}. Settings: "
    return "\n\n".join([said + f"`{json.dumps(result['settings'])}`", *rows])


if __name__ == "__main__":
    app.run(main)
