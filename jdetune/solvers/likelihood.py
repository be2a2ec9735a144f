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
from jaxtyping import Float, Int

from jdetune import linalg
from jdetune.factors import balanced_factors
from jdetune.noise import merge_variance
from jdetune.solvers.intersection import Scales
from jdetune.solvers.tangent import (
    Tangent,
    conjugate_gradients,
    retract,
    tangent_spaces,
    to_tangent,
)


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
        tangent = Tangent(u.astype(work), v.astype(work), active, weight, linalg.sum_models(weight))
        gradient = to_tangent(tangent, weight * (error / size).astype(work))
        unit = jnp.maximum(freedom, 1) * mean / jnp.square(size)
        goal = (options.tolerance**2 * unit).astype(work)
        z, count, first = conjugate_gradients(tangent, gradient, goal, options.max_steps)
        b, a = jax.vmap(retract)(u, core, v, z.p.astype(dtype) * size, z.q.astype(dtype) * size)
        return Refined(
            left=jnp.where(active[:, None, :], b * rows, 0),
            right=jnp.where(active[:, :, None], a * cols, 0),
            steps=carry.steps + count,
            reached=jnp.sqrt(first.astype(dtype) / unit),
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
