"""The solver's speed beside its accuracy, the paper's algorithm and the limit of the machine.

    python -m benchmarks.solver --out=benchmarks/results/cpu.json
    python -m benchmarks.solver --family=minilm,smollm2,dinov2
    python -m benchmarks.solver --row=512 --col=2048 --count=5 --rank=16 --polish=false

Every case is solved by ``jdetune.recover`` on NumPy stacks in memory: the closed form, the same
with float64 throughout (the reference of the W-error), with all that follows it, and by the paper's
algorithm in PyTorch on the same stacks with the same number of threads. Runs are interleaved and
medians are printed; the first call, which compiles, is timed apart. Seconds are of one layer.

The JSON is ``{"machine": {...}, "rows": [...]}``; a row has the case's fields, ``limit`` (bytes,
flops, seconds, rates), and for each solver of ``solvers`` ``seconds`` (median), ``spread``
(quartiles), ``compile_seconds``, ``w_error``, ``exact``; a solver that failed has ``error`` in
words. ``extrapolated`` says that the baseline was timed on a few steps.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jdetune.cli.main import prepare_environment

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # compile time is measured
prepare_environment()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from absl import app, flags  # noqa: E402

import jdetune  # noqa: E402
from benchmarks import limit, paper, solver_report  # noqa: E402
from benchmarks.solver_families import FAMILIES, LARGE, Case  # noqa: E402
from jdetune.machine import cores  # noqa: E402
from jdetune.metrics import exact_fraction, log_mse  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_list("family", ["vit", "sd15-1280", "mistral7b-n8"], f"Of {', '.join(FAMILIES)}.")
flags.DEFINE_integer("row", None, "Rows of one made case, instead of --family.")
flags.DEFINE_integer("col", None, "Its columns.")
flags.DEFINE_integer("count", 5, "Its number of models.", lower_bound=3)
flags.DEFINE_integer("rank", 16, "Its rank.")
flags.DEFINE_integer("steps", 300, "Steps of the paper's solver on it.")
flags.DEFINE_integer("layers", None, "Layers in a call; the case's own if left out.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Storage dtype.")
flags.DEFINE_list(
    "solver", ["closed form", "float64", "full", "paper"], "Which solvers; the others are left out."
)
flags.DEFINE_integer("repeats", 3, "Timed runs of each.", lower_bound=1)
flags.DEFINE_boolean("polish", True, "Also the full solver, on layers below 2^23 elements.")
flags.DEFINE_string("out", None, "JSON file to write; a plot goes beside it.")


def solvers(case: Case) -> dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]]:
    """Name to a function from merged stacks to bases."""

    def ours(solver: jdetune.SubspaceIntersection) -> Callable:
        def run(stacks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = jdetune.recover(stacks, solver, throw=True)
            return {name: np.asarray(found[name].base) for name in stacks}

        return run

    def the_papers(stacks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        wide = {name: stack.astype(np.float32) for name, stack in stacks.items()}
        return {n: paper.paper_in_torch(s, case.rank, case.steps) for n, s in wide.items()}

    table: dict[str, Callable] = {
        "closed form": ours(jdetune.SubspaceIntersection(polish=False)),
        "float64": ours(jdetune.SubspaceIntersection(polish=False, precision="float64")),
    }
    if FLAGS.polish and case.row * case.col < LARGE:
        table["full"] = ours(jdetune.SubspaceIntersection())
    if not case.extrapolate:
        table["paper"] = the_papers
    return {name: run for name, run in table.items() if name in FLAGS.solver}


def run_case(case: Case) -> dict[str, Any]:
    """One row: every solver timed in turn, and the limit at the rates of this run."""
    truth_and_stack = case.stacks()
    stacks = {name: stack for name, (_, stack) in truth_and_stack.items()}
    if not stacks:
        raise ValueError(f"{case.name}: no matrix of this shape in the set")
    one = dict([next(iter(stacks.items()))])
    times: dict[str, list[float]] = {}
    entries: dict[str, dict[str, Any]] = {}
    table = solvers(case)
    slow = {"paper", "float64", "full"}
    for name, run in table.items():
        clock = time.perf_counter()
        try:
            bases = run(one if name in slow else stacks)
        except (RuntimeError, ValueError, jdetune.RecoveryFailed) as error:
            entries[name] = {"error": str(error)}
            continue
        first = time.perf_counter() - clock
        truth = [(bases[n], truth_and_stack[n][0]) for n in bases]
        entries[name] = {
            "first_seconds": first,
            "w_error": float(np.mean([log_mse(base, true) for base, true in truth])),
            "exact": float(np.mean([exact_fraction(base, true) for base, true in truth])),
        }
        times[name] = []
    for repeat in range(FLAGS.repeats):
        for name in times:
            if name in slow and repeat > 0 and times[name][0] > 20:
                continue
            clock = time.perf_counter()
            table[name](one if name in slow else stacks)
            layers = 1 if name in slow else len(stacks)
            times[name].append((time.perf_counter() - clock) / layers)
    for name, runs in times.items():
        layers = 1 if name in slow else len(stacks)
        entries[name] |= {
            "seconds": statistics.median(runs),
            "spread": [min(runs), max(runs)],
            "runs": len(runs),
        }
        compiled = entries[name].pop("first_seconds") - layers * entries[name]["seconds"]
        entries[name]["compile_seconds"] = 0.0 if name == "paper" else max(compiled, 0.0)
    if case.extrapolate and "paper" in FLAGS.solver:
        wide = next(iter(stacks.values())).astype(np.float32)
        guess = paper.measure_steps(wide, case.rank, case.steps)
        entries["paper"] = dataclasses.asdict(guess) | {"runs": 2}
    rates = limit.measure(case.row, case.col, case.rank)
    itemsize = next(iter(stacks.values())).dtype.itemsize
    least = limit.limit(rates, case.n_models, case.row, case.col, case.rank, itemsize)
    return dataclasses.asdict(case) | {
        "name": case.name,
        "layers": len(stacks),
        "extrapolated": case.extrapolate,
        "solvers": entries,
        "limit": dataclasses.asdict(least) | dataclasses.asdict(rates),
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import jax

    model = "unknown"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(x for x in lines if x.startswith("model name")).split(":")[1].strip()
    except (OSError, StopIteration):
        pass
    return {
        "device": jax.devices()[0].device_kind,
        "processor": model,
        "cores": cores(),
        "torch_threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "torch": torch.__version__,
        "jdetune": jdetune.__version__,
    }


def chosen() -> list[Case]:
    """The cases that the flags name."""
    if FLAGS.row is not None:
        col = FLAGS.col or FLAGS.row
        extrapolate = FLAGS.row * col > 1280 * 1280
        made = Case("made", FLAGS.row, col, FLAGS.count, FLAGS.rank, FLAGS.steps)
        cases = [dataclasses.replace(made, extrapolate=extrapolate)]
    else:
        unknown = set(FLAGS.family) - set(FAMILIES)
        if unknown:
            raise app.UsageError(f"--family: no {', '.join(sorted(unknown))}")
        cases = [case for name in FLAGS.family for case in FAMILIES[name]]
    cases = [dataclasses.replace(case, dtype=FLAGS.dtype) for case in cases]
    if FLAGS.layers is not None:
        cases = [dataclasses.replace(case, layers=FLAGS.layers) for case in cases]
    return cases


def main(argv: list[str]) -> None:
    """Runs the cases, prints the table and writes the JSON after every case."""
    del argv
    torch.set_num_threads(cores())
    result = {"machine": machine(), "rows": []}
    print(solver_report.about(result["machine"]), flush=True)
    for case in chosen():
        try:
            row = run_case(case)
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            row = dataclasses.asdict(case) | {"name": case.name, "error": str(error)}
        result["rows"].append(row)
        print(solver_report.lines(row), flush=True)
        if FLAGS.out is not None:
            Path(FLAGS.out).parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(result, indent=1, allow_nan=False)
            Path(FLAGS.out).write_text(text + "\n", encoding="utf-8")
    print(solver_report.summary(result["rows"]))
    if FLAGS.out is not None:
        solver_report.plot(result, Path(FLAGS.out).with_suffix(".png"))


if __name__ == "__main__":
    app.run(main)
