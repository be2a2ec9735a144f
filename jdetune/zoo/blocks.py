"""Blocks of bytes, alone or beside a sibling's: several encodings, of which the smallest is kept.

Weights of floats differ in their low bits from anything; what can be saved lies in signs and
exponents, so the bytes of the elements are taken apart by place. A block that resembles a
sibling's block is kept as its difference to it, in steps of the float grid or as flipped bits.
"""

import numpy as np

from jdetune.zoo import floats
from jdetune.zoo.zstd import StoreError, join, split, squeeze, unsqueeze

#: Raw bytes of a block, but for the last of an object.
BLOCK = 1 << 22
#: Bytes by which the encoding of a larger block is chosen.
_SAMPLE = 1 << 18
BYTES, PLANES, ROTATED, STEPS, FLIPS = range(5)


def encode(data: bytes, width: int, level: int, sibling: bytes | None = None) -> bytes:
    """A block in the smallest of the encodings.

    Args:
      data: its bytes, at most ``BLOCK`` of them.
      width: bytes of an element: 1, 2, 4 or 8; 1 for what is no numbers.
      level: of zstandard.
      sibling: as many bytes of another object.
    """
    kinds = [BYTES]
    if width in (2, 4, 8) and len(data) % width == 0 and data:
        kinds = [PLANES, BYTES] + [ROTATED] * (width < 8)
        if sibling is not None:
            kinds += [STEPS, FLIPS] if width < 8 else [FLIPS]
    if len(data) > 2 * _SAMPLE and len(kinds) > 1:
        start = (len(data) - _SAMPLE) // 2 // width * width
        part = slice(start, start + _SAMPLE)
        other = None if sibling is None else sibling[part]
        found = {kind: len(_encode(kind, data[part], width, level, other)) for kind in kinds}
        kinds = [min(kinds, key=found.__getitem__)]
    encoded = (bytes([kind]) + _encode(kind, data, width, level, sibling) for kind in kinds)
    return min(encoded, key=len)


def decode(block: bytes, size: int, width: int, sibling: bytes | None = None) -> bytes:
    """The bytes of a block.

    Args:
      block: what ``encode`` returned.
      size: how many bytes must come out.
      width: as it was encoded with.
      sibling: the other object's bytes, if it was encoded with them.

    Raises:
      StoreError: the block is damaged.
    """
    kind, body = block[:1], block[1:]
    if kind == bytes([BYTES]):
        return unsqueeze(body, size)
    known = kind in (bytes([k]) for k in (PLANES, ROTATED, STEPS, FLIPS))
    if not known or width not in (2, 4, 8) or size % width:
        raise StoreError("block of an unknown kind")
    other = np.frombuffer(sibling or b"", f"<u{width}")
    if kind[0] in (STEPS, FLIPS) and len(other) * width != size:
        raise StoreError("block of differences without a sibling")
    if kind[0] in (ROTATED, STEPS) and width == 8:
        raise StoreError("block of an unknown kind")
    parts = [unsqueeze(part, size // width) for part in split(body, width)]
    values = floats.from_planes(parts)
    if kind[0] == ROTATED:
        values = floats.rotate(values, left=False)
    elif kind[0] == FLIPS:
        values = values ^ other
    elif kind[0] == STEPS:
        span = np.int64(1 << (8 * width))
        shift = floats.unzigzag(values.astype(np.uint64))
        keys = floats.ordered(other) + shift
        half = span >> 1
        values = floats.unordered((keys + half) % span - half, width)
    return values.tobytes()


def _encode(kind: int, data: bytes, width: int, level: int, sibling: bytes | None) -> bytes:
    if kind == BYTES:
        return squeeze(data, level)
    values, other = (np.frombuffer(d or b"", f"<u{width}") for d in (data, sibling))
    if kind == ROTATED:
        values = floats.rotate(values)
    elif kind == FLIPS:
        values = values ^ other
    elif kind == STEPS:
        span = np.int64(1 << (8 * width))
        shift = floats.ordered(values) - floats.ordered(other)
        half = span >> 1
        values = floats.zigzag((shift + half) % span - half).astype(values.dtype)
    return join([squeeze(plane, level) for plane in floats.planes(values)])
