"""Encodes objects into blobs: the smallest of what can be made of the bytes."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jdetune.checkpoint.chunks import save_by_content
from jdetune.checkpoint.spans import read_range
from jdetune.zoo import blocks, floats, residual
from jdetune.zoo.reading import LENGTH, rows_of_block, summed
from jdetune.zoo.remerge import MAX_FACTOR, Factors, pack_factors, quantise
from jdetune.zoo.store import MAX_COLS, Item

#: rms error of the update that coarse factors make, in units of the models' rounding steps. Finer
#: ones cost more bytes than they save in the residual (measured: 0.02 to 0.1 are about alike).
FACTOR_ERROR = 0.05
#: Binary digits of a base beside those of the models; finer ones are noise.
EXTRA_DIGITS = 3
#: Updates much larger than the weights take coarser steps, each four times the last; their own
#: float32 digits end there.
_COARSER = 6
#: Share of a sibling's block below which the difference to it is kept.
_WORTH = 0.97
_SAMPLE = 1 << 18


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes to encode: a stretch of a file.

    Attributes:
      path: the file.
      start: of the first byte.
      size: in bytes.
      width: of an element.
    """

    path: Path
    start: int
    size: int
    width: int

    def read(self, block: int | None = None) -> Iterator[bytes]:
        """The bytes, in blocks of a size or as objects are written."""
        return read_range(self.path, self.start, self.size, block or blocks.BLOCK)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a merge's blob is made of.

    Attributes:
      factors: bytes of the factors.
      residual: bytes of the residual.
      entropy: bits of the residual's steps, as if they were independent and alike.
      elements: how many there are.
    """

    factors: int
    residual: int
    entropy: float
    elements: int


def write_plain(folder: Path, source: Bytes, level: int) -> Item:
    """Writes a blob of bytes alone."""
    encoded = (_section(blocks.encode(b, source.width, level)) for b in source.read())
    blob, stored = save_by_content(folder, encoded)
    return Item("plain", source.size, source.width, blob, stored)


def write_delta(folder: Path, source: Bytes, sibling: Bytes, of: int, level: int) -> Item:
    """Writes a blob of bytes beside a sibling's."""
    pairs = zip(source.read(), sibling.read(), strict=True)
    encoded = (_section(blocks.encode(b, source.width, level, other)) for b, other in pairs)
    blob, stored = save_by_content(folder, encoded)
    return Item("delta", source.size, source.width, blob, stored, of)


def best_sibling(source: Bytes, siblings: Sequence[Bytes], level: int) -> int | None:
    """Which sibling helps most, by a sample; None if none does."""
    if source.width not in (2, 4, 8) or not source.size or source.size % source.width:
        return None
    sample = next(source.read(_SAMPLE))
    alone = len(blocks.encode(sample, source.width, level))
    lengths = [
        len(blocks.encode(sample, source.width, level, next(other.read(_SAMPLE))))
        for other in siblings
    ]
    best = min(range(len(lengths)), key=lengths.__getitem__, default=None)
    return best if best is not None and lengths[best] < _WORTH * alone else None


def write_base(folder: Path, base: np.ndarray, dtypes: Iterable[str], level: int) -> Item | None:
    """Writes a base with as many digits as its models make use of; None if it is not finite.

    Args:
      folder: for blobs.
      base: [row, col], float32 or 16 bits wide.
      dtypes: of the models.
      level: of zstandard.
    """
    values = stored_base(base, dtypes)
    if not np.all(np.isfinite(values)):
        return None
    data = values.tobytes()
    width = values.dtype.itemsize
    encoded = (
        _section(blocks.encode(data[start : start + blocks.BLOCK], width, level))
        for start in range(0, len(data), blocks.BLOCK)
    )
    blob, stored = save_by_content(folder, encoded)
    return Item("plain", len(data), width, blob, stored)


def stored_base(base: np.ndarray, dtypes: Iterable[str]) -> np.ndarray:
    """A base as it is kept: float32 without digits that no model can show."""
    if base.dtype != np.float32:
        return np.ascontiguousarray(base)
    digits = max(floats.SIGNIFICAND[dtype] for dtype in dtypes) + EXTRA_DIGITS
    return np.ascontiguousarray(floats.trim(base, digits))


def write_merge(
    folder: Path,
    source: Bytes,
    dtype: str,
    base: np.ndarray,
    of: int,
    pair: tuple[np.ndarray, np.ndarray],
    level: int,
) -> tuple[Item, Parts] | None:
    """Writes a blob of factors and residual; None if the factors cannot be kept as integers.

    Args:
      folder: for blobs.
      source: the stored matrix.
      dtype: of its elements.
      base: as it is kept, [row, col].
      of: the base's number.
      pair: B [row, rank] and A [rank, col].
      level: of zstandard.
    """
    rows, cols = base.shape
    if not 0 < cols <= MAX_COLS:
        return None
    error = FACTOR_ERROR * _typical_step(source, dtype)
    tries = (quantise(*pair, error * 4**times) for times in range(_COARSER))
    factors = next((found for found in tries if found is not None), None)
    if factors is None or factors.right.shape[0] * (rows + cols) > MAX_FACTOR:
        return None
    head = pack_factors(factors, level)
    lengths: list[int] = []
    bits: list[float] = []

    def sections() -> Iterator[bytes]:
        yield _section(head)
        for encoded, entropy in _residuals(source, dtype, base, factors, level):
            lengths.append(len(encoded))
            bits.append(entropy)
            yield encoded

    blob, stored = save_by_content(folder, sections())
    item = Item("merge", source.size, source.width, blob, stored, of)
    item = dataclasses.replace(
        item,
        shape=(rows, cols),
        rank=factors.right.shape[0],
        dtype=dtype,
        base_dtype=str(base.dtype),
    )
    return item, Parts(len(head) + LENGTH.size, sum(lengths), sum(bits), rows * cols)


def _residuals(
    source: Bytes, dtype: str, base: np.ndarray, factors: Factors, level: int
) -> Iterator[tuple[bytes, float]]:
    rows, cols = base.shape
    step = rows_of_block(cols)
    for first, data in zip(
        range(0, rows, step), source.read(step * cols * source.width), strict=True
    ):
        taken = slice(first, min(first + step, rows))
        total = summed(base[taken].tobytes(), str(base.dtype), factors, taken)
        stored = np.frombuffer(data, f"<u{source.width}")
        encoded = residual.encode(stored, total, dtype, level)
        yield _section(encoded), residual.entropy(stored, total, dtype)


def _typical_step(source: Bytes, dtype: str) -> float:
    """Geometric mean of the rounding steps of a matrix, by its first rows."""
    bits = np.frombuffer(next(source.read()), f"<u{source.width}")
    return float(np.exp(np.mean(np.log(floats.spacing(bits, dtype)))))


def _section(data: bytes) -> bytes:
    return LENGTH.pack(len(data)) + data
