"""Headers of safetensors files, read strictly: what they say must fit the file to the byte.

The format: 8 bytes with the header's length, the header as JSON, then all tensors without gaps.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jdetune.checkpoint.files import Source, Stamp, opened
from jdetune.checkpoint.strict_json import MAX_BYTES, parse_object
from jdetune.errors import InputError, printable

#: Names of safetensors' header dtypes in NumPy's words.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
#: Bits of an element; words that are not here have an unknown size, and are never read.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
METADATA = "__metadata__"
_LENGTH = 8
#: Axes, name length and parts of a name at most: NumPy's limit, and far above any model's.
_MAX_AXES = 64
_MAX_NAME = 1000
_MAX_PARTS = 64
_WORD = re.compile(r"[A-Za-z0-9_]{1,32}")
_FIELDS = {"dtype", "shape", "data_offsets"}
_DISTRUST = "Download it again; do not use it if you do not trust where it is from."


class Entry(NamedTuple):
    """One tensor in a file.

    Attributes:
      name: its name.
      word: its dtype as the header has it.
      shape: its shape.
      start: its first byte, from the beginning of the file.
      n_bytes: its size.
    """

    name: str
    word: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


class Header(NamedTuple):
    """What a file holds.

    Attributes:
      entries: the tensors, in the order of their bytes.
      metadata: text that goes with them.
      stamp: which file it was read from.
    """

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    stamp: Stamp


def read_header(path: Path) -> Header:
    """Reads and checks a header; no memory is taken that the file's own size does not account for.

    Raises:
      InputError: not readable, or it does not describe this file.
    """
    with opened(path) as source:
        begin, data = _header_bytes(path, source)
        stamp = source.stamp
    content = parse_object(data, path, constants=False)
    metadata = content.pop(METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "its metadata is not text")
    entries = [_entry(path, name, info, begin) for name, info in content.items()]
    entries.sort(key=lambda entry: (entry.start, entry.n_bytes))
    _check_tiling(path, entries, begin, stamp.size)
    return Header(tuple(entries), metadata, stamp)


def _header_bytes(path: Path, source: Source) -> tuple[int, bytes]:
    """Where the tensors begin, and the header's text."""
    size = source.stamp.size
    if size < _LENGTH:
        raise _bad(path, f"{size} bytes are too few")
    length = int.from_bytes(source.bytes(0, _LENGTH), "little")
    if length > size - _LENGTH:
        raise _bad(path, f"a header of {length} bytes is claimed in a file of {size}")
    if length > MAX_BYTES:
        raise _bad(path, f"a header of {length} bytes, above the format's {MAX_BYTES}")
    data = source.bytes(_LENGTH, length)
    if not data.startswith(b"{"):
        raise _bad(path, "its header does not start with {")
    return _LENGTH + length, data


def _entry(path: Path, name: str, info: Any, begin: int) -> Entry:
    shown = f"tensor {printable(name)}"
    if len(name) > _MAX_NAME or name.count(".") >= _MAX_PARTS or _has_surrogates(name):
        raise _bad(path, f"the name of {shown} is too long or no text")
    if not isinstance(info, dict) or set(info) != _FIELDS:
        raise _bad(path, f"{shown} does not have dtype, shape and data_offsets alone")
    word, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(word, str) or not _WORD.fullmatch(word):
        raise _bad(path, f"the dtype of {shown} is no word")
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        raise _bad(path, f"the shape of {shown} is not a list of at most {_MAX_AXES} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, f"the data_offsets of {shown} are not a first and a last byte")
    n_bytes = offsets[1] - offsets[0]
    bits = BITS.get(word, 0)
    if math.prod(side for side in shape if side) * max(bits, 1) >= 2**66:
        raise _bad(path, f"the shape of {shown} is larger than any memory")
    if bits and math.prod(shape) * bits != 8 * n_bytes:
        raise _bad(path, f"{shown} has {n_bytes} bytes, not what {word} {shape} takes")
    return Entry(name, word, tuple(shape), begin + offsets[0], n_bytes)


def _are_sizes(value: Any) -> bool:
    """Whether it is a list of integers from 0 to 2^63 - 1."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _has_surrogates(text: str) -> bool:
    """Whether it holds halves of characters, which no file or terminal takes."""
    return any("\ud800" <= c <= "\udfff" for c in text)


def _check_tiling(path: Path, entries: list[Entry], begin: int, size: int) -> None:
    """Every byte after the header belongs to one tensor."""
    end = begin
    for entry in entries:
        if entry.start != end:
            what = "overlaps another" if entry.start < end else "leaves a gap before it"
            raise _bad(path, f"tensor {printable(entry.name)} {what}")
        end += entry.n_bytes
    if end != size:
        raise _bad(path, f"its header describes {end} bytes, the file has {size}")


def _bad(path: Path, cause: str) -> InputError:
    return InputError(f"{path}: not a whole safetensors file ({cause}). {_DISTRUST}")
