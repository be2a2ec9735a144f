"""Base plus update with the same bits everywhere: factors are integers, and so are their products.

A float GEMM sums in an order that depends on library, threads and block size. Here the factors are
integers times powers of two, one for each of their rank directions, and the product is summed in
64-bit integers, where order does not matter and overflow wraps alike on all machines. What follows
is one conversion to float64, one exact scaling, one addition and one or two roundings for every
element alone, each defined by IEEE 754, none fused with another.
"""

import dataclasses
import struct

import numpy as np

from jdetune.zoo import floats
from jdetune.zoo.zstd import StoreError, join, split_all, squeeze, unsqueeze

#: Elements of factors that a matrix may have: what decoding holds in memory.
MAX_FACTOR = 1 << 25
#: Bits of the largest sum of products, below the sign of an int64.
_ROOM = 61
_MAX_EXPONENT = 400
_SCALES = struct.Struct("<hHH")


@dataclasses.dataclass(frozen=True)
class Factors:
    """An update M = sum over k of left[:, k] right[k] 2^(scale + shift[k]), in integers.

    Attributes:
      left: [row, rank] int64.
      right: [rank, col] int64.
      shifts: [rank] int64, not negative.
      scale: power of two that all terms share.
    """

    left: np.ndarray
    right: np.ndarray
    shifts: np.ndarray
    scale: int

    def update(self, rows: slice) -> np.ndarray:
        """M for some rows, float64 [row, col]; the same whatever the rows are taken with."""
        weighted = self.right << self.shifts[:, None]
        total = self.left[rows] @ weighted
        return np.ldexp(total.astype(np.float64), self.scale)


def quantise(left: np.ndarray, right: np.ndarray, error: float) -> Factors | None:
    """Factors as integers, so coarse that the update is off by about ``error``.

    Every direction gets the same share of the error, so weak ones get few bits.

    Args:
      left: B [row, rank], finite.
      right: A [rank, col].
      error: rms error of an element of the update, in the weights' units; positive.

    Returns:
      The factors; None if they do not fit into the integers' range or are not finite.
    """
    rows, rank = left.shape
    b, a = left.astype(np.float64), right.astype(np.float64)
    sizes = np.sqrt(np.mean(b * b, axis=0)), np.sqrt(np.mean(a * a, axis=1))
    if not (np.all(np.isfinite(sizes)) and np.isfinite(error) and error > 0):
        return None
    used = (sizes[0] > 0) & (sizes[1] > 0)
    b, a, rank = b[:, used], a[used], int(used.sum())
    if rank == 0:
        return Factors(
            np.zeros((rows, 0), np.int64), np.zeros((0, a.shape[1]), np.int64), np.zeros(0, int), 0
        )
    share = error / np.sqrt(rank / 6)
    left_step = np.floor(np.log2(share / sizes[1][used])).astype(np.int64)
    right_step = np.floor(np.log2(share / sizes[0][used])).astype(np.int64)
    steps = left_step + right_step
    scale = int(steps.min())
    with np.errstate(over="ignore", invalid="ignore"):
        whole_left = np.rint(np.ldexp(b, -left_step[None, :]))
        whole_right = np.rint(np.ldexp(a, -right_step[:, None]))
    limit = 2.0**_ROOM
    if max(np.abs(whole_left).max(), np.abs(whole_right).max()) >= limit:
        return None
    found = Factors(whole_left.astype(np.int64), whole_right.astype(np.int64), steps - scale, scale)
    return found if _fits(found) else None


def pack_factors(factors: Factors, level: int) -> bytes:
    """Factors in few bytes: planes of bytes of every factor, small magnitudes first."""
    parts = []
    widths = []
    for matrix in (factors.left.T, factors.right):
        folded = floats.zigzag(np.ascontiguousarray(matrix))
        n_bytes = (int(folded.max(initial=0)).bit_length() + 7) // 8
        widths.append(n_bytes)
        parts += [squeeze(plane, level, True) for plane in floats.planes(folded)[:n_bytes]]
    head = _SCALES.pack(factors.scale, *widths)
    return join([head, factors.shifts.astype("<u2").tobytes(), *parts])


def unpack_factors(data: bytes, rows: int, cols: int, rank: int) -> Factors:
    """The inverse of ``pack_factors``.

    Raises:
      StoreError: the bytes are damaged, or ask for too much memory.
    """
    if rank * (rows + cols) > MAX_FACTOR or rank > 1 << 16:
        raise StoreError("factors larger than a store may hold")
    head, shifts, *parts = [*split_all(data), b"", b""]
    if len(head) != _SCALES.size or len(shifts) != 2 * rank:
        raise StoreError("factors without their scales")
    scale, *widths = _SCALES.unpack(head)
    parts = parts[:-2]
    if max(widths) > 8 or abs(scale) > _MAX_EXPONENT or len(parts) != sum(widths):
        raise StoreError("factors out of range")
    shift = np.frombuffer(shifts, "<u2").astype(np.int64)
    if shift.max(initial=0) > 62:
        raise StoreError("factors out of range")
    left = _from_planes(parts[: widths[0]], rank * rows).reshape(rank, rows).T
    right = _from_planes(parts[widths[0] :], rank * cols).reshape(rank, cols)
    return Factors(np.ascontiguousarray(left), right, shift, scale)


def _from_planes(parts: list[bytes], count: int) -> np.ndarray:
    folded = np.zeros(count, np.uint64)
    for place, part in enumerate(parts):
        plane = np.frombuffer(unsqueeze(part, count), np.uint8).astype(np.uint64)
        folded |= plane << np.uint64(8 * place)
    return floats.unzigzag(folded)


def _fits(factors: Factors) -> bool:
    """Whether no sum can overflow, and all numbers are within what a store holds."""
    left = np.abs(factors.left).max(axis=0).astype(np.float64)
    right = np.abs(factors.right).max(axis=1).astype(np.float64)
    if factors.shifts.max() > 62 or abs(factors.scale) > _MAX_EXPONENT:
        return False
    weighted = np.ldexp(right, factors.shifts)
    return bool(weighted.max() < 2.0**_ROOM and np.sum(left * weighted) < 2.0**_ROOM)
