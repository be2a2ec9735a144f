"""Writes base, adapters and masks of a recovery; each process writes its share of the files."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdetune.checkpoint.adapter_formats import write_as
from jdetune.checkpoint.index import Checkpoint
from jdetune.checkpoint.manifest import Plan
from jdetune.checkpoint.pipeline_folder import home_file
from jdetune.checkpoint.reader import numpy_dtype, raw_bytes, read_tensor
from jdetune.checkpoint.stacks import factors_of
from jdetune.checkpoint.writer import Shard, finish_shards, save_safetensors, save_shard
from jdetune.deferred import Deferred
from jdetune.distributed import ALONE, Processes
from jdetune.report import TensorResult
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
) -> tuple[int, set[str]] | None:
    """Writes base, adapters and masks into a folder; nothing if no differing matrix has a base.

    Args:
      plan: what was planned.
      results: what came of every tensor.
      stage: the folder, the same for all processes.
      masks: also which elements of the base are certain.
      progress: told of every file.
      processes: who writes along; index and side files are the first one's.
      adapter_format: what ``choose_format`` returned.

    Returns:
      Number of the base's parameters, and tensors that an adapter leaves out; None if nothing was
      written.
    """
    found = {r.plan.name: r.recovery for r in results if r.recovery and r.status == "recovered"}
    if plan.groups and not found:
        return None
    sources = {r.plan.name: r.plan.source for r in results}
    template = _full_template(plan, sources)

    def get_tensor(name: str) -> Any:
        if name in found:
            return found[name].base
        source = sources.get(name)
        return None if source is None else _deferred(plan.checkpoints[source], name)

    files: list[str | int] = [*template.files, *range(len(plan.checkpoints))]
    mine = files[processes.index :: processes.count]
    shards, left_out = [], set()
    for done, file in enumerate(mine):
        if isinstance(file, str):
            shards.append(save_shard(template, stage / "base", file, get_tensor))
        else:
            left_out |= _write_adapter(plan, file, results, stage, adapter_format)
        if progress is not None:
            progress("write", done + 1, len(mine))
    if masks and processes.index == processes.count - 1:
        save_safetensors(stage / MASKS_NAME, {n: _mask(r.certain) for n, r in found.items()})
    written = processes.exchange({"shards": shards, "left_out": sorted(left_out)})
    everything = [Shard(*shard) for part in written for shard in part["shards"]]
    if processes.first:
        finish_shards(template, stage / "base", everything)
    left_out = {name for part in written for name in part["left_out"]}
    return sum(shard.n_parameters for shard in everything), left_out


def _deferred(checkpoint: Checkpoint, name: str) -> Deferred:
    """A tensor of a model, read when it is written."""
    info = checkpoint.tensors[name]
    read = functools.partial(read_tensor, checkpoint, name)
    return Deferred(numpy_dtype(info.dtype), info.shape, read)


def _mask(certain: Any) -> Deferred:
    """Which elements are certain, as bytes, read when it is written."""
    byte = np.dtype(np.uint8)
    return Deferred(byte, tuple(certain.shape), lambda: np.asarray(certain).astype(byte))


def _write_adapter(
    plan: Plan, model: int, results: Sequence[TensorResult], stage: Path, adapter_format: str
) -> set[str]:
    """Writes one model's adapter; returns the tensors that it cannot hold."""
    checkpoint = plan.checkpoints[model]
    found = {r.plan.name: r.recovery for r in results if r.recovery and r.status == "recovered"}
    per_model = tuple(r.plan.name for r in results if r.status == "per_model")
    own, unfit = _own_copies(plan, checkpoint)
    whole = per_model + own + left_out_of(results, model)
    folder = stage / "adapters" / checkpoint.name
    written = write_as(adapter_format, folder, factors_of(found, model), checkpoint, whole)
    return {*written.left_out, *unfit}


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
    others = {
        name: plan.checkpoints[s].tensors[name]
        for name, s in sources.items()
        if s is not None and name not in template.tensors
    }
    extra = {n: dataclasses.replace(i, file=home_file(template, i)) for n, i in others.items()}
    files = tuple(dict.fromkeys([*template.files, *(i.file for i in extra.values())]))
    return dataclasses.replace(template, tensors={**template.tensors, **extra}, files=files)
