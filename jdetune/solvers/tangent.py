r"""Tangent spaces of low-rank updates: maps, the Gauss-Newton system, conjugate gradients.

A tangent vector of model i is :math:`P_i V_i^T + U_i Q_i^T` with :math:`V_i^T Q_i = 0`, an
isometric parametrisation. All functions are pure and work on all models of one layer at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdetune import linalg

#: Conditioning below which directions count as nearly shared.
NEARLY_SHARED = 1e-2
#: Rows of a block, at least: products with fewer are slow.
PRODUCT_ROWS = 256
#: Models of a block that are written out one by one.
UNROLLED = 8


class Tangent(NamedTuple):
    """Bases of the tangent spaces of all updates, in whitened coordinates, and the weights.

    Attributes:
      left: U, orthonormal up to each rank, zero past it.
      right: V, likewise.
      active: which columns are used.
      weight: inverse variance of each stored element.
      total: sum of the weights over models; infinite where the base is known.
    """

    left: Float[Array, "model row rank"]
    right: Float[Array, "model col rank"]
    active: Bool[Array, "model rank"]
    weight: Float[Array, "model row col"]
    total: Float[Array, "row col"]


class Step(NamedTuple):
    """A tangent vector: one pair of factors a model."""

    p: Float[Array, "model row rank"]
    q: Float[Array, "model col rank"]


def to_matrices(tangent: Tangent, step: Step) -> Float[Array, "model row col"]:
    r"""The tangent vector as matrices, :math:`P V^T + U Q^T`: one product a model."""
    return linalg.each_model(lambda pair: linalg.matmul(*pair), _factors(tangent, step))


def to_tangent(tangent: Tangent, matrices: Float[Array, "model row col"]) -> Step:
    """The adjoint of ``to_matrices``: matrices projected on the tangent spaces."""

    def one(operands: tuple[Array, ...]) -> Step:
        matrix, left, right = operands
        return Step(linalg.matmul(matrix, right), linalg.matmul(left.T, matrix).T)

    step = linalg.each_model(one, (matrices, tangent.left, tangent.right))
    return project(tangent, Step(*step))


def project(tangent: Tangent, step: Step) -> Step:
    """Takes from Q what P can express: the two parts are then orthogonal."""
    inside = linalg.contract("mca,mcb->mab", tangent.right, step.q)
    q = step.q - linalg.contract("mca,mab->mcb", tangent.right, inside)
    keep = tangent.active[:, None, :]
    return Step(jnp.where(keep, step.p, 0), jnp.where(keep, q, 0))


def normal_operator(tangent: Tangent, step: Step) -> Step:
    """Gauss-Newton matrix times a tangent vector, the base eliminated.

    On CPU over blocks of rows: high enough for fast products, and yet few matrices at a time.
    """
    n_models, row, col = tangent.weight.shape
    size = linalg.row_block(row, n_models * col, PRODUCT_ROWS)
    tall, wide = _factors(tangent, step)

    def slab(array: Array, index: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, index * size, size)

    def one_block(q: Array, index: Array) -> tuple[Array, Array]:
        def forth(operands: tuple[Array, ...]) -> Array:
            tall, wide, weight = operands
            return slab(weight, index) * linalg.matmul(slab(tall, index), wide)

        weighted = linalg.each_model(forth, (tall, wide, tangent.weight), UNROLLED)
        total = slab(tangent.total, index)
        mean = linalg.sum_models(weighted) / total  # a rounded reciprocal would be common to all

        def back(operands: tuple[Array, ...]) -> tuple[Array, Array]:
            weighted, weight, left, right, q = operands
            rest = weighted - slab(weight, index) * mean
            across = linalg.laid_out(slab(left, index).T)
            return linalg.matmul(rest, right), q + linalg.matmul(across, rest)

        models = (weighted, tangent.weight, tangent.left, tangent.right, q)
        p, q = linalg.each_model(back, models, UNROLLED)
        return q, p

    start = jnp.zeros_like(jnp.swapaxes(step.q, 1, 2))
    if size == row:
        q, p = one_block(start, jnp.int32(0))
    else:
        q, blocks = jax.lax.scan(one_block, start, jnp.arange(row // size, dtype=jnp.int32))
        p = jnp.moveaxis(blocks, 0, 1).reshape(step.p.shape)
    return project(tangent, Step(p, jnp.swapaxes(q, 1, 2)))


def _factors(tangent: Tangent, step: Step) -> tuple[Array, Array]:
    """The tangent vector's matrices as products: [model, row, 2 rank] and [model, 2 rank, col]."""
    tall = jnp.concatenate([step.p, tangent.left], axis=2)
    wide = jnp.concatenate([tangent.right, step.q], axis=2)
    return tall, linalg.laid_out(jnp.swapaxes(wide, 1, 2))


def free_information(tangent: Tangent) -> Float[Array, "model row col"]:
    """What each element tells of its update once the base is eliminated."""
    return tangent.weight * (1 - tangent.weight / tangent.total)


def _preconditioner(tangent: Tangent) -> Step:
    """Inverse diagonal blocks, as one number a row and one a column."""
    free = free_information(tangent)
    tiny = jnp.finfo(free.dtype).tiny
    rows = jnp.maximum(jnp.mean(free, axis=2), tiny)
    cols = jnp.maximum(jnp.mean(free, axis=1), tiny)
    return Step(1 / rows[:, :, None], 1 / cols[:, :, None])


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
