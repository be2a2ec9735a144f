r"""Tangent spaces of low-rank updates: maps, the Gauss-Newton system, conjugate gradients.

A tangent vector of model i is :math:`P_i V_i^T + U_i Q_i^T` with :math:`V_i^T Q_i = 0`, an
isometric parametrisation. All functions are pure and work on all models of one layer at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdetune import linalg
from jdetune.blocks import Each, by_rows

#: Conditioning below which directions count as nearly shared.
NEARLY_SHARED = 1e-2


class Tangent(NamedTuple):
    """Bases of the tangent spaces of all updates, in whitened coordinates, and the weights.

    Attributes:
      left: U, orthonormal up to each rank, zero past it.
      right: V, likewise.
      active: which columns are used.
      weight: inverse variance of each stored element.
      total: sum of the weights over models; infinite where the base is known.
      rows: what an element of each row tells of its update once the base is eliminated, the mean.
      cols: the same of each column.
    """

    left: Float[Array, "model row rank"]
    right: Float[Array, "model col rank"]
    active: Bool[Array, "model rank"]
    weight: Float[Array, "model row col"]
    total: Float[Array, "row col"]
    rows: Float[Array, "model row 1"]
    cols: Float[Array, "model 1 col"]


class Step(NamedTuple):
    """A tangent vector: one pair of factors a model."""

    p: Float[Array, "model row rank"]
    q: Float[Array, "model col rank"]


def pair(
    left: Float[Array, "model row rank"], right: Float[Array, "model col rank"], step: Step
) -> tuple[Array, Array]:
    r"""The tangent vector at U and V as products, :math:`P V^T + U Q^T`: one product a model.

    Returns:
      [model, row, 2 rank] and [model, 2 rank, col].
    """
    tall = jnp.concatenate([step.p, left], axis=2)
    wide = jnp.concatenate([right, step.q], axis=2)
    return tall, linalg.laid_out(jnp.swapaxes(wide, 1, 2))


def onto(
    left: Float[Array, "model row rank"],
    right: Float[Array, "model col rank"],
    matrices: linalg.PerModel,
) -> tuple[Float[Array, "model rank col"], Float[Array, "model row rank"]]:
    """Some rows' part of the adjoint: what they add to Q, transposed, and their P.

    Args:
      left: U of these rows.
      right: V.
      matrices: these rows of each model's matrix.
    """

    def across(left: Array, matrix: Array) -> Array:
        return linalg.matmul(linalg.laid_out(left.T), matrix)

    q = linalg.map_each(across, left, matrices)
    p = linalg.map_each(linalg.matmul, matrices, right)
    return linalg.stack_models(q), linalg.stack_models(p)


def to_tangent(
    tangent: Tangent,
    rows: Any,
    matrices: Callable[[Any], linalg.PerModel] = lambda rows: rows,
) -> Step:
    """The adjoint of ``pair``: matrices projected on the tangent spaces.

    Args:
      tangent: the tangent spaces.
      rows: the matrices, or arrays that they are made from, the rows before the last axis.
      matrices: makes each model's matrix of some rows.
    """

    def some(operands: tuple[Array, Any]) -> tuple[Array, Array]:
        left, rows = operands
        return onto(left, tangent.right, matrices(rows))

    return project(tangent, as_step(*by_rows(some, (tangent.left, rows))))


def as_step(q: Float[Array, "model rank col"], p: Float[Array, "model row rank"]) -> Step:
    """What ``onto`` gives, of all rows, as a tangent vector that is still to be projected."""
    return Step(p, jnp.swapaxes(q, 1, 2))


def project(tangent: Tangent, step: Step) -> Step:
    """Takes from Q what P can express: the two parts are then orthogonal."""
    inside = linalg.contract("mca,mcb->mab", tangent.right, step.q)
    q = step.q - linalg.contract("mca,mab->mcb", tangent.right, inside)
    keep = tangent.active[:, None, :]
    return Step(jnp.where(keep, step.p, 0), jnp.where(keep, q, 0))


def normal_operator(tangent: Tangent, step: Step) -> Step:
    """Gauss-Newton matrix times a tangent vector, the base eliminated."""
    tall, wide = pair(tangent.left, tangent.right, step)

    def some(rows: tuple) -> tuple[Array, Array]:
        tall, left, weights, total = rows
        moved = linalg.map_each(linalg.matmul, tall, wide)
        mean = linalg.sum_each(jnp.multiply, weights, moved) / total  # not times 1 / total: its
        # rounding error would be common to all models

        def rest(weight: Array, moved: Array) -> Array:
            return weight * (moved - mean)

        return onto(left, tangent.right, linalg.map_each(rest, weights, moved))

    rows = (tall, tangent.left, Each(tangent.weight), tangent.total)
    return project(tangent, as_step(*by_rows(some, rows)))


def information(
    weight: Float[Array, "model row col"], total: Float[Array, "row col"]
) -> tuple[Float[Array, "model 1 col"], Float[Array, "model row 1"]]:
    """What elements tell of their update once the base is eliminated: column sums, row means.

    Args:
      weight: inverse variances of some rows.
      total: their sums over models.
    """
    free = weight * (1 - weight / total)
    return jnp.sum(free, axis=1, keepdims=True), jnp.mean(free, axis=2, keepdims=True)


def _preconditioner(tangent: Tangent) -> Step:
    """Inverse diagonal blocks, as one number a row and one a column."""
    tiny = jnp.finfo(tangent.rows.dtype).tiny
    rows, cols = (jnp.maximum(part, tiny) for part in (tangent.rows, tangent.cols))
    return Step(1 / rows, 1 / jnp.swapaxes(cols, 1, 2))


def dot(a: Step, b: Step) -> Array:
    """Inner product of two tangent vectors."""
    return jnp.sum(a.p * b.p) + jnp.sum(a.q * b.q)


def axpy(x: Step, scale: Array, y: Step) -> Step:
    """``x + scale * y``."""
    return Step(x.p + scale * y.p, x.q + scale * y.q)


def preconditioned_size(tangent: Tangent, gradient: Step) -> Float[Array, ""]:
    """Square of a gradient, preconditioned: what conjugate gradients start from."""
    scale = _preconditioner(tangent)
    first = project(tangent, Step(gradient.p * scale.p, gradient.q * scale.q))
    return dot(gradient, first)


def conjugate_gradients(
    tangent: Tangent,
    gradient: Step,
    max_steps: int,
    goal: Float[Array, ""] | float = 0.0,
    share: Float[Array, ""] | float = 0.0,
) -> tuple[Step, Int[Array, ""]]:
    """Solves ``normal_operator(z) = gradient`` until the preconditioned residual is small.

    Args:
      tangent: the tangent spaces.
      gradient: the right-hand side.
      max_steps: steps at the latest.
      goal: square of the preconditioned residual to stop at.
      share: of the square at the start, to stop at.

    Returns:
      z, and the number of steps.
    """
    scale = _preconditioner(tangent)
    tiny = jnp.finfo(gradient.p.dtype).tiny

    def precondition(step: Step) -> Step:
        return project(tangent, Step(step.p * scale.p, step.q * scale.q))

    def going(carry: tuple) -> Array:
        *_, size, count = carry
        return (count < max_steps) & (size > least)

    def advance(carry: tuple) -> tuple:
        z, residual, direction, size, count = carry
        image = normal_operator(tangent, direction)
        length = size / jnp.maximum(dot(direction, image), tiny)
        z = axpy(z, length, direction)
        residual = axpy(residual, -length, image)
        scaled = precondition(residual)
        after = dot(residual, scaled)
        direction = axpy(scaled, after / jnp.maximum(size, tiny), direction)
        return z, residual, direction, after, count + 1

    first = precondition(gradient)
    square = dot(gradient, first)
    least = jnp.maximum(goal, share * square).astype(square.dtype)
    zero = jax.tree.map(jnp.zeros_like, gradient)
    start = (zero, gradient, first, square, jnp.zeros_like(square, dtype=jnp.int32))
    z, _, _, _, count = jax.lax.while_loop(going, advance, start)
    return z, count


def sharper(conditioning: Float[Array, ""] | float) -> Float[Array, ""]:
    """Factor on the squared gradient to stop at, where directions are nearly shared.

    Errors along a direction that is shared up to the sine s leave a gradient s^2 as large; they are
    what the base's error is made of, so there a tenth of the usual tolerance is asked for, too.
    Float32 gradients bear no more than 1e-10.
    """
    value = jnp.asarray(conditioning)
    return jnp.clip(jnp.square(value) * jnp.where(value < NEARLY_SHARED, 0.01, 1.0), 1e-10, 1)
