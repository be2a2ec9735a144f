"""Safetensors files written and read one tensor at a time, so that memory holds one tensor.

The library serialises all tensors of a file at once. What is written here is byte for byte what it
would write; a test compares them.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

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


def write_tensors(path: Path, tensors: Arrays, metadata: Mapping[str, str]) -> None:
    """Writes tensors to a new file, to disk, and reads it back.

    Args:
      path: the file.
      tensors: name to array of any memory order.
      metadata: text for the header.

    Raises:
      WriteError: what was read back differs.
    """
    words = {name: _WORDS[np.dtype(tensor.dtype)] for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: (_ORDER.index(words[name]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        shape = [int(side) for side in tensors[name].shape]
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * tensors[name].dtype.itemsize
        header[name] = {"dtype": words[name], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digests = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            data = raw_bytes(np.asarray(tensors[name])).data
            if len(data) != np.subtract(*header[name]["data_offsets"][::-1]):
                raise WriteError(
                    f"{path}: tensor {printable(name)} changed its size while it was written."
                )
            file.write(data)
            digests[name] = hashlib.sha256(data).digest()
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        same = file.read(8 + len(text))[8:] == text
        for name in names if same else ():
            size = int(np.subtract(*header[name]["data_offsets"][::-1]))
            if _digest(file, size) != digests[name]:
                raise WriteError(
                    f"{path}: tensor {printable(name)} read back differs from what was "
                    "written. Check the disk."
                )
        if not same or file.read(1):
            raise WriteError(f"{path}: read back differs from what was written. Check the disk.")


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
