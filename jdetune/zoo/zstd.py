"""Zstandard, where no more bytes ever come out than were said beforehand."""

import functools
import struct
from collections.abc import Sequence
from typing import Any

from jdetune.errors import InputError

_RAW, _FRAME = 0, 1
_LENGTH = struct.Struct("<I")


class StoreError(InputError):
    """A store is damaged or hostile."""


class MissingZstandardError(InputError):
    """The package that compresses is not installed."""


@functools.cache
def library() -> Any:
    """The zstandard package.

    Raises:
      MissingZstandardError: it is not installed; says how to.
    """
    try:
        import zstandard
    except ImportError as error:
        raise MissingZstandardError(
            "packed stores need the package zstandard: pip install 'jdetune[zoo]', or "
            "pip install zstandard."
        ) from error
    return zstandard


def squeeze(data: bytes, level: int, entropy_only: bool = False) -> bytes:
    """Bytes in the fewest bytes: Huffman codes alone, matches as well, or as they are.

    Byte planes of weights hold no repeats but by chance, and looking for them costs more than it
    gains; so a coder that hardly looks is tried first.

    Args:
      data: anything.
      level: of zstandard, for matches.
      entropy_only: do not look for matches at all.

    Example:
      >>> unsqueeze(squeeze(bytes(1000), 3), 1000) == bytes(1000)
      True
    """
    choices = [_coder(level, True).compress(data)]
    if not entropy_only:
        choices.append(_coder(level, False).compress(data))
    best = min(choices, key=len)
    if len(best) < len(data):
        return bytes([_FRAME]) + best
    return bytes([_RAW]) + data


def unsqueeze(data: bytes, size: int) -> bytes:
    """What ``squeeze`` was given.

    Args:
      data: what it returned.
      size: how many bytes must come out; no more are ever produced.

    Raises:
      StoreError: the bytes are not those, or hold another number of bytes.
    """
    kind, body = data[:1], data[1:]
    if kind == bytes([_RAW]):
        out = body
    elif kind == bytes([_FRAME]):
        zstandard = library()
        try:
            declared = zstandard.frame_content_size(body)
            if declared != size:
                raise StoreError(f"compressed block declares {declared} bytes, not {size}")
            out = zstandard.ZstdDecompressor().decompress(
                body, max_output_size=size, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise StoreError(f"compressed block is damaged ({error})") from error
    else:
        raise StoreError("compressed block of an unknown kind")
    if len(out) != size:
        raise StoreError(f"block holds {len(out)} bytes, not {size}")
    return out


def join(sections: Sequence[bytes]) -> bytes:
    """Byte strings, each behind its length."""
    return b"".join(_LENGTH.pack(len(section)) + section for section in sections)


def split(data: bytes, count: int) -> list[bytes]:
    """What ``join`` was given.

    Raises:
      StoreError: there are fewer or more than ``count``.
    """
    sections = split_all(data)
    if len(sections) != count:
        raise StoreError(f"block has {len(sections)} sections, not {count}")
    return sections


def split_all(data: bytes) -> list[bytes]:
    """What ``join`` was given, however many.

    Raises:
      StoreError: the last one ends early.
    """
    sections, place = [], 0
    while place < len(data):
        length = int.from_bytes(data[place : place + _LENGTH.size], "little")
        start = place + _LENGTH.size
        place = start + length
        if place > len(data):
            raise StoreError("block ends early")
        sections.append(data[start:place])
    return sections


class Counter:
    """Counts the bytes that a stream takes when zstandard compresses it, and keeps none."""

    def __init__(self, level: int) -> None:
        self._stream, self._count = library().ZstdCompressor(level=level).compressobj(), 0

    def add(self, data: bytes) -> None:
        """Takes the next bytes."""
        self._count += len(self._stream.compress(data))

    def end(self) -> int:
        """The bytes that all take."""
        return self._count + len(self._stream.flush())


@functools.cache
def _coder(level: int, entropy_only: bool) -> Any:
    zstandard = library()
    if not entropy_only:
        return zstandard.ZstdCompressor(level=level)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, chain_log=6, window_log=17
    )
    return zstandard.ZstdCompressor(compression_params=parameters)
