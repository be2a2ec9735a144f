"""Safetensors files written and read one tensor at a time, so that memory holds one tensor.

The library serialises all tensors of a file at once. What is written here is byte for byte what it
would write; a test compares them.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jdetune.checkpoint.files import Stamp, opened
from jdetune.checkpoint.header import DTYPES, read_header
from jdetune.checkpoint.reader import numpy_dtype, raw_bytes
from jdetune.deferred import Deferred
from jdetune.errors import WriteError, printable

#: Words of the format in the library's order of writing: wider elements first.
_ORDER = (
    *("U64", "I64", "C64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_WORDS = {numpy_dtype(name): word for word, name in DTYPES.items()}
_CHUNK = 1 << 24


Arrays = Mapping[str, np.ndarray | Deferred]


class Begun(NamedTuple):
    """A file of which some tensors are written and read back already.

    Attributes:
      path: the file.
      head: all bytes before the first tensor's.
      done: the tensors that are in it.
    """

    path: Path
    head: bytes
    done: frozenset[str]


def write_tensors(
    path: Path, tensors: Arrays, metadata: Mapping[str, str], begun: Begun | None = None
) -> None:
    """Writes tensors to a new file, to disk, and reads it back.

    Args:
      path: the file.
      tensors: name to array of any memory order.
      metadata: text for the header.
      begun: what ``begin_tensors`` wrote; gone on with if its header is this file's.

    Raises:
      WriteError: what was read back differs.
    """
    head, spans = _layout(tensors, metadata)
    done: frozenset[str] = frozenset()
    if begun is not None and begun.head == head and begun.done:
        begun.path.replace(path)
        done = begun.done
    elif begun is not None:
        begun.path.unlink()
    _put(path, head, spans, {n: tensors[n] for n in spans if n not in done}, not done)
    end = max((end for _, end in spans.values()), default=0)
    if path.stat().st_size != len(head) + end:
        raise WriteError(f"{path}: read back differs from what was written. Check the disk.")


def begin_tensors(
    path: Path, tensors: Arrays, metadata: Mapping[str, str], now: Iterable[str]
) -> Begun:
    """Writes some tensors of a file whose others are not known yet, but for shape and dtype.

    Args:
      path: the file.
      tensors: name to array; those that are not written now need a shape and a dtype only.
      metadata: text for the header.
      now: names of what to write now, asked for one by one.

    Raises:
      WriteError: what was read back differs.
    """
    head, spans = _layout(tensors, metadata)
    done: list[str] = []

    def each() -> Iterator[tuple[str, np.ndarray | Deferred]]:
        for name in now:
            yield name, tensors[name]
            done.append(name)

    _put(path, head, spans, each(), True)
    return Begun(path, head, frozenset(done))


def _layout(
    tensors: Arrays, metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The bytes before the first tensor's, and where each lies after them, in this order."""
    words = {name: _WORDS[np.dtype(tensor.dtype)] for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: (_ORDER.index(words[name]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    spans, end = {}, 0
    for name in names:
        shape = [int(side) for side in tensors[name].shape]
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * tensors[name].dtype.itemsize
        header[name] = {"dtype": words[name], "shape": shape, "data_offsets": [start, end]}
        spans[name] = (start, end)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, spans


def _put(
    path: Path,
    head: bytes,
    spans: Mapping[str, tuple[int, int]],
    tensors: Arrays | Iterator[tuple[str, np.ndarray | Deferred]],
    new: bool,
) -> None:
    """Writes header and tensors at their places, to disk, and reads them back."""
    digests = {}
    with path.open("wb" if new else "r+b") as file:
        file.write(head)
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            start, end = spans[name]
            data = raw_bytes(np.asarray(tensor)).data
            if len(data) != end - start:
                raise WriteError(
                    f"{path}: tensor {printable(name)} changed its size while it was written."
                )
            file.seek(len(head) + start)
            file.write(data)
            digests[name] = hashlib.sha256(data).digest()
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        if file.read(len(head)) != head:
            raise WriteError(f"{path}: read back differs from what was written. Check the disk.")
        for name, digest in digests.items():
            start, end = spans[name]
            file.seek(len(head) + start)
            if _digest(file, end - start) != digest:
                raise WriteError(
                    f"{path}: tensor {printable(name)} read back differs from what was "
                    "written. Check the disk."
                )


def open_tensors(path: str | Path) -> tuple[dict[str, Deferred], dict[str, str]]:
    """All tensors of a file that jdetune wrote itself, not yet read, and its metadata.

    Args:
      path: a safetensors file; it must stay there as long as the arrays are used.
    """
    found = read_header(Path(path))
    arrays = {}
    for entry in found.entries:
        dtype = numpy_dtype(DTYPES.get(entry.word, entry.word))
        read = functools.partial(_read, Path(path), found.stamp, entry.start, dtype, entry.shape)
        arrays[entry.name] = Deferred(dtype, entry.shape, read)
    return arrays, dict(found.metadata)


def _read(
    path: Path, stamp: Stamp, start: int, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    array = np.empty(shape, dtype)
    with opened(path, stamp) as source:
        source.fill(start, array.reshape(-1).view(np.uint8))
    return array


def _digest(file: BinaryIO, size: int) -> bytes:
    """Digest of the next bytes of a file; of fewer if it ends before."""
    total = hashlib.sha256()
    while size > 0 and (chunk := file.read(min(size, _CHUNK))):
        total.update(chunk)
        size -= len(chunk)
    return total.digest()
