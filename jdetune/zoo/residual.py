"""What rounding leaves between a model and base plus update, ordered by how likely it is nothing.

The sum before rounding says where a wrong guess is likely: near the border of two grid points. So
the elements are sorted by their distance to that border, which the reader of a store knows as
well, and their flags "as predicted or not" are written in that order, in a few segments of their
own, each nearly as short as its entropy. Of the others a second flag says whether it is the point
across the border, and the rest is written as a number of steps.
"""

from collections.abc import Iterator

import numpy as np

from jdetune.zoo import floats
from jdetune.zoo.zstd import StoreError, join, split_all, squeeze, unsqueeze

#: Flags of a segment, and how many segments there are at most.
_FLAGS, _SEGMENTS = 4096, 10
_TINY = 1e-30


def encode(bits: np.ndarray, total: np.ndarray, dtype: str, level: int) -> bytes:
    """A block of a model, as what it takes beside the sum of base and update.

    Args:
      bits: the stored floats, flat, unsigned integers.
      total: base plus update before rounding, float64, flat.
      dtype: of the stored floats.
      level: of zstandard.
    """
    guess = floats.from_double(total, dtype)
    order, toward = _expectation(guess, total, dtype)
    steps = (floats.ordered(bits) - floats.ordered(guess)) * toward
    steps = steps[order]
    other = steps != 0
    some = steps[other]
    near = some == 1
    rest = floats.zigzag(some[~near])
    n_bytes = (int(rest.max(initial=0)).bit_length() + 7) // 8
    parts = _pack_flags(other, level) + _pack_flags(near, level)
    parts += [squeeze(plane, level) for plane in floats.planes(rest)[:n_bytes]]
    return bytes([n_bytes]) + join(parts)


def decode(data: bytes, total: np.ndarray, dtype: str) -> np.ndarray:
    """The stored floats of a block, as unsigned integers.

    Args:
      data: what ``encode`` returned.
      total: as it was given.
      dtype: as it was given.

    Raises:
      StoreError: the block is damaged.
    """
    guess = floats.from_double(total, dtype)
    order, toward = _expectation(guess, total, dtype)
    n_bytes = data[0] if data else 9
    if n_bytes > 8:
        raise StoreError("residual is damaged")
    sections = iter(split_all(data[1:]))
    other = _unpack_flags(sections, len(guess))
    count = int(other.sum())
    near = _unpack_flags(sections, count)
    folded = np.zeros(count - int(near.sum()), np.uint64)
    for place in range(n_bytes):
        part = unsqueeze(next(sections, b""), len(folded))
        folded |= np.frombuffer(part, np.uint8).astype(np.uint64) << np.uint64(8 * place)
    if next(sections, None) is not None:
        raise StoreError("residual is damaged")
    some = np.ones(count, np.int64)
    some[~near] = floats.unzigzag(folded)
    steps = np.zeros(len(guess), np.int64)
    steps[order[other]] = some
    return floats.unordered(floats.ordered(guess) + steps * toward, floats.WIDTH[dtype])


def entropy(bits: np.ndarray, total: np.ndarray, dtype: str) -> float:
    """Bits that the residual of a block holds at least, if its elements were alike and unrelated.

    Args:
      bits: the stored floats.
      total: base plus update before rounding.
      dtype: of the stored floats.
    """
    guess = floats.from_double(total, dtype)
    steps = floats.ordered(bits) - floats.ordered(guess)
    share = np.unique(steps, return_counts=True)[1] / len(steps)
    return float(-len(steps) * np.sum(share * np.log2(share)))


def _expectation(guess: np.ndarray, total: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Places by distance to the nearest border of two grid points, and on which side that lies."""
    with np.errstate(invalid="ignore", over="ignore"):
        off = total - floats.to_double(guess, dtype)
        distance = 0.5 * floats.spacing(guess, dtype) - np.abs(off)
        distance = np.where(distance > _TINY, distance, 0.0)  # NaN too
        rank = floats.from_double(distance, "float32") >> np.uint32(16)
    order = np.argsort(rank.astype(np.uint16), kind="stable")
    return order, np.where(off < 0, np.int64(-1), np.int64(1))


def _pack_flags(flags: np.ndarray, level: int) -> list[bytes]:
    segments = np.array_split(flags, _count(len(flags)))
    return [squeeze(np.packbits(part).tobytes(), level) for part in segments]


def _unpack_flags(sections: Iterator[bytes], size: int) -> np.ndarray:
    flags = []
    for places in np.array_split(np.empty(size, bool), _count(size)):
        data = unsqueeze(next(sections, b""), (len(places) + 7) // 8)
        flags.append(np.unpackbits(np.frombuffer(data, np.uint8), count=len(places)).astype(bool))
    return np.concatenate(flags)


def _count(flags: int) -> int:
    """Segments of so many flags."""
    return min(1 + flags // _FLAGS, _SEGMENTS)
