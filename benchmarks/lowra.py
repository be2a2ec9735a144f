"""LoWRA Bench offline: the paper's tables and figures on real models, ours beside the paper's.

    python -m benchmarks.train_loras          # once; the adapters
    python -m benchmarks.lowra --all          # about an hour on two idle cores; a subset a core
    python -m benchmarks.lowra --quick        # minutes, on adapters that the repository holds
    python -m benchmarks.lowra --all --only=fig7,table4 --subsets=dinov2

Real subsets are adapters trained on real models; ``sd15`` and ``mistral7b`` are stand-ins of those
shapes, and are called so everywhere. Results lie in OUT: a folder a subset with ``cells.jsonl``,
``results.json``, ``tables.md``, and PNG and JSON of every figure. A run that was cut off goes on.
``--docs`` writes the page and copies the figures. The full grid of the paper (n from 2 to 15, ten
subsets, all layers) is ``--all --counts=2,3,4,5,6,7,8,9,10,11,12,13,14,15 --repeats=10
--layers=1000``; it takes days and can be cut off at any time.
"""

import dataclasses
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jdetune.cli.main import prepare_environment

if __name__ == "__main__":  # before JAX starts
    prepare_environment()

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from absl import app, flags  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from benchmarks import (  # noqa: E402
    lowra_checks,
    lowra_figures,
    lowra_plans,
    lowra_sources,
    lowra_tables,
    lowra_trace,
    solver_report,
    tables,
)
from benchmarks.lowra_plans import Plan  # noqa: E402
from jdetune.bench import ledger, protocol, report  # noqa: E402
from jdetune.bench.layers import Source, merge, spread  # noqa: E402
from jdetune.bench.methods import Task  # noqa: E402
from jdetune.bench.methods import run as run_method  # noqa: E402
from jdetune.checkpoint.index import read_json  # noqa: E402
from jdetune.checkpoint.writer import save_json, save_safetensors, save_text  # noqa: E402
from jdetune.cli.common import progress_bar  # noqa: E402
from jdetune.machine import cores  # noqa: E402
from jdetune.noise import ulp  # noqa: E402

FLAGS = flags.FLAGS
#: Models in the runs that are followed step by step.
TRACED_MODELS = 5
KEYS = (*lowra_figures.FIGURES, "table1", "table2", "table3", "table4", "fig2")


def define_flags() -> None:
    """The flags of this command."""
    flags.DEFINE_boolean("all", False, "All subsets.")
    flags.DEFINE_boolean("quick", False, "Committed adapters, few layers; minutes.")
    flags.DEFINE_list("subsets", None, f"Of {', '.join(lowra_plans.PLANS)}.")
    flags.DEFINE_list("only", None, f"Of {', '.join(KEYS)}; fig8 is Figures 8 to 11.")
    flags.DEFINE_list("counts", None, "Numbers of models n, instead of the subsets' own.")
    flags.DEFINE_integer("repeats", None, "Random subsets for each n.")
    flags.DEFINE_integer("layers", None, "At most so many layers of a subset.")
    flags.DEFINE_string("out", "benchmarks/results/lowra", "Folder to write.")
    flags.DEFINE_boolean("docs", False, "Write docs/results.md and copy the figures there.")
    flags.DEFINE_boolean("overwrite", False, "Drop results of other settings in --out.")
    flags.DEFINE_integer("workers", None, "Subsets side by side; as many as cores if left out.")
    flags.DEFINE_boolean("finish", True, "Tables, figures and checks once the subsets are done.")


def chosen() -> list[Plan]:
    """The plans that the flags ask for."""
    if FLAGS.quick == FLAGS.all:
        raise app.UsageError("give --all or --quick")
    plans = list(lowra_plans.QUICK) if FLAGS.quick else list(lowra_plans.PLANS.values())
    if FLAGS.subsets:
        unknown = set(FLAGS.subsets) - {plan.name for plan in plans}
        if unknown:
            raise app.UsageError(f"--subsets: no {', '.join(sorted(unknown))}")
        plans = [plan for plan in plans if plan.name in FLAGS.subsets]
    if set(FLAGS.only or ()) - set(KEYS):
        raise app.UsageError(f"--only: some of {', '.join(KEYS)}")
    changes: dict[str, Any] = {}
    if FLAGS.counts:
        changes["counts"] = tuple(int(n) for n in FLAGS.counts)
    if FLAGS.repeats:
        changes["repeats"] = FLAGS.repeats
    if FLAGS.layers:
        changes["layers"] = FLAGS.layers
    return [dataclasses.replace(plan, **changes) for plan in plans]


def wanted(key: str) -> bool:
    """Whether a table or figure is asked for."""
    return FLAGS.only is None or key in FLAGS.only


def say(text: str) -> None:
    """A line of progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def side_by_side(plans: list[Plan], workers: int) -> None:
    """Every subset in a process of its own, some at a time: the products are too small for cores.

    Results stay on disk. What fails here is tried, and fails, once more where all come together.
    """
    command = [sys.executable, "-m", "benchmarks.lowra", *sys.argv[1:]]  # a flag's last value holds

    def one(plan: Plan) -> None:
        own = [f"--subsets={plan.name}", "--workers=1", "--nofinish"]
        subprocess.run([*command, *own], check=False)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, plans))


def cells_on_disk(out: Path) -> int:
    """Results of all subsets, other settings' among them."""
    return sum(ledger.count_cells(path) for path in out.glob(f"*/{ledger.NAME}"))


def run_plan(plan: Plan, source: Source, out: Path, progress: Any) -> dict[str, Any]:
    """All results of one subset.

    Args:
      plan: the subset.
      source: its layers.
      out: its folder.
      progress: called after every cell.
    """
    settings = protocol.Settings(
        subset=plan.name,
        layers=tuple(spread(source.names, plan.layers)),
        counts=tuple(n for n in plan.counts if n <= len(source.models)),
        repeats=plan.repeats,
        steps=plan.steps,
    )

    def keep(key: protocol.Key, estimate: np.ndarray) -> None:
        if key.repeat == 0 and plan.model:
            save_safetensors(_estimate(out, key.layer, key.n, key.method), {"base": estimate})

    cells = protocol.run(source, settings, out, progress, FLAGS.overwrite, keep)
    noise, ranks = {}, set()
    for layer in source.read(settings.layers):
        spacing = np.asarray(ulp(jnp.asarray(layer.base)), np.float64)
        noise[layer.name] = float(np.log10(np.mean(np.square(spacing)) / 12))
        ranks |= {lora.rank for lora in layer.loras}
    value = report.content(source, settings, cells) | {
        "title": plan.title,
        "real": plan.real,
        "about": plan.about,
        "papers": plan.papers,
        "ranks": sorted(ranks),
        "gaps": lowra_checks.gaps(cells),
        "exposure": lowra_checks.exposure(cells, noise),
        "cells": cells,
    }
    del value["exit_code"]
    save_text(out / "tables.md", report.tables({**value, "figures": []}, cells))
    return value


def _estimate(out: Path, layer: str, n: int, method: str) -> Path:
    return out / "estimates" / f"{layer}-{n}-{method}.safetensors"


def cached(path: Path, about: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """What a file holds if it was made from the same, else made now and written."""
    if path.exists() and not FLAGS.overwrite:
        held = read_json(path)
        if held.get("about") == about:
            return held["value"]
    value = make()
    save_json(path, {"about": dict(about), "value": value})
    return value


def traces(plan: Plan, source: Source) -> dict[str, Any]:
    """The paper's algorithm step by step on some layers, with and without the scheduler."""
    models = protocol.draw_subsets(len(source.models), TRACED_MODELS, 1, 0)[0]
    on, off, ours = [], [], []
    for layer in source.read(spread(source.names, plan.traced)):
        base, merged = merge(layer, models)
        rank = max(layer.loras[model].rank for model in models)
        on.append(lowra_trace.paper_trace(merged, base, rank, plan.steps))
        off.append(lowra_trace.paper_trace(merged, base, rank, plan.steps, scheduled=False))
        found = run_method("jdetune", Task(base, merged, rank, plan.steps, 0))
        if found["w_error"] is not None:
            ours.append(found["w_error"])
        say(f"{plan.name}: {layer.name} {on[-1].errors[-1]:.2f} with the rank scheduler, "
            f"{off[-1].errors[-1]:.2f} without")  # fmt: skip
    return {
        "n": TRACED_MODELS,
        "layers": spread(source.names, plan.traced),
        "on": [dataclasses.asdict(trace) for trace in on],
        "off": [dataclasses.asdict(trace) for trace in off],
        "ours": float(np.mean(ours)) if ours else None,
        "ours_layers": ours,
    }


def sampled(plan: Plan, value: Mapping[str, Any], at: Any, out: Path) -> list[dict[str, Any]]:
    """Semantic metrics with the sampled layers replaced; without a base, the mean stands in."""
    from benchmarks import lowra_meaning

    settings = value["settings"]
    held: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    for n in settings["counts"]:
        for method in settings["methods"]:
            some = {}
            for layer in settings["layers"]:
                for named in (method, "mean-lora"):
                    path = _estimate(out, layer, n, named)
                    if path.exists():
                        some[layer] = load_file(path)["base"]
                        break
            held[n, method] = some
    say(f"{plan.name}: semantic metrics of {len(held)} estimates")
    return lowra_meaning.sampled(at, held)


def extend(plan: Plan, value: dict[str, Any], source: Source, out: Path, progress: Any) -> None:
    """Adds traces, semantic metrics and the whole model, as far as they are asked for."""
    about = {"models": list(source.models), "steps": plan.steps}
    stepwise = plan.traced and any(wanted(key) for key in ("fig5", "fig6", "fig12"))
    if stepwise and len(source.models) >= TRACED_MODELS:
        make = lambda: traces(plan, source)  # noqa: E731
        held = cached(out / "traces.json", about | {"traced": plan.traced}, make)
        on, off = ([lowra_trace.Trace(**trace) for trace in held[field]] for field in ("on", "off"))
        effects, found = lowra_trace.scheduler_effects(on, off), lowra_trace.correlation(on)
        value["traces"] = held | {"effects": effects, "correlation": found}
    if plan.model and not FLAGS.quick:
        from benchmarks import lowra_meaning, semantic

        meant = any(wanted(key) for key in ("fig8", "fig13", "table2", "table4"))
        texts = plan.whole and wanted("fig2")
        at = semantic.setting(plan.model) if meant or texts else None
        if meant:
            make = lambda: sampled(plan, value, at, out)  # noqa: E731
            some = {key: list(value["settings"][key]) for key in ("layers", "counts")}
            value["sampled"] = cached(out / "sampled.json", about | some, make)
        if texts and at is not None:
            make = lambda: lowra_meaning.whole(at, source, plan.steps, progress=progress)  # noqa: E731
            value["whole"] = cached(out / "whole.json", about, make)


def make_equivalence(source: Source, out: Path, steps: int) -> dict[str, Any]:
    """Core space against full space, once, on a layer of the first real subset."""
    (layer,) = source.read(source.names[:1])
    models = protocol.draw_subsets(len(source.models), min(5, len(source.models)), 1, 0)[0]
    base, merged = merge(layer, models)
    rank = max(layer.loras[model].rank for model in models)
    about = {"layer": layer.name, "models": list(models), "steps": steps, "rank": rank}
    make = lambda: lowra_trace.equivalence(merged, base, rank, steps)  # noqa: E731
    return cached(out / "equivalence.json", about, make)


def main(argv: list[str]) -> int:
    """Runs what the flags ask for, writes everything and prints the checks."""
    if len(argv) > 1:
        raise app.UsageError("python -m benchmarks.lowra takes flags only")
    plans, out, begin = chosen(), Path(FLAGS.out), time.monotonic()
    torch.set_num_threads(1)  # small products: its threads only wait for each other
    asked = " ".join(word for word in sys.argv[1:] if not word.startswith("--out"))
    results: dict[str, Any] = {
        "schema": "jdetune.bench.lowra/1",
        "command": f"python -m benchmarks.lowra {asked}",
        "machine": solver_report.machine(1),
        "subsets": {},
        "missing": {},
    }
    if FLAGS.all:
        left = [name for name in lowra_plans.PLANS if name not in {plan.name for plan in plans}]
        results["missing"] |= dict.fromkeys(left, "Left out by --subsets.")
    before = cells_on_disk(out)
    workers = min(FLAGS.workers or cores(), len(plans))
    if workers > 1:
        side_by_side(plans, workers)
        FLAGS.overwrite = False  # what they made is to be read
    sources: dict[str, Source] = {}

    def real(name: str) -> Source:
        if name not in sources:
            sources[name] = lowra_sources.real(name)
        return sources[name]

    with progress_bar(False) as progress:
        for plan in plans:
            try:
                source, like = lowra_plans.open_source(plan, real)
            except (FileNotFoundError, ModuleNotFoundError) as error:
                results["missing"][plan.name] = str(error)
                say(f"{plan.name}: left out. {error}")
                continue
            say(f"{plan.name}: {len(source.names)} layers, {len(source.models)} models")
            folder = out / plan.name
            value = run_plan(plan, source, folder, progress)
            value["like"] = None if like is None else dataclasses.asdict(like)
            extend(plan, value, source, folder, progress)
            save_json(folder / "results.json", value)
            results["subsets"][plan.name] = value
            if plan.real and FLAGS.finish and "equivalence" not in results:
                results["equivalence"] = make_equivalence(source, out, 300)
            say(f"{plan.name}: done, {(time.monotonic() - begin) / 60:.1f} min since the start")
    if not results["subsets"]:
        print("nothing to show:", *results["missing"].values(), sep="\n")
        return 3
    if not FLAGS.finish:
        return 0
    results["cells_made"] = max(cells_on_disk(out) - before, 0)
    results["cells_in_all"] = sum(len(s["cells"]) for s in results["subsets"].values())
    return finish(results, out, begin)


def finish(results: dict[str, Any], out: Path, begin: float) -> int:
    """Figures, page, JSON and checks."""
    keys = [key for key in lowra_figures.FIGURES if wanted(key)]
    pictures = lowra_figures.draw(results, keys, out)
    found = lowra_checks.checks(results)
    results["seconds"] = round(time.monotonic() - begin, 1)
    results["checks"] = [dataclasses.asdict(check) | {"passed": check.passed} for check in found]
    results["figures"] = pictures
    page = lowra_tables.document(results, found, pictures)
    save_json(out / "results.json", results)
    save_text(out / "results.md", page.replace("](results/", "]("))
    if FLAGS.docs:
        save_text("docs/results.md", page)
        for file in (name for files in pictures.values() for name in files):
            Path("docs/results").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(out / file, Path("docs/results") / file)
    print(solver_report.about(results["machine"] | {"torch": torch.__version__}))
    print(tables.checks_table(found))
    print(f"\n{out}/results.md, {out}/results.json; {results['seconds'] / 60:.1f} minutes")
    return tables.exit_code(found)


if __name__ == "__main__":
    define_flags()
    app.run(main)
