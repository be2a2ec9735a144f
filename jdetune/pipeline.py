"""Files in, files out: check, read group by group, recover, write base, adapters and report."""

import dataclasses
import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdetune import outfolder, report
from jdetune.checkpoint.adapter_reader import merge_peft
from jdetune.checkpoint.adapters import write_adapter
from jdetune.checkpoint.index import Checkpoint, open_checkpoint
from jdetune.checkpoint.manifest import Plan, TensorPlan, make_plan, read_stack, select
from jdetune.checkpoint.reader import raw_bytes, read_tensor
from jdetune.checkpoint.stacks import factors_of
from jdetune.checkpoint.writer import save_json, save_like
from jdetune.errors import InputError
from jdetune.report import TensorResult
from jdetune.result import Recovery
from jdetune.status import Status

#: Called with a stage's name, what is done and what there is to do.
Progress = Callable[[str, int, int], None]
#: ``jdetune.recover`` for a mapping of names.
RecoverFn = Callable[..., Mapping[str, Recovery]]


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
      solver: a solver of ``jdetune.solvers``; None for the default.
      include: regular expression; only matching matrices are recovered.
      exclude: regular expression; matching matrices are left out.
      overwrite: replace a former output.
      command: what to name in the report as the command.
    """

    solver: Any = None
    include: str | None = None
    exclude: str | None = None
    overwrite: bool = False
    command: str = "jdetune.pipeline.run"


def open_models(models: Sequence[str | Path]) -> list[Checkpoint]:
    """Opens the models and gives them names that are safe and unique.

    Raises:
      InputError: fewer than three are given, or one cannot be read.
    """
    if len(models) < 3:
        raise InputError(
            f"{len(models)} model(s) given; at least three are needed. "
            f"{_capital(Status.TOO_FEW_MODELS.message)}"
        )
    opened = [open_checkpoint(path) for path in models]
    names = outfolder.model_names(opened)
    return [dataclasses.replace(c, name=name) for c, name in zip(opened, names, strict=True)]


def check_out(out: str | Path, checkpoints: Sequence[Checkpoint], options: Options) -> None:
    """Refuses an output folder that touches a model or holds somebody's files."""
    outfolder.check_out(Path(out), [c.path for c in checkpoints], options.overwrite)


def plan_models(
    checkpoints: Sequence[Checkpoint], options: Options, progress: Progress | None = None
) -> Plan:
    """Compares the models; raises InputError where fewer than three distinct ones are left."""
    wanted = select(options.include, options.exclude)
    step = None if progress is None else lambda done, total: progress("compare", done, total)
    plan = make_plan(checkpoints, wanted, step)
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
) -> dict[str, Any]:
    """Recovers base and adapters of merged checkpoints on disk.

    Args:
      models: folders or ``.safetensors`` files, at least three.
      out: folder for base, adapters and report; built in OUT/.jdetune and put in place at the end.
      options: how to run.
      progress: told of every step.
      recover_fn: stands in for ``jdetune.recover``.

    Returns:
      The report, as written to OUT/report.json; its ``summary.exit_code`` says how it went.

    Raises:
      JdetuneError: bad models or output folder; nothing is put in place.
    """
    options = options or Options()
    out = Path(out)
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
    checkpoints = open_models(models)
    check_out(out, checkpoints, options)
    plan = plan_models(checkpoints, options, progress)
    stage = outfolder.start_stage(out)  # finds out whether OUT can be written before the work
    results = solve(plan, options, progress, recover_fn)
    results, base = _write(plan, results, stage, progress)
    head = report.top_level(
        command=options.command,
        started_at=started.isoformat(timespec="seconds"),
        seconds=time.monotonic() - clock,
        device=device_name() if plan.groups else "none",
        version=version(),
    )
    content = {
        **head,
        "inputs": report.input_entries(checkpoints, [c.name for c in checkpoints], plan, results),
        "base": base,
        "summary": report.summary(results, base is not None),
        "warnings": _warnings(plan, base is not None),
        "tensors": [report.tensor_entry(result) for result in results],
    }
    save_json(stage / "report.json", content)
    outfolder.place(out, stage)
    return content


def solve(
    plan: Plan,
    options: Options,
    progress: Progress | None = None,
    recover_fn: RecoverFn | None = None,
) -> list[TensorResult]:
    """Recovers the planned matrices, one group in memory at a time."""
    recover = recover_fn or default_recover
    solved: dict[str, TensorResult] = {}
    planned = {tensor.name: tensor for tensor in plan.tensors}
    total = sum(len(group) for group in plan.groups)
    seen = [plan.checkpoints[i] for i in plan.solved]
    rows = [plan.solved.index(i) for i in plan.alike]
    for group in plan.groups:
        before = len(solved)
        clock = time.monotonic()
        stacks = {name: read_stack(seen, name) for name in group}

        def step(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress("recover", before + done, total)

        try:
            found = recover(stacks, solver=options.solver, progress=step)
        except ValueError as error:
            raise InputError(f"{group[0]} ({len(group)} of its shape): {error}") from error
        seconds = (time.monotonic() - clock) / len(group)
        for name in group:
            host = _of_all_models(_to_host(found[name]), rows)
            solved[name] = _result(planned[name], host, stacks[name][rows], options, seconds)
        if progress is not None:
            progress("recover", len(solved), total)
    return [solved.get(t.name) or _copied(t) for t in plan.tensors]


def device_name() -> str:
    """The first device's kind, as JAX names it."""
    import jax

    device = jax.devices()[0]
    kind = device.device_kind
    return device.platform if kind == device.platform else f"{device.platform}: {kind}"


def version() -> str:
    """Version of jdetune."""
    from jdetune import __version__

    return __version__


def default_recover(stacks: Mapping[str, np.ndarray], **options: Any) -> Mapping[str, Recovery]:
    """``jdetune.recover`` for models known to be distinct, imported when it is needed."""
    from jdetune.recovery import recover

    # duplicates are known from whole checkpoints; equal in one group only, models are rank 0 there
    return recover(stacks, drop_duplicates=False, **options)


def _to_host(found: Recovery) -> Recovery:
    import jax

    return jax.tree.map(np.asarray, found)


def _of_all_models(found: Recovery, rows: Sequence[int]) -> Recovery:
    """Ranks and factors for every model, from those of the models that the solver saw."""
    left, right = found.adapters.left[list(rows)], found.adapters.right[list(rows)]
    factors = dataclasses.replace(found.adapters, left=left, right=right)
    return dataclasses.replace(found, ranks=found.ranks[list(rows)], adapters=factors)


def _near_twins(plan: Plan) -> list[tuple[str, str]]:
    """Models that equal another in every matrix, but not in every tensor."""
    names = [c.name for c in plan.checkpoints]
    return [(names[i], names[twin]) for i, twin in enumerate(plan.alike) if i != twin]


def _result(
    plan: TensorPlan, found: Recovery, stack: np.ndarray, options: Options, seconds: float
) -> TensorResult:
    code = Status(int(found.status))
    return TensorResult(
        plan=plan,
        status="recovered" if code.has_base else "failed",
        recovery=found,
        method="SubspaceIntersection" if options.solver is None else type(options.solver).__name__,
        remerge_match=_remerge_match(found, stack) if code.has_base else None,
        seconds=seconds,
        reason=None if code is Status.OK else code.message,
        base_dtype=str(np.asarray(found.base).dtype) if code.has_base else None,
    )


def _remerge_match(found: Recovery, stack: np.ndarray) -> tuple[float, ...]:
    """Share of elements a model where merging base and factors gives the stored value."""
    matches = []
    for i, merged in enumerate(stack):
        left, right = factors_of({"": found}, i)[""]
        again = merge_peft(np.asarray(found.base), left, right).astype(merged.dtype)
        matches.append(float(np.mean(raw_bits(again) == raw_bits(merged))))
    return tuple(matches)


def raw_bits(array: np.ndarray) -> np.ndarray:
    """The elements as integers of their own width."""
    return raw_bytes(array).view(f"u{array.dtype.itemsize}")


def _copied(plan: TensorPlan) -> TensorResult:
    status = plan.action
    dtype = plan.dtype if plan.source is not None else None
    return TensorResult(plan=plan, status=status, base_dtype=dtype)


def _write(
    plan: Plan, results: list[TensorResult], stage: Path, progress: Progress | None
) -> tuple[list[TensorResult], dict[str, Any] | None]:
    """Writes base and adapters into the stage; nothing if no differing matrix has a base."""
    found = {r.plan.name: r.recovery for r in results if r.recovery and r.status == "recovered"}
    if plan.groups and not found:
        return results, None
    sources = {r.plan.name: r.plan.source for r in results}

    def get_tensor(name: str) -> np.ndarray | None:
        if name in found:
            return np.asarray(found[name].base)
        source = sources.get(name)
        return None if source is None else read_tensor(plan.checkpoints[source], name)

    total = len(plan.checkpoints) + 1
    n_parameters = save_like(_full_template(plan, sources), stage / "base", get_tensor)
    per_model = tuple(r.plan.name for r in results if r.status == "per_model")
    left_out: set[str] = set()
    for i, checkpoint in enumerate(plan.checkpoints):
        if progress is not None:
            progress("write", i + 1, total)
        folder = stage / "adapters" / checkpoint.name
        own, unfit = _own_copies(plan, checkpoint)
        written = write_adapter(folder, factors_of(found, i), checkpoint, per_model + own)
        left_out.update(written.left_out, unfit)
    if progress is not None:
        progress("write", total, total)
    dtypes = sorted({r.base_dtype for r in results if r.recovery and r.base_dtype})
    base = {"dtype": ", ".join(dtypes) or None, "grid": None, "n_parameters": n_parameters}
    return [_note_left_out(r, left_out) for r in results], base


def _own_copies(plan: Plan, checkpoint: Checkpoint) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tensors in which a model differs from the majority: of the base's shape, and of another."""
    own, unfit = [], []
    for tensor in plan.tensors:
        if tensor.action != "consensus" or tensor.source is None:
            continue
        source, name = plan.checkpoints[tensor.source], tensor.name
        if name not in checkpoint.tensors or source is checkpoint:
            continue
        if checkpoint.tensors[name].shape != source.tensors[name].shape:
            unfit.append(name)
        elif not _equal(read_tensor(checkpoint, name), read_tensor(source, name)):
            own.append(name)
    return tuple(own), tuple(unfit)


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    same = first.dtype == second.dtype
    return same and np.array_equal(raw_bytes(first), raw_bytes(second))


def _full_template(plan: Plan, sources: Mapping[str, int | None]) -> Checkpoint:
    """The first model, with the tensors that only a majority of the others holds."""
    template = plan.checkpoints[0]
    extra = {
        name: dataclasses.replace(plan.checkpoints[s].tensors[name], file=template.files[-1])
        for name, s in sources.items()
        if s is not None and name not in template.tensors
    }
    return dataclasses.replace(template, tensors={**template.tensors, **extra})


def _note_left_out(result: TensorResult, left_out: set[str]) -> TensorResult:
    if result.plan.name not in left_out:
        return result
    note = "an adapter leaves it out: PEFT holds weights of modules only, in the base's shapes"
    return dataclasses.replace(result, reason="; ".join(filter(None, [result.reason, note])))


def _warnings(plan: Plan, written: bool) -> list[str]:
    twins = [
        f"{name} equals {twin} in every tensor and was dropped" for name, twin in plan.duplicates
    ]
    twins += [
        f"{name} equals {twin} in every matrix and was solved as one model with it"
        for name, twin in _near_twins(plan)
    ]
    missing = [t.name for t in plan.tensors if t.action in ("per_model", "failed", "skipped")]
    lines = [*plan.warnings, *twins]
    if missing and written:
        lines.append(f"the base lacks {len(missing)} tensor(s); see their reasons")
    return lines


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
