"""What the closed form's matrix products alone cost, beside the limit of ``benchmarks.limit``.

    python -m benchmarks.products
    python -m benchmarks.products --row=512 --col=2048 --count=5 --rank=16

The products are those of the program itself (``rowspace.solve_layer``, traced), each kind timed
alone with its operands in memory and all cores at work. Their sum, in limits, is what the closed
form cannot go below on this machine, whatever is made of the passes between the products; one such
pass, the differences of neighbours, is timed too.
"""

import collections
from collections.abc import Iterator
from typing import Any, NamedTuple

from absl import app, flags

from jdetune.cli.main import prepare_environment

if __name__ == "__main__":  # before JAX starts
    prepare_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import limit, tables  # noqa: E402
from benchmarks.solver_families import FAMILIES  # noqa: E402
from jdetune import linalg  # noqa: E402
from jdetune.noise import as_merged  # noqa: E402
from jdetune.solvers import rowspace  # noqa: E402

HEADER = ("product", "dtype", "times", "GFLOP", "ms", "GFLOP/s")
#: Products of less than this share of the work are one row.
SMALL = 0.01


class Product(NamedTuple):
    """One kind of product: what ``jax.lax.dot_general`` is called with, and its work."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    dtype: str
    dimensions: Any
    flops: int


class Timed(NamedTuple):
    """A kind of product, how often it occurs, and the seconds of all of them."""

    product: Product
    times: int
    seconds: float

    @property
    def flops(self) -> int:
        """Work of all of them."""
        return self.times * self.product.flops


def traced(n_models: int, row: int, col: int, rank: int) -> dict[Product, int]:
    """Every kind of product of the closed form of one layer, and how often it occurs."""
    weights = as_merged(np.ones((n_models, row, col), np.float32))
    with linalg.scope(jnp.dtype("float64")):
        program = jax.make_jaxpr(lambda models: rowspace.solve_layer(models, rank))(weights)
    return counted(program.jaxpr)


def counted(program: Any) -> dict[Product, int]:
    """Every kind of product of a traced program, the least that it can come to.

    Loops of known length are multiplied out, others count once; of branches the least counts.
    """
    total: collections.Counter[Product] = collections.Counter()
    for product, times in _products(program, 1):
        total[product] += times
    return total


def _products(program: Any, times: int) -> Iterator[tuple[Product, int]]:
    """Products of a program and of those within it."""
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            left, right = (one.aval for one in equation.invars)
            (summed, _), _ = dimensions = equation.params["dimension_numbers"]
            length = int(np.prod([left.shape[axis] for axis in summed]))
            flops = 2 * length * int(np.prod(equation.outvars[0].aval.shape))
            yield Product(left.shape, right.shape, str(left.dtype), dimensions, flops), times
        inner = times * equation.params.get("length", 1)
        parts = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program)
        within = [getattr(part, "jaxpr", part) for part in parts if _is_program(part)]
        if equation.primitive.name == "cond":
            within = [min(within, key=_work)]
        for part in within:
            yield from _products(part, inner)


def _is_program(part: Any) -> bool:
    return hasattr(part, "eqns")


def _work(program: Any) -> int:
    return sum(times * product.flops for product, times in _products(program, 1))


def measure(products: dict[Product, int], repeats: int) -> list[Timed]:
    """Seconds of every kind of product, those of the most work first."""
    found = []
    with linalg.scope(jnp.dtype("float64")):
        for product, times in products.items():
            left, right = (
                jax.random.normal(jax.random.key(k), shape, jnp.dtype(product.dtype))
                for k, shape in enumerate((product.left, product.right))
            )
            run = jax.jit(
                lambda a, b, at=product.dimensions: jax.lax.dot_general(
                    a, b, at, precision=jax.lax.Precision.HIGHEST
                )
            )
            seconds = limit.seconds_of(lambda run=run, a=left, b=right: run(a, b), repeats)
            found.append(Timed(product, times, times * seconds))
    return sorted(found, key=lambda one: -one.flops)


def pass_seconds(n_models: int, row: int, col: int, repeats: int) -> float:
    """Seconds of the differences of neighbours: one pass over all models."""
    values = jnp.ones((n_models, row, col), jnp.float32)
    run = jax.jit(lambda x: [x[k] - x[(k + 1) % n_models] for k in range(n_models)])
    return limit.seconds_of(lambda: run(values), repeats)


def report(n_models: int, row: int, col: int, rank: int, repeats: int) -> str:
    """Table of the products, and their sum and one pass in limits."""
    found = measure(traced(n_models, row, col, rank), repeats)
    work = sum(one.flops for one in found)
    large = [one for one in found if one.flops >= SMALL * work]
    rest = [one for one in found if one not in large]
    rows = [
        _cells(" @ ".join(map(str, one.product[:2])), one.product.dtype, [one]) for one in large
    ]
    rows += [_cells("smaller ones", "", rest)] if rest else []
    rates = limit.measure(row, col, rank, repeats)
    least = limit.limit(rates, n_models, row, col, rank).seconds
    total, once = sum(one.seconds for one in found), pass_seconds(n_models, row, col, repeats)
    return "\n\n".join([
        f"{row}x{col} n={n_models} r={rank} float32; limit {1e3 * least:.1f} ms",
        tables.table(HEADER, rows),
        f"products alone: {1e3 * total:.1f} ms, {total / least:.2f} limits; "
        f"one pass over all models: {1e3 * once:.1f} ms, {once / least:.2f} limits",
    ])  # fmt: skip


def _cells(name: str, dtype: str, found: list[Timed]) -> list[str]:
    flops, seconds = (
        sum(one.flops for one in found),
        sum(one.seconds for one in found),
    )
    times = str(sum(one.times for one in found))
    return [name, dtype, times, f"{flops / 1e9:.2f}", f"{1e3 * seconds:.1f}",
            f"{flops / seconds / 1e9:.0f}"]  # fmt: skip


def define_flags() -> None:
    """The flags of this command; other commands have some of the same names."""
    flags.DEFINE_integer("row", None, "Rows of one shape, instead of README's above 1024x1024.")
    flags.DEFINE_integer("col", None, "Its columns; as many as rows if left out.")
    flags.DEFINE_integer("count", 5, "Its number of models.", lower_bound=3)
    flags.DEFINE_integer("rank", 16, "Its rank.")
    flags.DEFINE_integer("repeats", 7, "Timed runs of each product.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Prints the report of every shape."""
    if len(argv) > 1:
        raise app.UsageError("python -m benchmarks.products takes flags only")
    given = flags.FLAGS
    shapes = [
        (case.n_models, case.row, case.col, case.rank)
        for name in ("sd15-1280", "mistral7b-n8")
        for case in FAMILIES[name]
    ]
    if given.row is not None:
        shapes = [(given.count, given.row, given.col or given.row, given.rank)]
    for shape in shapes:
        print(report(*shape, given.repeats), end="\n\n", flush=True)


if __name__ == "__main__":
    define_flags()
    app.run(main)
