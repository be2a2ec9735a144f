"""The time that no solver can beat: bytes that must be read, products that must be formed.

The formula is fixed. With s = 2 r + 8 columns of a sketch, n models are read twice and the base is
written once, and every element is multiplied with the sketch from both sides:

    bytes = (2 n + 1) row col itemsize,   flops = 4 n row col s,
    limit = max(bytes / streaming rate, flops / rate of a float32 product at the sketch's shape).

Both rates are measured in the run that uses them.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

#: Columns of the sketch beside twice the largest rank, in the formula.
OVERSAMPLING = 8
#: Bytes of the array that is streamed, far beyond the caches.
STREAM_BYTES = 2**28
#: Seconds that one timing lasts at least; shorter calls are repeated within it.
LEAST_SECONDS = 5e-3
MOST_CALLS = 200


@dataclasses.dataclass(frozen=True)
class Rates:
    """What this machine does: bytes and float32 operations a second."""

    stream: float
    gemm: float


@dataclasses.dataclass(frozen=True)
class Limit:
    """Work of one layer and the least time for it."""

    n_bytes: int
    flops: int
    seconds: float


def work(n_models: int, row: int, col: int, rank: int, itemsize: int = 4) -> tuple[int, int]:
    """Bytes and floating-point operations of one layer.

    Example:
      >>> work(3, 10, 10, 2)
      (2800, 14400)
    """
    sketch = 2 * rank + OVERSAMPLING
    return (2 * n_models + 1) * row * col * itemsize, 4 * n_models * row * col * sketch


def limit(rates: Rates, n_models: int, row: int, col: int, rank: int, itemsize: int = 4) -> Limit:
    """The least time of one layer at these rates."""
    n_bytes, flops = work(n_models, row, col, rank, itemsize)
    return Limit(n_bytes, flops, max(n_bytes / rates.stream, flops / rates.gemm))


def measure(row: int, col: int, rank: int, repeats: int = 9, n_bytes: int = STREAM_BYTES) -> Rates:
    """Both rates: an array read and written in place, and [row, col] @ [col, s] in float32."""
    matrix = jax.random.normal(jax.random.key(0), (row, col), jnp.float32)
    sketch = jax.random.rademacher(jax.random.key(1), (col, 2 * rank + OVERSAMPLING), jnp.float32)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
    flops = 2 * row * col * sketch.shape[1]
    return Rates(
        stream=_stream_rate(n_bytes, repeats),
        gemm=flops / seconds_of(lambda: product(matrix, sketch), repeats),
    )


def _stream_rate(n_bytes: int, repeats: int) -> float:
    """Bytes a second, read and written; in place, since fresh memory would be paged in first."""
    array = jnp.ones((n_bytes // 4,), jnp.float32)
    negate = jax.jit(jnp.negative, donate_argnums=0)

    def run() -> jax.Array:
        nonlocal array
        array = negate(array)
        return array

    return 2 * n_bytes / seconds_of(run, repeats)


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    """Lower quartile of the times of a call; the first, which compiles, is left out.

    Short calls are made several at a time and waited for together, so that the time of a call's
    dispatch does not count where the device works on while the next call is made.
    """
    jax.block_until_ready(run())
    clock = time.perf_counter()
    jax.block_until_ready(run())
    once = max(time.perf_counter() - clock, 1e-9)
    calls = min(math.ceil(LEAST_SECONDS / once), MOST_CALLS)
    times = []
    for _ in range(repeats):
        clock = time.perf_counter()
        outputs = jax.tree.leaves([run() for _ in range(calls)])
        jax.block_until_ready([one for one in outputs if not one.is_deleted()])
        times.append((time.perf_counter() - clock) / calls)
    inside = len(times) > 1  # and never below the least: the other method goes beyond few times
    return statistics.quantiles(times, n=4, method="inclusive")[0] if inside else times[0]
