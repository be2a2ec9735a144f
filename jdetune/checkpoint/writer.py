"""Writes weights and text so that a file is either whole or not there.

``save_safetensors`` is the only place in jdetune that writes tensors: the library's own function
silently writes wrong values for arrays that are not C-contiguous, and holds a file in memory.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from jdetune.checkpoint import sidefiles
from jdetune.checkpoint.index import Checkpoint
from jdetune.checkpoint.single_file import kept_metadata
from jdetune.checkpoint.stream import Arrays, Begun, begin_tensors, write_tensors
from jdetune.checkpoint.weight_names import index_name, written_name
from jdetune.deferred import Deferred
from jdetune.errors import WriteError

_PT = {"format": "pt"}
#: A tensor by name, or None to leave it out.
GetTensor = Callable[[str], np.ndarray | Deferred | None]


def save_safetensors(
    path: str | Path,
    tensors: Arrays,
    metadata: Mapping[str, str] | None = None,
    begun: Begun | None = None,
) -> None:
    """Writes tensors to a file: temporary name, read back, compare, rename.

    Args:
      path: where the file goes; its folder is made.
      tensors: name to array of any memory order; those not read yet are read one at a time.
      metadata: text for the header, ``{"format": "pt"}`` if left out (loaders ask for it).
      begun: what ``begin_shard`` wrote of it.

    Raises:
      WriteError: it cannot be written, or what was read back differs.
    """
    with _whole_or_not_there(Path(path)) as temporary:
        write_tensors(temporary, tensors, _PT if metadata is None else metadata, begun)


def save_text(path: str | Path, text: str) -> None:
    r"""Writes a text file under a temporary name and renames it.

    Names of files that are no text come as JSON has them, such as ``\udcff``.
    """
    save_bytes(path, text.encode(errors="backslashreplace"))


def save_bytes(path: str | Path, data: bytes) -> None:
    """Writes a small file under a temporary name, to disk, and renames it."""
    with _whole_or_not_there(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def save_json(path: str | Path, value: Mapping[str, Any], sort_keys: bool = False) -> None:
    """Writes JSON, indented by two; NaN is an error, since JSON has none."""
    text = json.dumps(value, indent=2, sort_keys=sort_keys, allow_nan=False, ensure_ascii=False)
    save_text(path, text + "\n")


class Shard(NamedTuple):
    """What one file of a checkpoint holds.

    Attributes:
      file: its name, with its folder in a pipeline.
      names: its tensors, as they are called in it.
      n_bytes: their size.
      n_parameters: their elements.
    """

    file: str
    names: tuple[str, ...]
    n_bytes: int
    n_parameters: int


def save_like(template: Checkpoint, out: str | Path, get_tensor: GetTensor) -> int:
    """Writes a checkpoint with the shard layout of another, one tensor in memory at a time.

    Args:
      template: gives shards, order and side files.
      out: folder to write to.
      get_tensor: the array of a name, or None to leave the tensor out.

    Returns:
      Number of parameters written.
    """
    shards = [save_shard(template, out, file, get_tensor) for file in template.files]
    return finish_shards(template, out, shards)


def save_shard(
    template: Checkpoint,
    out: str | Path,
    file: str,
    get_tensor: GetTensor,
    begun: Begun | None = None,
) -> Shard:
    """Writes one file of ``save_like``, under the name that loaders look for."""
    target = written_name(file, template.files)
    kept = {key: array for key, (_, array) in _arrays_of(template, file, get_tensor).items()}
    save_safetensors(Path(out) / target, kept, kept_metadata(template), begun)
    sizes = [math.prod(array.shape) for array in kept.values()]
    n_bytes = sum(n * a.dtype.itemsize for n, a in zip(sizes, kept.values(), strict=True))
    return Shard(target, tuple(kept), n_bytes, sum(sizes))


def begin_shard(
    template: Checkpoint,
    path: Path,
    file: str,
    get_tensor: GetTensor,
    is_ready: Callable[[str], bool],
) -> Begun:
    """Writes a part of what ``save_shard`` is going to write, for it to go on with.

    Args:
      template: gives the order of tensors.
      path: where it is kept, on the same disk as the file to be.
      file: which of the template's files.
      get_tensor: as there; what is not ready needs a shape and a dtype only.
      is_ready: whether to write a tensor now, asked before each.
    """
    found = _arrays_of(template, file, get_tensor)
    kept = {key: array for key, (_, array) in found.items()}
    metadata = kept_metadata(template)
    path.parent.mkdir(parents=True, exist_ok=True)
    now = (key for key, (name, _) in found.items() if is_ready(name))
    return begin_tensors(path, kept, _PT if metadata is None else metadata, now)


def _arrays_of(
    template: Checkpoint, file: str, get_tensor: GetTensor
) -> dict[str, tuple[str, np.ndarray | Deferred]]:
    """Name and array of what goes into a file, by the name it has there."""
    own = {n: i.stored_name for n, i in template.tensors.items() if i.file == file}
    arrays = {key: (name, get_tensor(name)) for name, key in own.items()}
    return {key: (name, array) for key, (name, array) in arrays.items() if array is not None}


def finish_shards(template: Checkpoint, out: str | Path, shards: Sequence[Shard]) -> int:
    """Writes what belongs to all files of ``save_like``: index, config and tokenizer files.

    Args:
      template: gives the side files.
      out: folder that holds the shards.
      shards: what is in them.

    Returns:
      Number of parameters in all.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for folder in dict.fromkeys(PurePosixPath(shard.file).parent for shard in shards):
        parts = [shard for shard in shards if PurePosixPath(shard.file).parent == folder]
        if len(parts) > 1:
            _save_index(out / folder / index_name(parts[0].file), parts)
    copy_side_files(template, out)
    return sum(shard.n_parameters for shard in shards)


def _save_index(path: Path, shards: Sequence[Shard]) -> None:
    """Which file of a folder holds which tensor."""
    metadata = {
        "total_parameters": sum(shard.n_parameters for shard in shards),
        "total_size": sum(shard.n_bytes for shard in shards),
    }
    weight_map = {n: PurePosixPath(shard.file).name for shard in shards for n in shard.names}
    save_json(path, {"metadata": metadata, "weight_map": weight_map}, sort_keys=True)


def copy_side_files(template: Checkpoint, out: str | Path) -> None:
    """Copies the config and tokenizer files of a checkpoint, without ``auto_map`` by default."""
    for name in template.side_files:
        save_bytes(Path(out) / name, sidefiles.content(template.root, name, template.trusted))


@contextlib.contextmanager
def _whole_or_not_there(path: Path) -> Iterator[Path]:
    """A temporary name that becomes ``path`` if all went well, and is removed if not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise WriteError(
            f"{path}: cannot be written ({error}). Check space and rights, then run the same "
            "command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
