"""What single operations cost on this device: factorisations, products, transfers.

    python -m benchmarks.micro                # a GPU: a minute or two
    python -m benchmarks.micro --small        # anything, in seconds

Batched eigh and Cholesky in float32 and float64, the product of a sketch at every precision that
XLA offers, copies from the host and back. What a device cannot do is a row too, with the reason.

A row has ``what``, ``kind`` (dtype or precision), ``size`` and ``seconds``; ``rate`` is in GFLOP/s
for products and GB/s for copies, and ``error`` says why there is none.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags

from jdetune.cli.main import prepare_environment

if __name__ == "__main__":  # before JAX starts
    prepare_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.limit import seconds_of  # noqa: E402
from benchmarks.tables import table  # noqa: E402

FAILURES = (RuntimeError, ValueError, NotImplementedError, TypeError, MemoryError)
PRECISIONS = (
    "DEFAULT",
    "F32_F32_F32",
    "TF32_TF32_F32",
    "TF32_TF32_F32_X3",
    "BF16_BF16_F32_X3",
    "BF16_BF16_F32_X6",
    "F64_F64_F64",
)
Row = dict[str, Any]


def rows(small: bool = False, repeats: int = 3) -> Iterator[Row]:
    """Every operation in turn.

    Args:
      small: sizes that any machine does at once.
      repeats: timed runs of each.

    Yields:
      One row an operation.
    """
    batches, sides = ((2,), (8,)) if small else ((24, 96), (64, 128, 256, 512))
    matrix, widths = ((64, 96), (8,)) if small else ((4096, 14336), (42, 138, 266))
    for name, function in (("eigh", _eigh), ("cholesky", jnp.linalg.cholesky)):
        for dtype in ("float32", "float64"):
            for batch in batches:
                for side in sides:
                    yield _factorisation(name, function, dtype, batch, side, repeats)
    for width in widths:
        for precision in PRECISIONS:
            yield _product(matrix, width, precision, repeats)
    yield from _copies(2**16 if small else 2**28, repeats)


def _row(what: str, kind: str, size: str, run: Callable[[], dict[str, Any]]) -> Row:
    known = {"what": what, "kind": kind, "size": size}
    try:
        return known | run()
    except FAILURES as error:
        text = str(error).strip().splitlines()
        return known | {"error": f"{type(error).__name__}: {text[0] if text else ''}"}


def _eigh(matrix: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.linalg.eigh(matrix))


def _factorisation(
    name: str, function: Callable, dtype: str, batch: int, side: int, repeats: int
) -> Row:
    def run() -> dict[str, Any]:
        with jax.enable_x64(dtype == "float64"):
            root = jax.random.normal(jax.random.key(0), (batch, side, side), jnp.dtype(dtype))
            gram = jnp.matmul(root, root.mT, precision=jax.lax.Precision.HIGHEST) / side
            gram = gram + jnp.eye(side, dtype=gram.dtype)
            compiled = jax.jit(function)
            found = jax.tree.leaves(compiled(gram))
            if not all(bool(jnp.isfinite(one).all()) for one in found):
                raise ValueError("not finite")
            return {"seconds": seconds_of(lambda: compiled(gram), repeats)}

    return _row(name, dtype, f"{batch} x {side}x{side}", run)


def _product(matrix: tuple[int, int], width: int, precision: str, repeats: int) -> Row:
    """Seconds, rate, and the error relative to float64 for weights that float32 holds."""
    row, col = matrix
    known = precision != "DEFAULT"
    chosen = jax.lax.DotAlgorithmPreset[precision] if known else jax.lax.Precision.DEFAULT

    def run() -> dict[str, Any]:
        left = jax.random.normal(jax.random.key(0), (row, col), jnp.float32)
        right = jax.random.rademacher(jax.random.key(1), (col, width), jnp.float32)
        product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=chosen))
        found = np.asarray(product(left, right), np.float64)[:64]
        true = np.asarray(left[:64], np.float64) @ np.asarray(right, np.float64)
        seconds = seconds_of(lambda: product(left, right), repeats)
        return {
            "seconds": seconds,
            "rate": 2e-9 * row * col * width / seconds,
            "relative_error": float(np.linalg.norm(found - true) / np.linalg.norm(true)),
        }

    return _row("product", precision, f"{row}x{col} @ {width}", run)


def _copies(n_bytes: int, repeats: int) -> Iterator[Row]:
    """From pageable memory of the host to the device, and back."""
    here = np.ones(n_bytes // 2, ml_dtypes.bfloat16)
    size = f"{n_bytes / 2**20:g} MiB"

    def there() -> dict[str, Any]:
        seconds = seconds_of(lambda: jax.device_put(here), repeats)
        return {"seconds": seconds, "rate": n_bytes / seconds / 1e9}

    def back() -> dict[str, Any]:
        times = []
        for step in range(repeats + 1):
            fresh = jax.block_until_ready(jax.device_put(here) * jnp.bfloat16(step))
            clock = time.perf_counter()
            np.asarray(fresh)
            times.append(time.perf_counter() - clock)
        seconds = sorted(times[1:])[repeats // 2]
        return {"seconds": seconds, "rate": n_bytes / max(seconds, 1e-9) / 1e9}

    yield _row("host to device", "bfloat16", size, there)
    yield _row("device to host", "bfloat16", size, back)


def text(found: list[Row]) -> str:
    """The rows as a table."""
    header = ["operation", "kind", "size", "ms", "GFLOP/s or GB/s", "relative error"]

    def cells(row: Row) -> list[str]:
        known = [row["what"], row["kind"], row["size"]]
        if "error" in row:
            return [*known, row["error"][:60].replace("|", "/"), "-", "-"]
        rate, error = row.get("rate"), row.get("relative_error")
        return [
            *known,
            f"{1e3 * row['seconds']:.3f}",
            "-" if rate is None else f"{rate:.0f}",
            "-" if error is None else f"{error:.1e}",
        ]

    return table(header, [cells(row) for row in found])


def main(argv: list[str]) -> None:
    """Prints the table."""
    if len(argv) > 1:
        raise app.UsageError("python -m benchmarks.micro takes flags only")
    print(jax.devices()[0].device_kind)
    print(text(list(rows(flags.FLAGS.small))))


if __name__ == "__main__":
    flags.DEFINE_boolean("small", False, "Sizes that any machine does at once.")
    app.run(main)
