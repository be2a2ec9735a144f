"""Resized vocabularies: the rows that all models have are compared, the rest stays with each."""

import dataclasses
import fnmatch
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdetune.checkpoint import peft_layout as layout
from jdetune.checkpoint.index import Checkpoint, read_json
from jdetune.checkpoint.writer import save_json

_TOKENIZER = ("tokenizer*", "vocab*", "merges*", "added_tokens.json", "special_tokens_map.json")
_TOKENIZER += ("spiece.model", "*.spm", "*.tiktoken")


def sizes_of(checkpoints: Sequence[Checkpoint]) -> tuple[int, ...] | None:
    """Rows of every model's token embedding, if they differ; None also where it is not clear.

    Args:
      checkpoints: models under the same names.
    """
    found: set[tuple[int, ...]] = set()
    for name, info in checkpoints[0].tensors.items():
        leaf = layout.leaf_of(layout.module_of(name))
        infos = [c.tensors.get(name) for c in checkpoints]
        if leaf not in layout.TOKEN_EMBEDDINGS or len(info.shape) != 2:
            continue
        shapes = [i.shape for i in infos if i is not None]
        alike = len(shapes) == len(infos) and len({s[1:] for s in shapes}) == 1
        if alike and len({s[0] for s in shapes}) > 1 and min(s[0] for s in shapes) > 0:
            found.add(tuple(shape[0] for shape in shapes))
    return found.pop() if len(found) == 1 else None


def cut_rows(checkpoints: Sequence[Checkpoint]) -> tuple[list[Checkpoint], dict[str, str]]:
    """Models of which only the common rows of a vocabulary are looked at.

    Args:
      checkpoints: models under the same names.

    Returns:
      The models, and every tensor that was cut with what to say of it: those whose first axis is
      the size of the vocabulary in every model.
    """
    sizes = sizes_of(checkpoints)
    if sizes is None:
        return list(checkpoints), {}
    common = min(sizes)
    names = []
    for name in dict.fromkeys(name for c in checkpoints for name in c.tensors):
        infos = [c.tensors.get(name) for c in checkpoints]
        pairs = [(i, size) for i, size in zip(infos, sizes, strict=True) if i is not None]
        rows = all(i.shape[:1] == (size,) for i, size in pairs)
        if rows and len({i.shape[1:] for i, _ in pairs}) == 1:
            names.append(name)
    kept = []
    for checkpoint in checkpoints:
        tensors = dict(checkpoint.tensors)
        for name in names:
            info = tensors.get(name)
            if info is not None and info.shape[0] > common:
                shape = (common, *info.shape[1:])
                tensors[name] = dataclasses.replace(info, shape=shape, whole=info.shape)
        kept.append(dataclasses.replace(checkpoint, tensors=tensors))
    larger = [c.name for c, size in zip(checkpoints, sizes, strict=True) if size > common]
    said = ", ".join(f"{c.name} {size}" for c, size in zip(checkpoints, sizes, strict=True))
    reason = (
        f"vocabularies differ ({said}): the base has the {common} rows that all models have; the "
        f"adapters of {', '.join(larger)} keep their own copy whole"
    )
    return kept, dict.fromkeys(names, reason)


def resized(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Tensors of which a model has more rows than are looked at."""
    return tuple(name for name, info in checkpoint.tensors.items() if info.whole is not None)


def fit_side_files(checkpoints: Sequence[Checkpoint], out: Path) -> None:
    """Makes config and tokenizer of a written base fit the common rows.

    Args:
      checkpoints: the models that it was recovered from; the first gave its files.
      out: the base's folder.
    """
    template = checkpoints[0]
    cut = [template.tensors[name] for name in resized(template)]
    path = out / "config.json"
    if cut and path.is_file():
        (rows,) = {info.whole[0] for info in cut if info.whole is not None}
        save_json(path, _with_size(read_json(path), rows, cut[0].shape[0]))
    smallest = next((c for c in checkpoints if not resized(c)), None)
    if not cut or smallest is None:
        return
    for name in template.side_files:
        if _is_tokenizer(name):
            (out / name).unlink(missing_ok=True)
    for name in smallest.side_files:
        if _is_tokenizer(name):
            shutil.copyfile(smallest.root / name, out / name)


def _is_tokenizer(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in _TOKENIZER)


def _with_size(config: Any, old: int, new: int) -> Any:
    """A config with another ``vocab_size``, also in the configs inside it."""
    if not isinstance(config, dict):
        return config
    return {
        key: new if key == "vocab_size" and value == old else _with_size(value, old, new)
        for key, value in config.items()
    }
