"""Objects of a store, decoded block by block in bounded memory."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jdetune.checkpoint.chunks import digest_file
from jdetune.errors import VerificationError
from jdetune.zoo import blocks, floats, residual
from jdetune.zoo.remerge import Factors, unpack_factors
from jdetune.zoo.store import BLOBS, Item
from jdetune.zoo.zstd import StoreError

LENGTH = struct.Struct("<I")
#: Elements of a merge's block; a block has whole rows, and at least one.
BLOCK_ELEMENTS = 1 << 19
_SLACK = 1 << 16


def rows_of_block(cols: int) -> int:
    """Rows of a matrix that are coded together."""
    return max(1, BLOCK_ELEMENTS // cols)


class Blobs:
    """The blobs of a store; each is hashed before it is first used.

    Args:
      store: the store's folder.
    """

    def __init__(self, store: Path) -> None:
        self._folder = store / BLOBS
        self._known: set[str] = set()

    def path(self, digest: str) -> Path:
        """Where a blob lies."""
        return self._folder / digest[:2] / digest

    def check(self, item: Item) -> Path:
        """The path of an object's blob, once it is known to be whole.

        Raises:
          StoreError: it is missing, no regular file, or has another size.
          VerificationError: its bytes have another digest.
        """
        path = self.path(item.blob)
        if item.blob in self._known:
            return path
        try:
            links = any(p.is_symlink() for p in (path, path.parent, self._folder))
            if links or not path.is_file():
                raise StoreError(f"{path}: missing, or no regular file. Copy the store again.")
            if path.stat().st_size != item.stored:
                raise StoreError(
                    f"{path}: has {path.stat().st_size} bytes, not {item.stored}: it was cut off "
                    "or changed. Copy the store again."
                )
            if digest_file(path) != item.blob:
                raise VerificationError(
                    f"{path}: its bytes have another digest than its name says: it is damaged. "
                    "Copy the store again."
                )
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error}).") from error
        self._known.add(item.blob)
        return path


def decode(items: tuple[Item, ...], index: int, blobs: Blobs) -> Iterator[bytes]:
    """The bytes of an object, block by block.

    Args:
      items: all objects of the store.
      index: which one.
      blobs: the store's blobs.

    Raises:
      StoreError: a blob is damaged.
      VerificationError: a blob has another digest.
    """
    item = items[index]
    try:
        if item.kind == "plain":
            yield from _plain(item, _Sections(blobs.check(item)), None)
            return
        assert item.of is not None
        other = _Bytes(decode(items, item.of, blobs))
        sections = _Sections(blobs.check(item))
        yield from (_plain if item.kind == "delta" else _merge)(item, sections, other)
    except StoreError as error:
        if str(error).startswith(str(blobs.path(item.blob))):
            raise
        raise StoreError(f"{blobs.path(item.blob)}: {error}. Copy the store again.") from error


def _plain(item: Item, sections: "_Sections", other: "_Bytes | None") -> Iterator[bytes]:
    for start in range(0, item.size, blocks.BLOCK):
        size = min(blocks.BLOCK, item.size - start)
        sibling = None if other is None else other.read(size)
        yield blocks.decode(sections.read(size + _SLACK), size, item.width, sibling)
    sections.end()


def _merge(item: Item, sections: "_Sections", base: "_Bytes") -> Iterator[bytes]:
    (rows, cols), dtype, base_dtype, rank = item.merged
    limit = 8 * rank * (rows + cols) + _SLACK
    factors = unpack_factors(sections.read(limit), rows, cols, rank)
    step = rows_of_block(cols)
    for first in range(0, rows, step):
        taken = slice(first, min(first + step, rows))
        count = (taken.stop - first) * cols
        data = base.read(count * floats.WIDTH[base_dtype])
        total = summed(data, base_dtype, factors, taken)
        bits = residual.decode(sections.read(16 * count + _SLACK), total, dtype)
        yield bits.tobytes()
    sections.end()


def summed(base: bytes, base_dtype: str, factors: Factors, rows: slice) -> np.ndarray:
    """Base plus update of some rows, before rounding: float64, flat."""
    bits = np.frombuffer(base, f"<u{floats.WIDTH[base_dtype]}")
    values = floats.to_double(bits, base_dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        return values + factors.update(rows).reshape(-1)


class _Sections:
    """The sections of a blob, each behind its length."""

    def __init__(self, path: Path) -> None:
        self._path, self._place = path, 0

    def read(self, limit: int) -> bytes:
        """The next section, which has at most so many bytes."""
        with self._path.open("rb") as file:
            file.seek(self._place)
            head = file.read(LENGTH.size)
            length = LENGTH.unpack(head)[0] if len(head) == LENGTH.size else limit + 1
            if length > limit:
                raise StoreError("a block ends early, or is larger than it can be")
            data = file.read(length)
        if len(data) != length:
            raise StoreError("a block ends early")
        self._place += LENGTH.size + length
        return data

    def end(self) -> None:
        """Checks that nothing follows."""
        if self._path.stat().st_size != self._place:
            raise StoreError("more blocks than the object has")


class _Bytes:
    """Bytes that come in blocks, taken in pieces of other sizes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def read(self, size: int) -> bytes:
        """The next bytes."""
        parts, missing = [self._rest], size - len(self._rest)
        while missing > 0:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise StoreError("an object that another needs ends early")
            parts.append(chunk)
            missing -= len(chunk)
        data = b"".join(parts)
        self._rest = data[size:]
        return data[:size]
