"""Python calls: merged checkpoints to stacks, recoveries to folders."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jdetune.checkpoint.adapter_formats import choose_format, write_as
from jdetune.checkpoint.adapters import AdapterFiles
from jdetune.checkpoint.alignment import align
from jdetune.checkpoint.compare import is_common
from jdetune.checkpoint.index import Checkpoint, open_checkpoint
from jdetune.checkpoint.manifest import select
from jdetune.checkpoint.reader import raw_bytes, read_tensor
from jdetune.checkpoint.shapes import read_stack, units, view_of
from jdetune.checkpoint.writer import save_like
from jdetune.errors import InputError
from jdetune.result import Recovery
from jdetune.status import Status


def load_stack(paths: Sequence[str | Path], include: str | None = None) -> dict[str, np.ndarray]:
    """Reads the merged matrices of several checkpoints.

    Args:
      paths: folders or ``.safetensors`` files of merged models.
      include: regular expression on tensor names; every matching matrix is read, whether the
        models differ in it or not. If left out: all matrices in which they differ.

    Returns:
      Tensor name to [model, row, col], in the dtype of the files (float32 where they differ) and
      the order of the first. Convolutions come as [model, out, in * kernel]; of stacked experts,
      each is an entry ``NAME[i]``.

    Raises:
      InputError: no model is given, one cannot be read, or no matrix is left.
    """
    if not paths:
        raise InputError("no model is given. Give the paths of merged models of one base.")
    aligned = align([open_checkpoint(path) for path in paths])
    checkpoints = aligned.checkpoints
    wanted = select(include)
    stacks: dict[str, np.ndarray] = {}
    for name, info in checkpoints[0].tensors.items():
        if view_of(info) is None or not wanted(name) or not is_common(checkpoints, name):
            continue
        if name in aligned.ties and _equals(checkpoints, name, aligned.ties[name]):
            continue  # tied to an embedding, which is read
        if include is not None or _differs(checkpoints, name):
            stacks.update({unit: read_stack(checkpoints, unit) for unit in units(info)})
    if not stacks:
        what = "matches include" if include is not None else "differs between the models"
        raise InputError(f"no matrix {what}. Check that the models are fine-tunes of one base.")
    return stacks


def save_base(recovery: Mapping[str, Recovery], template: str | Path, out: str | Path) -> None:
    """Writes the recovered base as a checkpoint folder.

    Args:
      recovery: what ``recover`` returned for a mapping of names.
      template: the first of the merged models; gives names, shard layout, config and tokenizer.
      out: folder to write.

    Every tensor that is not in ``recovery`` is the template's own copy, unverified: a vector or a
    matrix left out of the stack, in which the models differ, is then that model's fine-tuned one,
    not the base's. ``jdetune recover`` compares all models and takes the majority's copy, or none.
    Tensors in ``recovery`` whose status has no base are left out; a stack of which only some slices
    are in ``recovery`` too.
    """
    checkpoint = open_checkpoint(template)

    def get_tensor(name: str) -> np.ndarray | None:
        info = checkpoint.tensors[name]
        found = [recovery[unit] for unit in units(info) if unit in recovery]
        if not found:
            return read_tensor(checkpoint, name)
        whole = len(found) == len(units(info))
        if not whole or not all(Status(int(part.status)).has_base for part in found):
            return None
        bases = [np.asarray(part.base) for part in found]
        if len({base.dtype for base in bases}) > 1:
            bases = [base.astype(np.float32) for base in bases]
        common = np.stack(bases)  # of resized vocabularies, the rows that all models have
        return common.reshape(info.shape) if common.size == math.prod(info.shape) else bases[0]

    save_like(checkpoint, out, get_tensor)


def save_adapters(
    recovery: Mapping[str, Recovery],
    template: str | Path,
    out: str | Path,
    names: Sequence[str] | None = None,
    adapter_format: str = "auto",
) -> list[AdapterFiles]:
    """Writes every model's update as an adapter folder.

    Args:
      recovery: what ``recover`` returned for a mapping of names.
      template: the first of the merged models; gives module names and config.
      out: folder that gets one folder a model.
      names: the models' folder names; ``model-1``, ``model-2``, ... if left out.
      adapter_format: ``peft``, ``kohya``, ``diffusers``, or ``auto`` by the kind of model.

    Returns:
      What was written, a model each.

    Raises:
      OutputError: the format has no names for this kind of model.
      ValueError: too many or too few names, one that is no plain folder name, or one given twice
        (also in other case: some disks cannot tell them apart).
    """
    checkpoint = open_checkpoint(template)
    form = choose_format(adapter_format, checkpoint)
    usable = {n: r for n, r in recovery.items() if Status(int(r.status)).has_base}
    n_models = max((np.size(r.ranks) for r in recovery.values()), default=0)
    if names is None:
        names = [f"model-{i + 1}" for i in range(n_models)]
    if len(names) != n_models:
        raise ValueError(f"got {len(names)} names for {n_models} models")
    unsafe = [name for name in names if not _is_plain(name)]
    if unsafe:
        raise ValueError(f"{unsafe[0]!r} is not a plain folder name; give names without a path")
    if len({name.casefold() for name in names}) < len(names):
        raise ValueError(f"names must be unique, also without regard to case; got {list(names)}")
    return [
        write_as(form, Path(out) / name, factors_of(usable, i), checkpoint)
        for i, name in enumerate(names)
    ]


def factors_of(
    recovery: Mapping[str, Recovery], model: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """One model's factors by matrix name, cut to its rank; always two axes."""
    factors = {}
    for name, found in recovery.items():
        rank = int(np.asarray(found.ranks)[model])
        left = np.asarray(found.adapters.left[model])[:, :rank]
        factors[name] = (left, np.asarray(found.adapters.right[model])[:rank])
    return factors


def _is_plain(name: str) -> bool:
    """Whether it names a folder right in another, on every system."""
    plain = not set(name) & set("/\\:") and not name.startswith(".")
    return plain and name.isprintable() and name.strip() == name != ""


def _equals(checkpoints: Sequence[Checkpoint], name: str, other: str) -> bool:
    """Whether two tensors are the same in every model."""
    pairs = [(read_tensor(c, name), read_tensor(c, other)) for c in checkpoints]
    return all(np.array_equal(raw_bytes(first), raw_bytes(second)) for first, second in pairs)


def _differs(checkpoints: Sequence[Checkpoint], name: str) -> bool:
    first = raw_bytes(read_tensor(checkpoints[0], name))
    return any(
        not np.array_equal(first, raw_bytes(read_tensor(other, name))) for other in checkpoints[1:]
    )
