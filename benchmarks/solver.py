"""The solver's speed beside its accuracy, the paper's algorithm and the limit of the machine.

    python -m benchmarks.solver --out=benchmarks/results/cpu.json
    python -m benchmarks.solver --family=minilm,smollm2,dinov2
    python -m benchmarks.solver --row=512 --col=2048 --count=5 --rank=16

Every case is solved by ``jdetune.recover`` on NumPy stacks in memory: the closed form of several
layers in one call and of one layer alone, the same with float64 throughout (the reference of the
W-error), with all that follows it, and by the paper's algorithm in PyTorch on the same stacks and
machine, with JAX's number of threads or with one, whichever is faster. Runs are interleaved; before
the first and before short ones the same solver runs once untimed, so that none pays for memory that
another gave back.
The first call, which compiles, is timed apart. Seconds are of one layer. W-errors are means over
the same layers. Nothing else should run on the machine; the load before the run is printed.
Memory is as in any Python program; GLIBC_TUNABLES=glibc.malloc.hugetlb=1 shows both with huge
pages, which the command line of jdetune asks for.

The JSON is ``{"machine": {...}, "rows": [...]}``. A row has the fields of ``Case``, ``limit``
(``n_bytes``, ``flops``, ``seconds`` and the rates ``stream`` and ``gemm``) and ``solvers``: for
each its ``seconds`` (median), ``spread`` (least and most), ``runs``, ``compile_seconds``,
``w_error``, ``exact``, and ``failed``, the number of layers without a base. A solver that failed
has ``error`` in words, so has a row that could not be run. Where ``extrapolated``, the paper's
solver has ``step_seconds`` by rank, and no W-error.
"""

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jdetune.cli.main import prepare_environment

if __name__ == "__main__":  # before JAX starts
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # compile time is measured
    prepare_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from absl import app, flags  # noqa: E402

import jdetune  # noqa: E402
from benchmarks import limit, paper, solver_report, tables  # noqa: E402
from benchmarks.solver_families import FAMILIES, LARGE, Case  # noqa: E402
from jdetune import linalg  # noqa: E402
from jdetune.machine import cores  # noqa: E402
from jdetune.metrics import exact_fraction, log_mse  # noqa: E402
from jdetune.noise import as_merged  # noqa: E402
from jdetune.solvers import likelihood  # noqa: E402
from jdetune.solvers.pairs import noise_scales  # noqa: E402

#: Merged weights by tensor name.
Stacks = dict[str, np.ndarray]
#: From merged weights to bases.
Run = Callable[[Stacks], dict[str, np.ndarray]]
SOLVERS = ("closed form", "one layer", "float64", "full", "polish", "paper")
#: Seconds of a run from which it is not repeated.
SLOW = 30.0
#: Seconds of a run up to which an untimed one goes before every one; else before the first only.
SHORT = 5.0
FAILURES = (RuntimeError, ValueError, MemoryError, jdetune.RecoveryFailed)


def define_flags() -> None:
    """The flags of this command; other commands have some of the same names."""
    names = ["vit", "sd15-1280", "mistral7b-n8"]
    flags.DEFINE_list("family", names, f"Of {', '.join(FAMILIES)}.")
    flags.DEFINE_integer("row", None, "Rows of one made case, instead of --family.")
    flags.DEFINE_integer("col", None, "Its columns.")
    flags.DEFINE_integer("count", 5, "Its number of models.", lower_bound=3)
    flags.DEFINE_integer("rank", 16, "Its rank.")
    flags.DEFINE_integer("steps", 300, "Steps of the paper's solver on it.")
    flags.DEFINE_integer("layers", None, "Layers in a call; the case's own if left out.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Storage dtype.")
    flags.DEFINE_list("solver", list(SOLVERS), "Which solvers; the others are left out.")
    flags.DEFINE_integer("repeats", 3, "Timed runs of each.", lower_bound=1)
    flags.DEFINE_string("out", None, "JSON file to write; a plot goes beside it.")


def ours(solver: jdetune.SubspaceIntersection) -> Run:
    """``jdetune.recover`` with a solver; a layer that fails has a base of NaN."""

    def run(stacks: Stacks) -> dict[str, np.ndarray]:
        found = jdetune.recover(stacks, solver)
        return {name: np.asarray(found[name].base) for name in stacks}

    return run


def papers(case: Case) -> Run:
    """The paper's solver with the faster number of threads; its base in the dtype of the models."""
    threads: list[int] = []

    def run(stacks: Stacks) -> dict[str, np.ndarray]:
        wide = {name: stack.astype(np.float32) for name, stack in stacks.items()}
        if not threads:
            some = next(iter(wide.values()))
            threads.append(paper.faster_threads(some, case.rank, torch.get_num_threads()))
        before = torch.get_num_threads()
        torch.set_num_threads(threads[0])
        found = {n: paper.paper_in_torch(s, case.rank, case.steps) for n, s in wide.items()}
        torch.set_num_threads(before)
        return {name: base.astype(stacks[name].dtype) for name, base in found.items()}

    return run


def polishing() -> Run:
    """The refinement alone, from the updates of the closed form; without a base."""
    dtype = linalg.resolve_dtype("auto")
    compiled, ready = jax.jit(likelihood.most_likely), []

    def start(stack: np.ndarray) -> tuple[Any, ...]:
        found = jdetune.recover(stack, jdetune.SubspaceIntersection(polish=False), throw=True)
        weights = as_merged(jnp.asarray(stack))
        scales = jax.jit(noise_scales, static_argnums=1)(weights, dtype)
        left, right = (
            jnp.asarray(np.asarray(side), dtype)
            for side in (found.adapters.left, found.adapters.right)
        )
        worst = jnp.asarray(found.stats["conditioning"], dtype)
        ranks = jnp.asarray(np.asarray(found.ranks), jnp.int32)
        return weights, left, right, ranks, scales, worst

    def run(stacks: Stacks) -> dict[str, np.ndarray]:
        with linalg.scope(dtype):
            if not ready:
                ready.extend(start(next(iter(stacks.values()))))
            *arguments, worst = ready
            jax.block_until_ready(compiled(*arguments, conditioning=worst)[1])
        return {}

    return run


def solvers(case: Case, names: list[str]) -> dict[str, Run]:
    """Name to solver, as far as the case and ``names`` ask for it."""
    closed = ours(jdetune.SubspaceIntersection(polish=False))
    table = {
        "closed form": closed,
        "one layer": closed,
        "float64": ours(jdetune.SubspaceIntersection(polish=False, precision="float64")),
    }
    if case.row * case.col < LARGE:
        table["full"] = ours(jdetune.SubspaceIntersection())
        table["polish"] = polishing()
    if not case.extrapolate:
        table["paper"] = papers(case)
    return {name: run for name, run in table.items() if name in names}


def accuracy(bases: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean W-error and exact fraction over the layers that have a base."""
    known = {name: base for name, base in bases.items() if np.isfinite(base).all()}
    if not known:
        return {"w_error": None, "exact": None, "failed": len(bases)}
    return {
        "w_error": float(np.mean([log_mse(base, truth[n]) for n, base in known.items()])),
        "exact": float(np.mean([exact_fraction(base, truth[n]) for n, base in known.items()])),
        "failed": len(bases) - len(known),
    }


def run_case(case: Case, names: list[str], repeats: int) -> dict[str, Any]:
    """One row: every solver timed in turn, and the limit at the rates of this run.

    Args:
      case: shape, models and layers.
      names: which of ``SOLVERS``.
      repeats: timed runs of each.
    """
    pairs = case.stacks()
    if not pairs:
        raise ValueError(f"{case.name}: no matrix of this shape in the set")
    stacks = {name: stack for name, (_, stack) in pairs.items()}
    truth = {name: base for name, (base, _) in pairs.items()}
    first_name, first_stack = next(iter(stacks.items()))
    one, rest = {first_name: first_stack}, {n: s for n, s in stacks.items() if n != first_name}
    table, entries, times = solvers(case, names), {}, {}
    timed = {name: stacks if name == "closed form" else one for name in table}
    for name, run in table.items():
        clock = time.perf_counter()
        try:
            bases = run(timed[name])
            entries[name] = {"first": time.perf_counter() - clock}
            if name not in ("closed form", "one layer", "polish") and rest:
                bases |= run(rest)
        except FAILURES as error:
            entries[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        entries[name] |= accuracy(bases, truth) if bases else {}
        times[name] = [entries[name]["first"]] if name == "paper" else []  # nothing is compiled
    for repeat in range(repeats):
        for name, runs in times.items():
            if len(runs) > repeat or (runs and runs[0] > SLOW):
                continue
            if len(timed[name]) * (runs[0] if runs else 0.0) < SHORT:
                table[name](timed[name])
            clock = time.perf_counter()
            table[name](timed[name])
            runs.append((time.perf_counter() - clock) / len(timed[name]))
    for name, runs in times.items():
        median = statistics.median(runs)
        compiled = max(entries[name].pop("first") - len(timed[name]) * median, 0.0)
        entries[name] |= {
            "seconds": median,
            "spread": [min(runs), max(runs)],
            "runs": len(runs),
            "compile_seconds": 0.0 if name == "paper" else compiled,
        }
    if case.extrapolate and "paper" in names:
        entries["paper"] = extrapolated(case, first_stack)
    rates = limit.measure(case.row, case.col, case.rank)
    itemsize = first_stack.dtype.itemsize
    least = limit.limit(rates, case.n_models, case.row, case.col, case.rank, itemsize)
    return dataclasses.asdict(case) | {
        "name": case.name,
        "layers": len(stacks),
        "extrapolated": case.extrapolate,
        "solvers": entries,
        "limit": dataclasses.asdict(least) | dataclasses.asdict(rates),
    }


def extrapolated(case: Case, stack: np.ndarray) -> dict[str, Any]:
    """The paper's solver from a few steps at every rank, with the faster number of threads."""
    wide, before = stack.astype(np.float32), torch.get_num_threads()
    torch.set_num_threads(paper.faster_threads(wide, case.rank, before))
    found = paper.measure_steps(wide, case.rank, case.steps)
    torch.set_num_threads(before)
    return dataclasses.asdict(found) | {"compile_seconds": 0.0}


def chosen() -> list[Case]:
    """The cases that the flags name."""
    given = flags.FLAGS
    if given.row is not None:
        col = given.col or given.row
        made = Case("made", given.row, col, given.count, given.rank, given.steps)
        cases = [dataclasses.replace(made, extrapolate=given.row * col > 1280 * 1280)]
    else:
        unknown = set(given.family) - set(FAMILIES)
        if unknown:
            raise app.UsageError(f"--family: no {', '.join(sorted(unknown))}")
        cases = [case for name in given.family for case in FAMILIES[name]]
    if set(given.solver) - set(SOLVERS):
        raise app.UsageError(f"--solver: some of {', '.join(SOLVERS)}")
    cases = [dataclasses.replace(case, dtype=given.dtype) for case in cases]
    if given.layers is not None:
        cases = [dataclasses.replace(case, layers=given.layers) for case in cases]
    return cases


def main(argv: list[str]) -> int:
    """Runs the cases, prints tables and checks; the JSON is written after every case."""
    if len(argv) > 1:
        raise app.UsageError("python -m benchmarks.solver takes flags only")
    given, cases = flags.FLAGS, chosen()
    torch.set_num_threads(cores())
    result = {"machine": solver_report.machine(torch.get_num_threads()), "rows": []}
    asked = " ".join(word for word in sys.argv[1:] if not word.startswith("--out"))
    result["machine"] |= {"torch": torch.__version__, "flags": asked}
    print(solver_report.about(result["machine"]), flush=True)
    for case in cases:
        try:
            row = run_case(case, given.solver, given.repeats)
        except (*FAILURES, OSError, ImportError) as error:
            row = dataclasses.asdict(case) | {"name": case.name, "error": str(error)}
        result["rows"].append(row)
        print(solver_report.lines(row), flush=True)
        if given.out is not None:
            solver_report.save(result, Path(given.out))
    checks = solver_report.checks(result["rows"])
    print(solver_report.summary(result["rows"]), tables.checks_table(checks), sep="\n\n")
    if given.out is not None:
        solver_report.plot(result, Path(given.out).with_suffix(".png"))
    return tables.exit_code(checks)


if __name__ == "__main__":
    define_flags()
    app.run(main)
