r"""Maximum likelihood: the closed form refined with every element's own rounding error.

The closed form weighs all elements alike. The rounding error differs from element to element, so
the most likely base and updates minimise

.. math::
   \sum_{i,x,y} w_{ixy} (W'_i - W - M_i)_{xy}^2, \qquad w_{ixy} = 1 / \mathrm{var}_{ixy},

over W and updates of the given ranks. One Gauss-Newton step moves each update in its tangent space,
:math:`dM_i = P_i V_i^T + U_i Q_i^T` with :math:`V_i^T Q_i = 0`; W is eliminated (it is the weighted
mean of :math:`W'_i - M_i`), and the linear system is solved by preconditioned conjugate gradients.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Array as AnyArray
from jaxtyping import Bool, Float, Int

from jdetune import linalg
from jdetune.factors import balanced_factors
from jdetune.noise import merge_variance
from jdetune.solvers.intersection import Scales


@dataclasses.dataclass(frozen=True)
class Refinement:
    """When the refinement stops.

    Attributes:
      tolerance: stop when the preconditioned gradient is this share of what the rounding error
        alone would make of it.
      max_steps: conjugate gradient steps a round, at the latest.
      rounds: Gauss-Newton steps at the latest; one or two are enough unless directions are nearly
        shared.
    """

    tolerance: float = 1e-2
    max_steps: int = 60
    rounds: int = 6


class Tangent(NamedTuple):
    """Bases of the tangent spaces of all updates, in whitened coordinates, and the weights.

    Attributes:
      left: U, orthonormal up to each rank, zero past it.
      right: V, likewise.
      active: which columns are used.
      weight: inverse variance of each stored element, relative to its mean.
      total: sum of the weights over models.
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


class Refined(NamedTuple):
    """Updates after refinement, as factors, with what the solver has to say.

    ``steps`` counts conjugate gradient steps over all rounds; ``reached`` is the preconditioned
    gradient that the last round started from, as a share of what rounding alone makes of it.
    """

    left: Float[Array, "model row rank"]
    right: Float[Array, "model rank col"]
    steps: Int[Array, ""]
    reached: Float[Array, ""]
    rounds: Int[Array, ""]


def to_matrices(tangent: Tangent, step: Step) -> Float[Array, "model row col"]:
    r"""The tangent vector as matrices, :math:`P V^T + U Q^T`: one product a model."""
    left = jnp.concatenate([step.p, tangent.left], axis=2)
    right = jnp.concatenate([tangent.right, step.q], axis=2)
    return linalg.contract("mra,mca->mrc", left, right)


def to_tangent(tangent: Tangent, matrices: Float[Array, "model row col"]) -> Step:
    """The adjoint of ``to_matrices``: matrices projected on the tangent spaces."""
    p = linalg.contract("mrc,mca->mra", matrices, tangent.right)
    q = linalg.contract("mrc,mra->mca", matrices, tangent.left)
    return _project(tangent, Step(p, q))


def _project(tangent: Tangent, step: Step) -> Step:
    """Takes from Q what P can express: the two parts are then orthogonal."""
    inside = linalg.contract("mca,mcb->mab", tangent.right, step.q)
    q = step.q - linalg.contract("mca,mab->mcb", tangent.right, inside)
    keep = tangent.active[:, None, :]
    return Step(jnp.where(keep, step.p, 0), jnp.where(keep, q, 0))


def normal_operator(tangent: Tangent, step: Step) -> Step:
    """Gauss-Newton matrix times a tangent vector, the base eliminated."""
    moved = to_matrices(tangent, step)
    weighted = tangent.weight * moved
    mean = sum_models(weighted) / tangent.total
    return to_tangent(tangent, weighted - tangent.weight * mean)


def sum_models(values: Float[Array, "model ..."]) -> Float[Array, "..."]:
    """Sum over the leading axis, unrolled: XLA's reduction of a leading axis is slow on CPU."""
    total = values[0]
    for index in range(1, values.shape[0]):
        total = total + values[index]
    return total


def _preconditioner(tangent: Tangent) -> Step:
    """Inverse diagonal blocks, as one number a row and one a column."""
    free = tangent.weight * (1 - tangent.weight / tangent.total)
    tiny = jnp.finfo(free.dtype).tiny
    rows = jnp.maximum(jnp.mean(free, axis=2), tiny)
    cols = jnp.maximum(jnp.mean(free, axis=1), tiny)
    return Step(1 / rows[:, :, None], 1 / cols[:, :, None])


def _dot(a: Step, b: Step) -> Array:
    return jnp.sum(a.p * b.p) + jnp.sum(a.q * b.q)


def _axpy(x: Step, scale: Array, y: Step) -> Step:
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
      z, the number of steps, and the squared preconditioned residual.
    """
    scale = _preconditioner(tangent)
    tiny = jnp.finfo(gradient.p.dtype).tiny

    def precondition(step: Step) -> Step:
        return _project(tangent, Step(step.p * scale.p, step.q * scale.q))

    def going(carry: tuple) -> Array:
        *_, size, count = carry
        return (count < max_steps) & (size > goal)

    def advance(carry: tuple) -> tuple:
        z, residual, direction, size, count = carry
        image = normal_operator(tangent, direction)
        length = size / jnp.maximum(_dot(direction, image), tiny)
        z = _axpy(z, length, direction)
        residual = _axpy(residual, -length, image)
        scaled = precondition(residual)
        after = _dot(residual, scaled)
        direction = _axpy(scaled, after / jnp.maximum(size, tiny), direction)
        return z, residual, direction, after, count + 1

    first = precondition(gradient)
    size = _dot(gradient, first)
    zero = jax.tree.map(jnp.zeros_like, gradient)
    start = (zero, gradient, first, size, jnp.zeros_like(size, dtype=jnp.int32))
    z, _, _, size, count = jax.lax.while_loop(going, advance, start)
    return z, count, size


def preconditioned_square(tangent: Tangent, gradient: Step) -> Float[Array, ""]:
    """Squared norm of a gradient in the metric of the preconditioner."""
    scale = _preconditioner(tangent)
    return _dot(gradient, _project(tangent, Step(gradient.p * scale.p, gradient.q * scale.q)))


def weighted_base(
    weights: Float[AnyArray, "model row col"],
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
    variance: Float[Array, "model row col"],
) -> Float[Array, "row col"]:
    """Most likely base for given updates: the mean of W' - M, weighted by inverse variance.

    Summed relative to the first model, so that nothing is lost to the size of the weights.
    """
    dtype = variance.dtype
    reference = weights[0].astype(dtype)

    def add(total: tuple[Array, Array], model: Array) -> tuple[tuple[Array, Array], None]:
        value = weights[model].astype(dtype) - reference
        value = value - linalg.matmul(left[model], right[model])
        weight = 1 / variance[model]
        return (total[0] + weight * value, total[1] + weight), None

    zero = jnp.zeros_like(reference)
    models = jnp.arange(weights.shape[0], dtype=jnp.int32)
    (moved, total), _ = jax.lax.scan(add, (zero, zero), models)
    return reference + moved / total


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


def refine(
    weights: Float[AnyArray, "model row col"],
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
    ranks: Int[Array, " model"],
    scales: Scales,
    options: Refinement,
) -> Refined:
    """Gauss-Newton from the closed form to the most likely updates.

    The correction is computed in float32, relative to the rounding error: it needs no more. Base,
    updates and residuals stay in the dtype of the factors.

    Args:
      weights: merged weights of one layer as stored.
      left: B of the closed form, zero past each rank.
      right: A of the closed form.
      ranks: rank of each update.
      scales: rounding error as row and column factors.
      options: when to stop.

    Returns:
      The updates in the dtype of ``left``; the base follows from ``weighted_base``.
    """
    dtype, work = left.dtype, jnp.float32
    active = jnp.arange(left.shape[2], dtype=jnp.int32) < ranks[:, None]
    rows, cols = scales.row[:, None], scales.col

    freedom = jnp.sum(ranks).astype(dtype) * (weights.shape[1] + weights.shape[2])

    def going(carry: Refined) -> Array:
        return (carry.rounds < options.rounds) & (carry.reached > options.tolerance)

    def one_round(carry: Refined) -> Refined:
        variance = merge_variance(weights, carry.left, carry.right)
        base = weighted_base(weights, carry.left, carry.right, variance)
        error = residuals(weights, base, carry.left, carry.right) / rows / cols
        size = jnp.sqrt(jnp.mean(jnp.square(error))) + float(jnp.finfo(work).tiny)
        u, v, core = tangent_spaces(carry.left / rows, carry.right / cols, active)
        whitened = variance / jnp.square(rows) / jnp.square(cols)
        mean = jnp.mean(whitened)
        weight = (mean / whitened).astype(work)
        tangent = Tangent(u.astype(work), v.astype(work), active, weight, sum_models(weight))
        gradient = to_tangent(tangent, weight * (error / size).astype(work))
        unit = jnp.maximum(freedom, 1) * mean / jnp.square(size)
        goal = (options.tolerance**2 * unit).astype(work)
        z, count, _ = conjugate_gradients(tangent, gradient, goal, options.max_steps)
        first = preconditioned_square(tangent, gradient).astype(dtype)
        b, a = jax.vmap(retract)(u, core, v, z.p.astype(dtype) * size, z.q.astype(dtype) * size)
        return Refined(
            left=jnp.where(active[:, None, :], b * rows, 0),
            right=jnp.where(active[:, :, None], a * cols, 0),
            steps=carry.steps + count,
            reached=jnp.sqrt(first / unit),
            rounds=carry.rounds + 1,
        )

    none = jnp.zeros_like(ranks[0])
    return jax.lax.while_loop(
        going, one_round, Refined(left, right, none, jnp.inf + 0 * left[0, 0, 0], none)
    )


def most_likely(
    weights: Float[AnyArray, "model row col"],
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
    ranks: Int[Array, " model"],
    scales: Scales,
    options: Refinement = Refinement(),
) -> tuple[Array, Array, Array, Array, Array]:
    """Most likely base and updates from those of the closed form.

    Args:
      weights: merged weights of one layer as stored.
      left: B of the closed form, zero past each rank.
      right: A of the closed form.
      ranks: rank of each update.
      scales: rounding error as row and column factors.
      options: when to stop.

    Returns:
      Base, balanced B and A, rms of the residuals over that of the rounding error (about 1, less
      what the fitted updates take up), and conjugate gradient steps.
    """
    found = refine(weights, left, right, ranks, scales, options)
    variance = merge_variance(weights, found.left, found.right)
    base = weighted_base(weights, found.left, found.right, variance)
    error = residuals(weights, base, found.left, found.right)
    n_models = weights.shape[0]
    share = jnp.sum(jnp.square(error)) / jnp.sum(variance)
    ratio = jnp.sqrt(share * n_models / (n_models - 1))
    eye = jnp.broadcast_to(
        jnp.eye(left.shape[2], dtype=left.dtype), (n_models, left.shape[2], left.shape[2])
    )
    b, a = balanced_factors(found.left, eye, jnp.swapaxes(found.right, 1, 2), ranks)
    return base, b, a, ratio, found.steps


def residuals(
    weights: Float[AnyArray, "model row col"],
    base: Float[Array, "row col"],
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
) -> Float[Array, "model row col"]:
    """What base and updates leave over, :math:`W'_i - W - B_i A_i`, one model at a time."""

    def one(operands: tuple[Array, Array, Array]) -> Array:
        stored, b, a = operands
        return (stored.astype(base.dtype) - base) - linalg.matmul(b, a)

    return jax.lax.map(one, (weights, left, right))
