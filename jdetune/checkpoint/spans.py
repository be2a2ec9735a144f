"""Where the tensors of a safetensors file lie, so that its bytes can be put together again."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jdetune.checkpoint.index import DTYPES
from jdetune.checkpoint.reader import numpy_dtype
from jdetune.errors import InputError

#: The library refuses larger headers.
_MAX_HEADER = 100_000_000


class Span(NamedTuple):
    """A stretch of a file.

    Attributes:
      start: of its first byte.
      size: in bytes.
      name: of the tensor that it holds; None for a header, a gap or a file of another kind.
      dtype: of the tensor, in NumPy's words.
      shape: of the tensor.
    """

    start: int
    size: int
    name: str | None = None
    dtype: str | None = None
    shape: tuple[int, ...] = ()


def spans(path: Path, size: int) -> list[Span]:
    """Stretches of a file that follow one another and cover it.

    Args:
      path: any file. Only safetensors files have more than one stretch, and only where nothing
        is odd about them: tensors that overlap or do not fit make a file a single stretch.
      size: of the file.
    """
    whole = [Span(0, size)] if size else []
    if path.suffix != ".safetensors":
        return whole
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _MAX_HEADER):
                return whole
            tensors = list(_tensors(json.loads(file.read(length)), 8 + length))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}).") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return whole
    found, place = [Span(0, 8 + length)], 8 + length
    for span in sorted(tensors):
        if span.start < place or span.start + span.size > size:
            return whole
        if span.start > place:
            found.append(Span(place, span.start - place))
        if span.size:
            found.append(span)
        place = span.start + span.size
    if place < size:
        found.append(Span(place, size - place))
    return found


def read_range(path: Path, start: int, size: int, block: int) -> Iterator[bytes]:
    """Bytes of a stretch of a file, block by block.

    Raises:
      InputError: the file cannot be read, or ends early.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            while size > 0:
                data = file.read(min(size, block))
                if not data:
                    raise InputError(f"{path}: became shorter while it was read. Run it again.")
                size -= len(data)
                yield data
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}).") from error


def _tensors(header: dict, offset: int) -> Iterator[Span]:
    """Spans of a header's tensors; raises ValueError and its like where something is odd."""
    for name, info in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = DTYPES[info["dtype"]], tuple(info["shape"])
        start, end = info["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        if not whole or math.prod(shape) * numpy_dtype(dtype).itemsize != end - start:
            raise ValueError(name)
        yield Span(offset + start, end - start, name, dtype, shape)
