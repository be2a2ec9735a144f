"""Bits of floats as integers: in the order of their values, and split into planes of bytes.

Everything here is integer arithmetic, or a conversion that IEEE 754 defines to the last bit.
"""

import numpy as np

#: Dtypes that can be merged again, and the bits of their significand.
SIGNIFICAND = {"float32": 24, "float16": 11, "bfloat16": 8}
WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}


def ordered(bits: np.ndarray) -> np.ndarray:
    """Signed integers that stand in the same order as the values: neighbours differ by one.

    Args:
      bits: unsigned integers as wide as the floats.

    Returns:
      int64; every pattern, NaN too, has its own.

    Example:
      >>> ordered(np.float32([-1, -0.0, 0.0, 1e-45]).view(np.uint32))[1:].tolist()
      [-1, 0, 1]
    """
    top = 1 << (8 * bits.dtype.itemsize - 1)
    wide = bits.astype(np.int64)
    return np.where(wide >= top, top - 1 - wide, wide)


def unordered(keys: np.ndarray, width: int) -> np.ndarray:
    """The inverse of ``ordered``, for keys in its range; others wrap around.

    Args:
      keys: int64.
      width: bytes of the floats.
    """
    top = 1 << (8 * width - 1)
    return np.where(keys < 0, top - 1 - keys, keys).astype(f"u{width}")


def zigzag(values: np.ndarray) -> np.ndarray:
    """int64 to uint64, small magnitudes to small values: 0, -1, 1, -2 to 0, 1, 2, 3."""
    return ((values << 1) ^ (values >> 63)).view(np.uint64)


def unzigzag(values: np.ndarray) -> np.ndarray:
    """The inverse of ``zigzag``."""
    signs = (values & np.uint64(1)).astype(np.int64)
    return (values >> np.uint64(1)).astype(np.int64) ^ -signs


def planes(values: np.ndarray) -> list[bytes]:
    r"""Bytes of the elements by place, the lowest first.

    Example:
      >>> planes(np.array([1, 2, 256], "<u2"))
      [b'\x01\x02\x00', b'\x00\x00\x01']
    """
    width = values.dtype.itemsize
    flat = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"))).reshape(-1)
    return [plane.tobytes() for plane in flat.view(np.uint8).reshape(-1, width).T]


def from_planes(parts: list[bytes]) -> np.ndarray:
    """The inverse of ``planes``, for one, two, four or eight of one length."""
    joined = np.empty((len(parts[0]), len(parts)), np.uint8)
    for place, part in enumerate(parts):
        joined[:, place] = np.frombuffer(part, np.uint8)
    return joined.view(f"<u{len(parts)}").reshape(-1)


def rotate(bits: np.ndarray, left: bool = True) -> np.ndarray:
    """Moves the sign behind the lowest bit, so that the exponent fills a byte of its own."""
    last = 8 * bits.dtype.itemsize - 1
    one, rest = bits.dtype.type(1), bits.dtype.type(last)
    return (bits << one) | (bits >> rest) if left else (bits >> one) | (bits << rest)


def to_double(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Values of stored floats as float64, exactly.

    Args:
      bits: unsigned integers.
      dtype: ``float32``, ``float16`` or ``bfloat16``.
    """
    with np.errstate(invalid="ignore"):
        if dtype == "bfloat16":
            return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        return bits.view(dtype).astype(np.float64)


def from_double(values: np.ndarray, dtype: str) -> np.ndarray:
    """Bits of float64 values rounded to float32 and, if need be, once more to 16 bits."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        single = values.astype(np.float32)
        if dtype == "float32":
            return single.view(np.uint32)
        if dtype == "float16":
            return single.astype(np.float16).view(np.uint16)
    bits = single.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)


def spacing(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Distance of stored floats to their next larger neighbours in magnitude, as float64."""
    digits = SIGNIFICAND[dtype]
    exponent_bits = 8 * WIDTH[dtype] - digits
    bias = (1 << (exponent_bits - 1)) - 1
    field = (bits >> bits.dtype.type(digits - 1)).astype(np.int64) & ((1 << exponent_bits) - 1)
    return np.ldexp(1.0, np.maximum(field, 1) - bias - (digits - 1))


def trim(values: np.ndarray, digits: int) -> np.ndarray:
    """float32 values rounded to fewer binary digits, so that the lowest bits are zero."""
    drop = 24 - digits
    if drop <= 0:
        return values
    bits = values.view(np.uint32)
    half = np.uint32((1 << (drop - 1)) - 1)
    even = (bits >> np.uint32(drop)) & np.uint32(1)
    kept = (bits + half + even) & ~np.uint32((1 << drop) - 1)
    return np.where(np.isfinite(values), kept, bits).view(np.float32)
