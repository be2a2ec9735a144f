"""Bits of floats, blocks and residuals: everything comes back, and nothing else is accepted."""

import ml_dtypes
import numpy as np
import pytest

from jdetune.zoo import blocks, floats, residual
from jdetune.zoo.zstd import StoreError, join, library, split_all, squeeze, unsqueeze

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def patterns(dtype, count=3000, seed=0):
    """Random bits, so also NaN, infinity and subnormals, and all special ones."""
    width = floats.WIDTH[dtype]
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << (8 * width), count, np.uint64).astype(f"u{width}")
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 6e-8, -1e-7, 1, 65504, 3e38])
    with np.errstate(over="ignore"):
        own = special.astype(DTYPES[dtype]).view(bits.dtype)
    return np.concatenate([bits, own])


def values_of(bits, dtype):
    with np.errstate(invalid="ignore"):
        return bits.view(DTYPES[dtype]).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_stand_in_the_order_of_the_values_and_come_back(dtype):
    bits = patterns(dtype)
    keys = floats.ordered(bits)
    assert np.array_equal(floats.unordered(keys, floats.WIDTH[dtype]), bits)
    values = values_of(bits, dtype)
    finite = np.isfinite(values)
    order = np.argsort(keys[finite])
    assert np.all(np.diff(values[finite][order]) >= 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_are_those_of_ieee(dtype):
    bits = patterns(dtype)
    values = values_of(bits, dtype)
    finite = np.isfinite(values)
    exact = values[finite]
    assert np.array_equal(floats.to_double(bits, dtype)[finite], exact)
    rng = np.random.default_rng(1)
    some = np.concatenate([rng.standard_normal(4000) * 10.0 ** rng.integers(-9, 5, 4000), exact])
    with np.errstate(over="ignore", under="ignore"):
        wanted = some.astype(np.float32).astype(DTYPES[dtype])
    assert np.array_equal(floats.from_double(some, dtype), wanted.view(bits.dtype))
    assert np.isnan(floats.from_double(np.array([np.nan]), dtype).view(DTYPES[dtype]))[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_spacing_is_the_distance_to_the_next_float(dtype):
    bits = patterns(dtype)
    values = np.abs(values_of(bits, dtype))
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    usual = np.isfinite(values) & (values < largest)
    magnitude = floats.from_double(values[usual], dtype)
    following = floats.to_double(magnitude + magnitude.dtype.type(1), dtype)
    assert np.array_equal(floats.spacing(bits, dtype)[usual], following - values[usual])


def test_trimmed_values_are_the_nearest_with_fewer_digits():
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    trimmed = floats.trim(values, 11)
    exponent = np.frexp(values)[1]
    wanted = np.ldexp(np.rint(np.ldexp(values.astype(np.float64), 11 - exponent)), exponent - 11)
    assert np.array_equal(trimmed, wanted.astype(np.float32))
    assert np.array_equal(floats.trim(values, 24), values)
    odd = np.array([np.inf, -np.inf, 0.0], np.float32)
    assert np.array_equal(floats.trim(odd, 11), odd)


def test_zigzag_and_rotation_come_back():
    values = np.array([0, -1, 1, -2, 2**40, -(2**40), 2**63 - 1, -(2**63)])
    assert np.array_equal(floats.unzigzag(floats.zigzag(values)), values)
    for width in (2, 4):
        bits = patterns("float32" if width == 4 else "float16")
        assert np.array_equal(floats.rotate(floats.rotate(bits), left=False), bits)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("like", [False, True])
def test_blocks_come_back_alone_and_beside_a_sibling(width, like):
    rng = np.random.default_rng(width)
    kind = {1: np.uint8, 2: np.float16, 4: np.float32, 8: np.float64}[width]
    one = (100 * rng.standard_normal(2000)).astype(kind)
    two = (one * 1.001 if like else 100 * rng.standard_normal(2000)).astype(kind)
    data, sibling = one.tobytes(), two.tobytes()
    alone = blocks.encode(data, width, 3)
    beside = blocks.encode(data, width, 3, sibling)
    assert blocks.decode(alone, len(data), width) == data
    assert blocks.decode(beside, len(data), width, sibling) == data
    assert len(alone) <= len(data) + 2
    assert len(beside) <= len(alone)
    if like and width in (2, 4):
        assert len(beside) < 0.8 * len(alone)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", [blocks.STEPS, blocks.FLIPS, blocks.ROTATED, blocks.PLANES])
def test_every_encoding_holds_every_pattern(dtype, kind):
    width = floats.WIDTH[dtype]
    data, sibling = (patterns(dtype, seed=s).tobytes() for s in (0, 1))
    block = bytes([kind]) + blocks._encode(kind, data, width, 3, sibling)
    assert blocks.decode(block, len(data), width, sibling) == data


def test_large_blocks_are_chosen_by_a_sample():
    data = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32).tobytes()
    block = blocks.encode(data, 4, 1)
    assert blocks.decode(block, len(data), 4) == data
    assert len(block) < 0.93 * len(data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 300, 50_000])
def test_residuals_come_back(dtype, count):
    rng = np.random.default_rng(count)
    total = 0.02 * rng.standard_normal(count)
    stored = floats.from_double(total + 0.1 * 2.0**-30 * rng.standard_normal(count), dtype)
    data = residual.encode(stored, total, dtype, 3)
    assert np.array_equal(residual.decode(data, total, dtype), stored)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residuals_hold_every_pattern_beside_every_sum(dtype):
    stored = patterns(dtype)
    total = np.random.default_rng(3).standard_normal(len(stored))
    total[:5] = [np.nan, np.inf, -np.inf, 1e300, -1e-320]
    data = residual.encode(stored, total, dtype, 3)
    assert np.array_equal(residual.decode(data, total, dtype), stored)


def test_likely_residuals_take_less_than_their_entropy():
    """Errors of a tenth of a step: where the border is near says most of what is to be said."""
    rng = np.random.default_rng(0)
    total = 1.0 + 0.5 * rng.random(200_000)
    stored = floats.from_double(total + 0.1 * 2.0**-23 * rng.standard_normal(len(total)), "float32")
    taken = 8 * len(residual.encode(stored, total, "float32", 3))
    assert taken < 0.75 * residual.entropy(stored, total, "float32")


def test_squeezed_bytes_hold_what_was_said_and_nothing_else():
    for data in (b"", b"a", bytes(100_000), np.random.default_rng(0).bytes(1000)):
        packed = squeeze(data, 3)
        assert unsqueeze(packed, len(data)) == data
        assert len(packed) <= len(data) + 1
        for size in (len(data) + 1, max(len(data) - 1, 0)):
            if size != len(data):
                with pytest.raises(StoreError):
                    unsqueeze(packed, size)
    for bad in (b"", b"\x07abc", b"\x01", b"\x01abc", squeeze(bytes(1000), 3)[:-1]):
        with pytest.raises(StoreError):
            unsqueeze(bad, 1000)


def test_a_frame_that_says_no_size_is_refused():
    stream = library().ZstdCompressor().compressobj()
    frame = stream.compress(bytes(1000)) + stream.flush()
    with pytest.raises(StoreError, match="declares"):
        unsqueeze(b"\x01" + frame, 1000)


def test_sections_that_end_early_are_refused():
    data = join([b"abc", b"", b"de"])
    assert split_all(data) == [b"abc", b"", b"de"]
    for end in range(1, len(data)):
        if end not in (7, 11):  # where a section ends
            with pytest.raises(StoreError):
                split_all(data[:end])


def test_damaged_residuals_and_blocks_never_crash():
    rng = np.random.default_rng(0)
    total = 0.02 * rng.standard_normal(500)
    stored = floats.from_double(total * (1 + 1e-7 * rng.standard_normal(500)), "float32")
    good = residual.encode(stored, total, "float32", 3)
    block = blocks.encode(stored.tobytes(), 4, 3)
    refused = 0
    for _ in range(300):
        for data, read in (
            (good, lambda d: residual.decode(d, total, "float32")),
            (block, lambda d: blocks.decode(d, 2000, 4)),
        ):
            broken = bytearray(data)
            broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
            try:
                read(bytes(broken[: rng.integers(1, len(broken) + 1)]))
            except StoreError:
                refused += 1
    assert refused > 300
