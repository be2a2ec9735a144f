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


class Tangent(NamedTuple):
    """Bases of the tangent spaces of all updates, in whitened coordinates, and the weights.

    Attributes:
      left: U, orthonormal up to each rank, zero past it.
      right: V, likewise.
      active: which columns are used.
      weight: inverse variance of each stored element, relative to its mean.
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


class Linearized(NamedTuple):
    """Updates ``left @ core @ right^T`` with their tangent spaces; ``unit`` is weight one."""

    tangent: Tangent
    left: Float[Array, "model row rank"]
    core: Float[Array, "model rank rank"]
    right: Float[Array, "model col rank"]
    unit: Float[Array, ""]


def to_matrices(tangent: Tangent, step: Step) -> Float[Array, "model row col"]:
    r"""The tangent vector as matrices, :math:`P V^T + U Q^T`: one product a model."""
    left = jnp.concatenate([step.p, tangent.left], axis=2)
    right = jnp.concatenate([tangent.right, step.q], axis=2)
    return linalg.contract("mra,mca->mrc", left, right)


def to_tangent(tangent: Tangent, matrices: Float[Array, "model row col"]) -> Step:
    """The adjoint of ``to_matrices``: matrices projected on the tangent spaces."""
    p = linalg.contract("mrc,mca->mra", matrices, tangent.right)
    q = linalg.contract("mrc,mra->mca", matrices, tangent.left)
    return project(tangent, Step(p, q))


def project(tangent: Tangent, step: Step) -> Step:
    """Takes from Q what P can express: the two parts are then orthogonal."""
    inside = linalg.contract("mca,mcb->mab", tangent.right, step.q)
    q = step.q - linalg.contract("mca,mab->mcb", tangent.right, inside)
    keep = tangent.active[:, None, :]
    return Step(jnp.where(keep, step.p, 0), jnp.where(keep, q, 0))


def normal_operator(tangent: Tangent, step: Step) -> Step:
    """Gauss-Newton matrix times a tangent vector, the base eliminated."""
    moved = to_matrices(tangent, step)
    weighted = tangent.weight * moved
    mean = linalg.sum_models(weighted) / tangent.total
    return to_tangent(tangent, weighted - tangent.weight * mean)


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


def conjugate_gradients(
    tangent: Tangent, gradient: Step, goal: Float[Array, ""], max_steps: int
) -> tuple[Step, Int[Array, ""], Float[Array, ""]]:
    """Solves ``normal_operator(z) = gradient`` until the squared residual is below ``goal``.

    Args:
      tangent: the tangent spaces.
      gradient: the right-hand side.
      goal: square of the preconditioned residual to stop at.
      max_steps: steps at the latest.

    Returns:
      z, the number of steps, and the square of the preconditioned gradient at the start.
    """
    scale = _preconditioner(tangent)
    tiny = jnp.finfo(gradient.p.dtype).tiny

    def precondition(step: Step) -> Step:
        return project(tangent, Step(step.p * scale.p, step.q * scale.q))

    def going(carry: tuple) -> Array:
        *_, size, count = carry
        return (count < max_steps) & (size > goal)

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
    zero = jax.tree.map(jnp.zeros_like, gradient)
    start = (zero, gradient, first, square, jnp.zeros_like(square, dtype=jnp.int32))
    z, _, _, _, count = jax.lax.while_loop(going, advance, start)
    return z, count, square


def sharper(conditioning: Float[Array, ""] | float) -> Float[Array, ""]:
    """Factor on the squared gradient to stop at, where directions are nearly shared.

    Errors along a direction that is shared up to the sine s leave a gradient s^2 as large; they are
    what the base's error is made of. Float32 gradients bear no more than 1e-8.
    """
    return jnp.clip(jnp.square(jnp.asarray(conditioning)), 1e-8, 1)


def tangent_spaces(
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
    active: Bool[Array, "model rank"],
) -> tuple[Array, Array, Array]:
    """Orthonormal bases U, V of whitened updates and their cores: ``left @ right = U X V^T``."""

    def one(left: Array, right: Array, active: Array) -> tuple[Array, Array, Array]:
        u = linalg.orthonormalize_leading(left, active)
        v = linalg.orthonormalize_leading(right.T, active)
        return u, v, linalg.matmul(linalg.matmul(u.T, left), linalg.matmul(right, v))

    return jax.vmap(one)(left, right, active)


def retract(
    u: Float[Array, "row rank"],
    core: Float[Array, "rank rank"],
    v: Float[Array, "col rank"],
    p: Float[Array, "row rank"],
    q: Float[Array, "col rank"],
) -> tuple[Float[Array, "row rank"], Float[Array, "rank col"]]:
    r"""Nearest update of the same rank to :math:`U X V^T + P V^T + U Q^T`, as factors."""
    rank = core.shape[0]
    left = jnp.concatenate([linalg.matmul(u, core) + p, u], axis=1)
    right = jnp.concatenate([v, q], axis=1)
    q_left, q_right = linalg.qr_basis(left), linalg.qr_basis(right)
    inner = linalg.matmul(linalg.matmul(q_left.T, left), linalg.matmul(right.T, q_right))
    short = [2 * rank - side for side in inner.shape]
    turn_left, values, turn_right = linalg.svd_square(jnp.pad(inner, [(0, k) for k in short]))
    turn_left, turn_right = turn_left[: inner.shape[0]], turn_right[: inner.shape[1]]
    root = jnp.sqrt(values[:rank])
    b = linalg.matmul(q_left, turn_left[:, :rank]) * root
    return b, (linalg.matmul(q_right, turn_right[:, :rank]) * root).T


def linearize(
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
    active: Bool[Array, "model rank"],
    scales: tuple[Array, Array],
    information: Float[Array, "model row col"],
    known: Bool[Array, "row col"] | None = None,
) -> Linearized:
    """Tangent spaces and weights at given updates, whitened by the scales, in float32.

    Args:
      left: B of each update.
      right: A of each update.
      active: which columns are used.
      scales: rounding error as row and column factors.
      information: inverse variance of each stored element's error.
      known: elements whose base is known and is not fitted.

    Returns:
      The tangent spaces, the cores of the updates in them, and the unit of the weights.
    """
    rows, cols = scales[0][:, None], scales[1]
    u, v, core = tangent_spaces(left / rows, right / cols, active)
    whitened = information * jnp.square(rows) * jnp.square(cols)
    unit = jnp.mean(whitened)
    weight = (whitened / unit).astype(jnp.float32)
    total = linalg.sum_models(weight)
    if known is not None:
        total = jnp.where(known, jnp.inf, total)
    spaces = Tangent(u.astype(jnp.float32), v.astype(jnp.float32), active, weight, total)
    return Linearized(spaces, u, core, v, unit)


def move(
    at: Linearized, step: Step, size: Array, scales: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Updates moved by ``size * step`` from where they were linearised, as B and A."""
    dtype = at.left.dtype
    p, q = (part.astype(dtype) * size for part in step)
    b, a = jax.vmap(retract)(at.left, at.core, at.right, p, q)
    keep = at.tangent.active
    left = jnp.where(keep[:, None, :], b * scales[0][:, None], 0)
    return left, jnp.where(keep[:, :, None], a * scales[1], 0)
