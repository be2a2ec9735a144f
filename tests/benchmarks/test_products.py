"""The products that the benchmark times are those of the program."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import products


def test_products_in_loops_and_branches_are_counted():
    def program(many, one):
        looped = jax.lax.map(lambda each: each @ one, many)
        chosen = jax.lax.cond(one[0, 0] > 0, lambda: one @ one @ one.T, lambda: one @ one)
        return chosen + looped.sum(axis=0)[:2]

    shapes = (
        jax.ShapeDtypeStruct((7, 3, 2), jnp.float32),
        jax.ShapeDtypeStruct((2, 2), jnp.float32),
    )
    found = products.counted(jax.make_jaxpr(program)(*shapes).jaxpr)
    seen = {(one.left, one.right): (times, one.flops) for one, times in found.items()}
    assert seen == {((3, 2), (2, 2)): (7, 2 * 3 * 2 * 2), ((2, 2), (2, 2)): (1, 2 * 2 * 2 * 2)}


def test_the_closed_forms_products_are_those_of_its_equations():
    """Of a large layer: n differences by 2 r + 8 columns, n models by r rows and the probes."""
    n, row, col, rank = 5, 512, 768, 16
    found = products.traced(n, row, col, rank)
    work = {"float32": 0, "float64": 0}
    for one, times in found.items():
        work[one.dtype] += times * one.flops
    (shift,) = (times for one, times in found.items() if one.left == (row, n * rank)
                and one.right == (n * rank, col) and one.dtype == "float64")  # fmt: skip
    assert shift == 1
    spaces = 2 * n * row * col * (2 * rank + 8)
    projected = 2 * n * row * col * (rank + 4)
    assert spaces + projected < work["float32"] < 1.5 * (spaces + projected)
    assert work["float64"] > 2 * row * n * rank * col


def test_the_report_has_sum_and_pass_in_limits():
    text = products.report(3, 64, 48, 4, repeats=1)
    assert text.startswith("64x48 n=3 r=4 float32; limit ")
    alone = float(text.split("products alone: ")[1].split(" ms")[0])
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    assert np.isclose(sum(float(cells[5]) for cells in rows), alone, atol=0.05 * len(rows) + 0.05)
