"""Files in, files out: check, read group by group, recover, write base, adapters and report."""

import dataclasses
import datetime
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdetune import outfolder, report
from jdetune.ahead import drop, writing_ahead
from jdetune.busy import WRITE, Busy
from jdetune.checkpoint.adapter_formats import choose_format
from jdetune.checkpoint.index import Checkpoint, open_checkpoint
from jdetune.checkpoint.manifest import Plan, make_plan, select
from jdetune.checkpoint.sidefiles import code_note
from jdetune.checkpoint.writer import save_json
from jdetune.distributed import ALONE, Processes
from jdetune.errors import InputError
from jdetune.pages.files import write_pages
from jdetune.products import write_products
from jdetune.report import TensorResult
from jdetune.solving import (
    Options,
    Progress,
    RecoverFn,
    default_recover,
    group_bytes,
    left_out_of,
    solve_one_base,
)
from jdetune.status import Status

__all__ = ["Options", "check_out", "default_recover", "open_models", "plan_models", "run"]


def open_models(models: Sequence[str | Path], trust_remote_code: bool = False) -> list[Checkpoint]:
    """Opens the models and gives them names that are safe and unique.

    Args:
      models: folders or ``.safetensors`` files, at least three.
      trust_remote_code: also copy Python files, and config that makes transformers run them.

    Raises:
      InputError: fewer than three are given, or one cannot be read.
    """
    if len(models) < 3:
        raise InputError(
            f"{len(models)} model(s) given; at least three are needed. "
            f"{_capital(Status.TOO_FEW_MODELS.message)}"
        )
    opened = [open_checkpoint(path, trust_remote_code) for path in models]
    names, busy = outfolder.model_names(opened), Busy()
    pairs = zip(opened, names, strict=True)
    return [dataclasses.replace(c, name=name, busy=busy) for c, name in pairs]


def check_out(out: str | Path, checkpoints: Sequence[Checkpoint], options: Options) -> None:
    """Refuses an output folder that touches a model or holds somebody's files."""
    outfolder.check_out(Path(out), [c.path for c in checkpoints], options.overwrite)


def plan_models(
    checkpoints: Sequence[Checkpoint],
    options: Options,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> Plan:
    """Compares the models; raises InputError where fewer than three distinct ones are left."""
    choose_format(options.adapter_format, checkpoints[0])  # a dry run refuses what a run refuses
    wanted = select(options.include, options.exclude)
    step = None if progress is None else lambda done, total: progress("compare", done, total)
    plan = make_plan(checkpoints, wanted, step, processes, group_bytes(options))
    if len(plan.solved) < 3:
        same = [f"{name} equals {twin}" for name, twin in plan.duplicates]
        same += [f"{name} equals {twin} in every matrix" for name, twin in _near_twins(plan)]
        raise InputError(
            f"only {len(plan.solved)} distinct model(s): {', '.join(same)}. "
            f"{_capital(Status.TOO_FEW_MODELS.message)}"
        )
    return plan


def run(
    models: Sequence[str | Path],
    out: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
    recover_fn: RecoverFn | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Recovers base and adapters of merged checkpoints on disk.

    Args:
      models: folders or ``.safetensors`` files, at least three.
      out: folder for base, adapters and report; built in OUT/.jdetune and put in place at the end.
      options: how to run.
      progress: told of every step.
      recover_fn: stands in for ``jdetune.recover``.
      processes: who works along (``jdetune.distributed.join``); all see the same files.

    Returns:
      The report, as written to OUT/report.json; its ``summary.exit_code`` says how it went.

    Raises:
      JdetuneError: bad models or output folder; nothing is put in place.
    """
    with processes.together():
        return _run(models, Path(out), options or Options(), progress, recover_fn, processes)


def _run(
    models: Sequence[str | Path],
    out: Path,
    options: Options,
    progress: Progress | None,
    recover_fn: RecoverFn | None,
    processes: Processes,
) -> dict[str, Any]:
    started, clock = datetime.datetime.now(datetime.UTC), _Clock()
    checkpoints = open_models(models, options.trust_remote_code)
    form = choose_format(options.adapter_format, checkpoints[0])
    placed = processes.exchange(processes.first and outfolder.finish_placing(out))[0]
    if placed:  # all but that was done when the former run was killed
        done = report.read_report(out)
        sources = [report.source_text(report.source_entry(c)) for c in checkpoints]
        if [report.source_text(entry) for entry in done["inputs"]] == sources:
            return done
    check_out(out, checkpoints, options)
    processes.exchange("checked")
    plan = plan_models(checkpoints, options, progress, processes)
    clock.lap("compare")
    stage = out / outfolder.STAGE
    if processes.first:
        outfolder.start_stage(out, _state(plan, options), options.overwrite)
    processes.exchange("stage is there")
    with writing_ahead(plan, stage / "ahead", processes, group_bytes(options)) as begun:
        found, results, repairs = solve_one_base(
            plan, options, stage / outfolder.SOLVED, progress, recover_fn, processes
        )
    if found is not plan:
        drop(begun)  # other models have other majorities
    plan = found
    clock.lap("recover")
    base, left_out = None, {}
    with checkpoints[0].busy.doing(WRITE):
        written = write_products(
            plan, results, stage, options.masks, progress, processes, form, begun
        )
    if written is not None:
        dtypes = sorted({r.base_dtype for r in results if r.code is not None and r.base_dtype})
        said = ", ".join(dtypes) or None
        n_parameters, left_out = written
        base = {"dtype": said, "grid": said, "n_parameters": n_parameters}
    results = [_note_left_out(r, left_out) for r in results]
    clock.lap("write")
    head = report.top_level(
        command=options.command,
        started_at=started.isoformat(timespec="seconds"),
        seconds=clock.total,
        device=device_name() if plan.groups else "none",
        version=version(),
    )
    content = {
        **head,
        "timing": report.timing(clock.laps, clock.total, results, processes.count)
        | report.overlap(checkpoints[0].busy, clock.total),
        "inputs": _input_entries(checkpoints, plan, results),
        "base": base,
        "adapter_format": form,
        "summary": report.summary(results, base is not None),
        "warnings": [*repairs, *_warnings(plan, base is not None, left_out)],
        "tensors": [_tensor_entry(plan, result) for result in results],
    }
    processes.exchange("written")
    if processes.first:
        write_pages(stage, content)
        save_json(stage / "report.json", content)
        outfolder.place(out, stage)
    processes.exchange("in place")
    return content


def _state(plan: Plan, options: Options) -> dict[str, Any]:
    """What the results depend on: an interrupted run goes on only where all of it is the same."""
    import jax

    kept = ("include", "exclude", "masks", "max_memory", "adapter_format", "trust_remote_code")
    return {
        "models": {"names": [c.name for c in plan.checkpoints], "content": plan.fingerprint},
        "flags": {"solver": repr(options.solver), **{k: getattr(options, k) for k in kept}},
        "software": {"jdetune": version(), "jax": jax.__version__, "numpy": np.__version__}
        | {"device": device_name() if plan.groups else "none"},
    }


class _Clock:
    """Seconds of one stage after another."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Ends a stage."""
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start


def device_name() -> str:
    """The first device's kind, as JAX names it."""
    import jax

    device = jax.local_devices()[0]
    kind = device.device_kind
    return device.platform if kind == device.platform else f"{device.platform}: {kind}"


def version() -> str:
    """Version of jdetune."""
    from jdetune import __version__

    return __version__


def _near_twins(plan: Plan) -> list[tuple[str, str]]:
    """Models that equal another in every matrix, but not in every tensor."""
    names = [c.name for c in plan.checkpoints]
    return [(names[i], names[twin]) for i, twin in enumerate(plan.alike) if i != twin]


def _note_left_out(result: TensorResult, left_out: Mapping[str, str]) -> TensorResult:
    if result.plan.name not in left_out:
        return result
    note = f"an adapter leaves it out: {left_out[result.plan.name]}"
    return dataclasses.replace(result, reason="; ".join(filter(None, [result.reason, note])))


def _input_entries(
    checkpoints: Sequence[Checkpoint], plan: Plan, results: Sequence[TensorResult]
) -> list[dict[str, Any]]:
    """Entries of ``inputs``; ``left_out`` says why, and no rank is given where there is none."""
    reasons, places = dict(plan.left_out), {c.name: i for i, c in enumerate(plan.checkpoints)}
    entries = report.input_entries(checkpoints, [c.name for c in checkpoints], plan, results)
    for entry in entries:
        entry["left_out"] = reasons.get(entry["name"])
        if entry["ranks"] is not None:
            without = left_out_of(results, places[entry["name"]], damaged=True)
            entry["ranks"] = {n: r for n, r in entry["ranks"].items() if n not in without}
    return entries


def _tensor_entry(plan: Plan, result: TensorResult) -> dict[str, Any]:
    """An entry of ``tensors``; ``left_out`` names the models that have no update in it."""
    models = enumerate(plan.checkpoints)
    names = [c.name for i, c in models if left_out_of([result], i, damaged=True)]
    return {**report.tensor_entry(result), "left_out": names}


def _warnings(plan: Plan, written: bool, left_out: Mapping[str, str]) -> list[str]:
    twins = [
        f"{name} equals {twin} in every tensor and was dropped" for name, twin in plan.duplicates
    ]
    twins += [
        f"{name} equals {twin} in every matrix and was solved as one model with it"
        for name, twin in _near_twins(plan)
    ]
    missing = [t for t in plan.tensors if t.action in ("per_model", "failed", "skipped")]
    voted = [t for t in plan.tensors if t.action == "consensus"]
    lines = [*plan.warnings, *twins]
    template = plan.checkpoints[0]
    if written and not template.trusted:
        lines += code_note(template.name, template.root, template.side_files, "the base")
    if voted and written:
        own = "leave theirs out" if any(t.name in left_out for t in voted) else "keep their own"
        lines.append(
            f"{len(voted)} tensor(s), e.g. {voted[0].name}, are the majority's copy: "
            f"{voted[0].reason}, whose adapters {own}"
        )
    if missing and written:
        lines.append(
            f"the base lacks {len(missing)} tensor(s), e.g. {missing[0].name}: {missing[0].reason}"
        )
    return lines


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
