"""Experiments with `jdetune.watch`, each with tables, checks against targets, JSON and a figure.

    python -m benchmarks.watch --experiment=unlearning
    python -m benchmarks.watch --experiment=backdoors --quick
    python -m benchmarks.watch --experiment=audit --again

``--again`` makes tables and figure from the JSON of a former run.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import jax
from absl import app, flags

from benchmarks import tables
from benchmarks.watch import figures

EXPERIMENTS = ("unlearning", "backdoors", "real", "chat", "audit", "recovered", "evasion")
_NAME = flags.DEFINE_enum("experiment", None, EXPERIMENTS, "Which one.", required=True)
_QUICK = flags.DEFINE_boolean("quick", False, "Fewer seeds and inputs, to see that it runs.")
_SEEDS = flags.DEFINE_integer("seeds", None, "How many; 5, or 1 with --quick.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "watch-out", "Folder for NAME.json and NAME.png.")
_AGAIN = flags.DEFINE_boolean("again", False, "Tables and figure of a former run.")


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
    print(f"settings: {json.dumps(result['settings'])}")
    print(f"{result['seconds']} s on {result['machine']}")
    for title, (header, rows) in experiment.tables(result).items():
        print(f"\n{title}\n\n{tables.table(header, rows)}")
    found = experiment.checks(result)
    print(f"\n{tables.checks_table(found)}")
    return tables.exit_code(found)


if __name__ == "__main__":
    app.run(main)
