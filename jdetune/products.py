"""Writes base, adapters and masks of a recovery; each process writes its share of the files."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdetune.checkpoint.adapter_formats import write_as
from jdetune.checkpoint.index import Checkpoint
from jdetune.checkpoint.manifest import Plan
from jdetune.checkpoint.pipeline_folder import home_file, is_pipeline
from jdetune.checkpoint.placement import BARE
from jdetune.checkpoint.reader import deferred, numpy_dtype, raw_bytes, read_tensor
from jdetune.checkpoint.shapes import units
from jdetune.checkpoint.stacks import factors_of
from jdetune.checkpoint.stream import Begun
from jdetune.checkpoint.ties import is_alias, is_tied
from jdetune.checkpoint.vocabulary import fit_side_files, resized
from jdetune.checkpoint.writer import Shard, finish_shards, save_safetensors, save_shard
from jdetune.deferred import Deferred
from jdetune.distributed import ALONE, Processes
from jdetune.report import TensorResult, matrices
from jdetune.result import Recovery
from jdetune.solving import Progress, left_out_of

MASKS_NAME = "masks.safetensors"


def write_products(
    plan: Plan,
    results: Sequence[TensorResult],
    stage: Path,
    masks: bool = False,
    progress: Progress | None = None,
    processes: Processes = ALONE,
    adapter_format: str = "peft",
    begun: Mapping[str, Begun] | None = None,
) -> tuple[int, dict[str, str]] | None:
    """Writes base, adapters and masks into a folder; nothing if no differing matrix has a base.

    Args:
      plan: what was planned.
      results: what came of every tensor.
      stage: the folder, the same for all processes.
      masks: also which elements of the base are certain.
      progress: told of every file.
      processes: who writes along; index and side files are the first one's.
      adapter_format: what ``choose_format`` returned.
      begun: of the base's files, by the template's: what was written while others were solved.

    Returns:
      Number of the base's parameters, and tensors that an adapter leaves out with the reason; None
      if nothing was written.
    """
    solved = {r.plan.name: r for r in results if r.code is not None and r.status == "recovered"}
    if plan.groups and not solved:
        return None
    sources = {r.plan.name: r.plan.source for r in results}
    template = full_template(plan, sources)

    def get_tensor(name: str) -> Any:
        if name in solved:
            return base_of(solved[name])
        source = sources.get(name)
        return None if source is None else deferred(plan.checkpoints[source], name)

    mine = share_of_files(template, plan, processes)
    shards: list[Shard] = []
    left_out: dict[str, str] = {}
    for done, file in enumerate(mine):
        if isinstance(file, str):
            own = (begun or {}).get(file)
            shards.append(save_shard(template, stage / "base", file, get_tensor, own))
        else:
            left_out |= _write_adapter(plan, file, results, stage, adapter_format)
        if progress is not None:
            progress("write", done + 1, len(mine))
    if masks and processes.index == processes.count - 1:
        save_safetensors(stage / MASKS_NAME, {n: mask_of(r) for n, r in solved.items()})
    written = processes.exchange({"shards": shards, "left_out": left_out})
    everything = [Shard(*shard) for part in written for shard in part["shards"]]
    if processes.first:
        finish_shards(template, stage / "base", everything)
        fit_side_files(plan.checkpoints, stage / "base")
    left_out = {name: why for part in written for name, why in part["left_out"].items()}
    return sum(shard.n_parameters for shard in everything), left_out


def share_of_files(template: Checkpoint, plan: Plan, processes: Processes) -> list[str | int]:
    """What one process writes: files of the base, and adapters by the index of their model."""
    files: list[str | int] = [*template.files, *range(len(plan.checkpoints))]
    return files[processes.index :: processes.count]


def base_of(result: TensorResult) -> Deferred:
    """The base of a recovered tensor in its own shape, read when it is written."""
    assert result.base_dtype is not None
    dtype = numpy_dtype(result.base_dtype)
    return _whole(result, dtype, lambda found: np.asarray(found.base).astype(dtype))


def mask_of(result: TensorResult) -> Deferred:
    """Which of its elements are certain, as bytes, read when it is written."""
    byte = np.dtype(np.uint8)
    return _whole(result, byte, lambda found: np.asarray(found.certain).astype(byte))


def _whole(
    result: TensorResult, dtype: np.dtype, part: Callable[[Recovery], np.ndarray]
) -> Deferred:
    """An array of a tensor's shape from those of its matrices."""
    shape = result.plan.shape

    def read() -> np.ndarray:
        array = np.empty(shape, dtype)
        found = [matrix.recovery for matrix in matrices([result]) if matrix.recovery is not None]
        rows = array.reshape(len(found), -1)
        for row, recovery in zip(rows, found, strict=True):
            row[:] = part(recovery).reshape(-1)
        return array

    return Deferred(dtype, shape, read)


def _write_adapter(
    plan: Plan, model: int, results: Sequence[TensorResult], stage: Path, adapter_format: str
) -> dict[str, str]:
    """Writes one model's adapter; returns the tensors that it cannot hold, with the reason."""
    checkpoint = plan.checkpoints[model]
    tied, heads = _tied_heads(plan, model)
    kept = [r for r in results if r.plan.name not in tied]
    good = [r for r in kept if r.status == "recovered"]
    found = _factors(good, model)
    per_model = tuple(r.plan.name for r in kept if r.status == "per_model")
    own, unfit = _own_copies(plan, checkpoint)
    whole = per_model + own + left_out_of(results, model) + resized(checkpoint) + heads
    folder = stage / "adapters" / checkpoint.name
    written = write_as(adapter_format, folder, found, checkpoint, whole)
    return {**written.reasons, **dict.fromkeys(unfit, BARE)}


def _factors(results: Sequence[TensorResult], model: int) -> dict[str, Any]:
    """A model's factors by matrix name; a tied head's under its own name."""
    found = {}
    for result in results:
        for name, part in zip(units(result.plan.info), matrices([result]), strict=True):
            if part.recovery is not None:
                found[name] = part.recovery
    return factors_of(found, model)


def _tied_heads(plan: Plan, model: int) -> tuple[set[str], tuple[str, ...]]:
    """Heads that are one with their embedding in the base: those also one in this model, and not.

    The embedding's update is merged into such a head too, since both have one storage. Factors of
    the head's own would count there as well, and twice where they are the same; a head of its own
    is kept whole.
    """
    template = plan.checkpoints[0]
    same, apart = set(), []
    for head, (embedding, equal) in plan.ties.items():
        lacks = head not in template.tensors or is_alias(template, head, embedding)
        if lacks or is_tied(template.config):
            if equal[model]:
                same.add(head)
            elif head in plan.checkpoints[model].tensors:
                apart.append(head)
    return same, tuple(apart)


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


def full_template(plan: Plan, sources: Mapping[str, int | None]) -> Checkpoint:
    """The first model, with the tensors that only a majority of the others holds."""
    template = plan.checkpoints[0]
    own = {
        name: info
        for name, info in template.tensors.items()
        if name not in plan.ties or not is_alias(template, name, plan.ties[name][0])
    }
    others = {
        name: plan.checkpoints[s].tensors[name]
        for name, s in sources.items()
        if s is not None and name not in template.tensors
    }
    extra = {}
    for name, info in others.items():
        key = name.partition("/")[2] if is_pipeline(template) else None
        extra[name] = dataclasses.replace(info, file=home_file(template, info), key=key)
    files = tuple(dict.fromkeys([*template.files, *(i.file for i in extra.values())]))
    return dataclasses.replace(template, tensors={**own, **extra}, files=files)
