"""Base plus update is the same to the bit, whatever it is computed with."""

import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from jdetune.zoo.reading import summed
from jdetune.zoo.remerge import MAX_FACTOR, Factors, pack_factors, quantise, unpack_factors
from jdetune.zoo.zstd import StoreError


def factors(rows=40, cols=30, rank=5, error=1e-8, seed=0):
    rng = np.random.default_rng(seed)
    decay = np.exp(-np.arange(rank))
    left = (rng.standard_normal((rows, rank)) * decay).astype(np.float32)
    right = rng.standard_normal((rank, cols)).astype(np.float32)
    found = quantise(left, right, error)
    assert found is not None
    return left, right, found


@pytest.mark.parametrize("error", [1e-3, 1e-6, 1e-8])
def test_the_update_is_off_by_what_was_asked(error):
    left, right, found = factors(400, 300, 8, error)
    off = found.update(slice(None)) - left.astype(np.float64) @ right.astype(np.float64)
    assert 0.3 * error < np.sqrt(np.mean(off**2)) < error  # steps are powers of two, rounded down


def test_the_sum_is_that_of_exact_arithmetic():
    _, _, found = factors(rank=4)
    base = np.random.default_rng(1).standard_normal((40, 30)).astype(np.float32)
    total = summed(base.tobytes(), "float32", found, slice(None)).reshape(40, 30)
    for row, col in [(0, 0), (17, 23), (39, 29)]:
        whole = sum(
            int(found.left[row, k]) * int(found.right[k, col]) * 2 ** int(found.shifts[k])
            for k in range(4)
        )
        update = float(Fraction(whole) * Fraction(2) ** found.scale)  # rounds once
        assert total[row, col] == float(base[row, col]) + update


@pytest.mark.parametrize("step", [1, 3, 7, 39, 40])
def test_the_sum_does_not_depend_on_the_rows_taken_together(step):
    _, _, found = factors()
    base = np.random.default_rng(1).standard_normal((40, 30)).astype(np.float32)
    whole = summed(base.tobytes(), "float32", found, slice(None))
    parts = [
        summed(base[i : i + step].tobytes(), "float32", found, slice(i, min(i + step, 40)))
        for i in range(0, 40, step)
    ]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_the_order_of_directions_does_not_matter():
    """A float GEMM fails this: it is what another library, block size or thread count changes."""
    left, right, found = factors(rank=12)
    turned = Factors(found.left[:, ::-1], found.right[::-1], found.shifts[::-1], found.scale)
    assert turned.update(slice(None)).tobytes() == found.update(slice(None)).tobytes()
    one = left @ right
    other = np.ascontiguousarray(left[:, ::-1]) @ np.ascontiguousarray(right[::-1])
    assert one.tobytes() != other.tobytes()


def test_the_sum_does_not_depend_on_threads_or_on_the_processor_s_kernels():
    code = (
        "import hashlib, numpy as np\n"
        "from jdetune.zoo.remerge import quantise\n"
        "rng = np.random.default_rng(0)\n"
        "base, left, right = (rng.standard_normal(s) for s in ((300, 200), (300, 16), (16, 200)))\n"
        "total = base + quantise(left, right, 1e-7).update(slice(None))\n"
        "print(hashlib.sha256(total.tobytes()).hexdigest())\n"
    )
    settings = [
        {"OPENBLAS_NUM_THREADS": "1"},
        {"OPENBLAS_NUM_THREADS": "4", "OMP_NUM_THREADS": "4"},
        {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F"},
    ]
    found = set()
    for setting in settings:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**os.environ, **setting},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.strip())
    assert len(found) == 1


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_factors_come_back(rank):
    _, _, found = factors(rank=max(rank, 1))
    if rank == 0:
        nothing = quantise(np.zeros((40, 3), np.float32), np.zeros((3, 30), np.float32), 1e-9)
        assert nothing is not None
        found = nothing
    again = unpack_factors(pack_factors(found, 3), 40, 30, rank)
    assert again.update(slice(None)).tobytes() == found.update(slice(None)).tobytes()
    assert np.array_equal(again.left, found.left)
    assert np.array_equal(again.right, found.right)


def test_coarser_factors_take_fewer_bytes():
    fine, coarse = (len(pack_factors(factors(400, 300, 8, e)[2], 3)) for e in (1e-8, 1e-4))
    assert coarse < 0.7 * fine


def test_factors_out_of_range_are_not_kept():
    left, right, _ = factors()
    assert quantise(left, right, 1e-30) is None
    assert quantise(left, right, 0.0) is None
    assert quantise(left * np.float32(np.inf), right, 1e-8) is None
    assert quantise(left * np.float32(1e30), right, 1e-8) is None


def test_damaged_factors_are_refused():
    data = pack_factors(factors()[2], 3)
    for bad in (b"", data[:3], data[:-1], data + b"\0", b"\xff" * 40):
        with pytest.raises(StoreError):
            unpack_factors(bad, 40, 30, 5)
    with pytest.raises(StoreError):
        unpack_factors(data, 40, 30, 4)
    with pytest.raises(StoreError, match="larger"):
        unpack_factors(data, MAX_FACTOR, 30, 5)
