"""Recovers the planned matrices of checkpoints, and leaves out models of another base."""

import dataclasses
import functools
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jdetune import explain, report
from jdetune.behind import WriteBehind
from jdetune.busy import COMPUTE
from jdetune.checkpoint.index import Checkpoint
from jdetune.checkpoint.manifest import GROUP_BYTES, Plan, TensorPlan, make_plan, select
from jdetune.checkpoint.shapes import locate, read_stack
from jdetune.distributed import ALONE, Processes
from jdetune.errors import InputError
from jdetune.gathering import results_of
from jdetune.remerge import remerge
from jdetune.repair import NO_UPDATE
from jdetune.report import TensorResult
from jdetune.result import Recovery
from jdetune.status import Status
from jdetune.store import load_results, save_results

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
      masks: also write which elements of the base are certain.
      max_memory: bytes that weights may take at a time, on the host and on a device, beside what a
        single layer needs; a share of what is free if None.
      trust_remote_code: also copy Python files, and config that makes transformers run them.
      command: what to name in the report as the command.
      adapter_format: one of ``jdetune.checkpoint.adapter_formats.FORMATS``.
    """

    solver: Any = None
    include: str | None = None
    exclude: str | None = None
    overwrite: bool = False
    masks: bool = False
    max_memory: int | None = None
    trust_remote_code: bool = False
    command: str = "jdetune.pipeline.run"
    adapter_format: str = "auto"


def group_bytes(options: Options) -> int:
    """Size of a group of matrices: one is solved, one read ahead, results of a third written.

    What is left of the budget is the solver's, see ``solver_memory``.
    """
    if options.max_memory is None:
        return GROUP_BYTES
    return min(GROUP_BYTES, options.max_memory // 8)


def solver_memory(options: Options) -> int | None:
    """Bytes that are left for solving: half where it is the host's memory, else the device's."""
    if options.max_memory is None:
        return None
    import jax

    return options.max_memory // 2 if jax.default_backend() == "cpu" else options.max_memory


def solve_one_base(
    plan: Plan,
    options: Options,
    store: Path,
    progress: Progress | None = None,
    recover_fn: RecoverFn | None = None,
    processes: Processes = ALONE,
) -> tuple[Plan, list[TensorResult], list[str]]:
    """Recovers the planned matrices; a model that belongs to none of them is left out altogether.

    Args:
      plan: what to do.
      options: how to run.
      store: folder for results, the same for all processes; must stay as long as they are used.
      progress: told of every step.
      recover_fn: stands in for ``jdetune.recover``.
      processes: who works along.

    Returns:
      The plan that holds in the end (of the models that share a base), what came of every tensor,
      and what was repaired, in words.
    """
    results, notes = solve(
        plan, options, store / "first", progress, recover_fn, processes=processes
    )
    n_solved = sum(r.status == "recovered" for r in report.matrices(results))
    lines = explain.repairs(notes, n_solved)
    strangers = _strangers(plan, results)
    if not strangers:
        return plan, results, lines
    # the base is written like the first model that has it, and votes are taken without strangers
    places = [i for i, c in enumerate(plan.checkpoints) if c.name not in strangers]
    wanted = select(options.include, options.exclude)
    rest = make_plan(
        [plan.checkpoints[i] for i in places],
        wanted,
        processes=processes,
        group_bytes=group_bytes(options),
    )
    good = [r for r in results if r.code is not None and r.status == "recovered"]
    known = {r.plan.name: _of_models(r, places) for r in report.matrices(good)}
    results, notes = solve(rest, options, store / "rest", progress, recover_fn, known, processes)
    reasons = [(name, next(t for t in lines if t.startswith(f"{name} "))) for name in strangers]
    lines += explain.repairs(notes, len(results))
    rest = dataclasses.replace(
        rest,
        duplicates=plan.duplicates,
        warnings=(*(text for _, text in plan.left_out), *rest.warnings),
        left_out=(*plan.left_out, *reasons),
    )
    return rest, results, lines


def solve(
    plan: Plan,
    options: Options,
    store: Path,
    progress: Progress | None = None,
    recover_fn: RecoverFn | None = None,
    known: Mapping[str, TensorResult] | None = None,
    processes: Processes = ALONE,
) -> tuple[list[TensorResult], list[explain.Note]]:
    """Recovers the planned matrices, one group in memory at a time, but for those already known.

    Every process takes its share of the groups. What came of a group is written into ``store``,
    from where all processes take it in the end; what an interrupted run left there is not solved
    again.
    """
    known = known or {}
    planned = plan.matrices
    groups = [[name for name in group if name not in known] for group in plan.groups]
    groups = list(filter(None, groups))
    store.mkdir(parents=True, exist_ok=True)
    mine = processes.share([sum(math.prod(planned[n].shape) for n in group) for group in groups])
    total = sum(len(groups[index]) for index in mine)
    todo = [index for index in mine if not _group_file(store, index).exists()]
    done = total - sum(len(groups[index]) for index in todo)
    busy = plan.checkpoints[0].busy
    with WriteBehind(busy) as writer:
        for index, stacks in _read_ahead(plan, todo, groups):
            step = None if progress is None else functools.partial(_step, progress, done, total)
            with busy.doing(COMPUTE):
                results, notes = _solve_group(plan, stacks, options, step, recover_fn)
            writer.write(save_results, _group_file(store, index), results, notes)
            done += len(groups[index])
            if progress is not None:
                progress("recover", done, total)
    processes.exchange("solved")
    solved: dict[str, TensorResult] = {}
    notes = []
    for index in range(len(groups)):
        results, own = load_results(_group_file(store, index), planned)
        solved.update(results)
        notes += own
    solved |= {n: dataclasses.replace(known[n], plan=planned[n]) for n in planned if n in known}
    return results_of(plan, solved), notes


def _read_ahead(
    plan: Plan, indices: Sequence[int], groups: Sequence[Sequence[str]]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Stacks of the groups in order; the next group is read while one is worked on."""
    seen = [plan.checkpoints[i] for i in plan.solved]

    def read(index: int) -> dict[str, np.ndarray]:
        return {name: read_stack(seen, name) for name in groups[index]}

    with ThreadPoolExecutor(1) as reader:
        ahead = deque([reader.submit(read, index) for index in indices[:1]])
        for place, index in enumerate(indices):
            stacks = ahead.popleft().result()
            ahead.extend(reader.submit(read, after) for after in indices[place + 1 : place + 2])
            yield index, stacks
            del stacks


def _group_file(store: Path, index: int) -> Path:
    return store / f"group-{index:05d}.safetensors"


def _step(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress("recover", before + done, total)


def _solve_group(
    plan: Plan,
    stacks: Mapping[str, np.ndarray],
    options: Options,
    step: Callable[[int, int], None] | None,
    recover_fn: RecoverFn | None,
) -> tuple[dict[str, TensorResult], list[explain.Note]]:
    """Results and repairs of matrices of one shape."""
    recover = recover_fn or functools.partial(default_recover, max_memory=solver_memory(options))
    planned = plan.matrices
    rows = [plan.solved.index(i) for i in plan.alike]
    names = [c.name for c in plan.checkpoints]
    clock = time.monotonic()
    try:
        found = recover(stacks, solver=options.solver, progress=step)
    except ValueError as error:
        raise InputError(f"{next(iter(stacks))} ({len(stacks)} of its shape): {error}") from error
    seconds = (time.monotonic() - clock) / len(stacks)
    results, notes = {}, []
    for name in stacks:
        host = _of_all_models(_to_host(found[name]), rows)
        stack, groups_ = stacks[name][rows], _base_groups(host)
        code = Status(int(host.status))
        repaired = code.has_base and groups_.any()
        own = explain.notes_of(name, groups_, stack, names) if repaired else []
        text = [] if code is Status.OK else [explain.failure(code, groups_, stack, names)]
        text += [f"{note.model} {note.text}" for note in own]
        stored = [_stored(c, name, stack) for c in plan.checkpoints]
        result = _result(planned[name], host, stack, stored, options, seconds)
        results[name] = dataclasses.replace(result, reason=" ".join(text) or None)
        notes += own
    return results, notes


def default_recover(stacks: Mapping[str, np.ndarray], **options: Any) -> Mapping[str, Recovery]:
    """``jdetune.recover`` for models known to be distinct, imported when it is needed."""
    from jdetune.recovery import recover

    with warnings.catch_warnings():  # said with the models' names later
        warnings.simplefilter("ignore", explain.RepairWarning)
        # duplicates are known from whole checkpoints; equal in one group only, models have rank 0
        return recover(stacks, drop_duplicates=False, **options)


def _to_host(found: Recovery) -> Recovery:
    import jax

    return jax.tree.map(np.asarray, found)


def _of_all_models(found: Recovery, rows: Sequence[int]) -> Recovery:
    """Ranks, factors and groups of these models, from those of the models that the solver saw."""
    left, right = found.adapters.left[list(rows)], found.adapters.right[list(rows)]
    factors = dataclasses.replace(found.adapters, left=left, right=right)
    stats = {**found.stats, "base_group": _base_groups(found)[list(rows)]}
    return dataclasses.replace(found, ranks=found.ranks[list(rows)], adapters=factors, stats=stats)


def _of_models(result: TensorResult, places: Sequence[int]) -> TensorResult:
    """A result for some of its models."""
    again = result.remerged
    return dataclasses.replace(
        result,
        recovery=None if result.recovery is None else _of_all_models(result.recovery, places),
        remerged=None if again is None else tuple(again[i] for i in places),
    )


def _base_groups(found: Recovery) -> np.ndarray:
    """Each model's ``base_group``: 0 where the base was solved from it."""
    nothing = np.zeros(len(np.asarray(found.ranks)), np.int32)
    return np.asarray(found.stats.get("base_group", nothing)).astype(np.int32)


def _strangers(plan: Plan, results: Sequence[TensorResult]) -> list[str]:
    """Models that have another base in every matrix that was recovered."""
    solved = [r for r in report.matrices(results) if r.status == "recovered"]
    groups = [_base_groups(r.recovery) for r in solved if r.recovery]
    alone = np.all(np.array(groups) > 0, axis=0) if groups else ()
    return [c.name for c, yes in zip(plan.checkpoints, alone, strict=bool(groups)) if yes]


def left_out_of(
    results: Sequence[TensorResult], model: int, damaged: bool = False
) -> tuple[str, ...]:
    """Recovered matrices in which a model has another base.

    Args:
      results: what came of the tensors.
      model: index of the model.
      damaged: also those in which too much of it is not finite.
    """
    names = []
    for result in results:
        found = [part.recovery for part in report.matrices([result]) if part.recovery is not None]
        if result.status == "recovered":
            groups = [_base_groups(recovery)[model] for recovery in found]
            if any(group > 0 or (damaged and group == NO_UPDATE) for group in groups):
                names.append(result.plan.name)
    return tuple(names)


def _stored(checkpoint: Checkpoint, name: str, stack: np.ndarray) -> str:
    """What a model stores a matrix in; a stack of several dtypes is wider."""
    info = checkpoint.tensors.get(locate(checkpoint.tensors, name)[0])
    return str(stack.dtype) if info is None else info.dtype


def _result(
    plan: TensorPlan,
    found: Recovery,
    stack: np.ndarray,
    stored: Sequence[str],
    options: Options,
    seconds: float,
) -> TensorResult:
    code, rounding = Status(int(found.status)), getattr(options.solver, "rounding", "R1")
    return TensorResult(
        plan=plan,
        status="recovered" if code.has_base else "failed",
        recovery=found,
        method="SubspaceIntersection" if options.solver is None else type(options.solver).__name__,
        remerged=tuple(remerge(found, stack, stored, rounding)) if code.has_base else None,
        seconds=seconds,
        base_dtype=str(np.asarray(found.base).dtype) if code.has_base else None,
    )
