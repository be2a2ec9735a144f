r"""Updates fitted again once most of the base is known exactly.

Where the base is known, :math:`W'_i - W` is the update plus one rounding error, which is uniform on
half a unit either side. Least squares wastes that: the estimate with loss :math:`|e|^p` has
:math:`3 / (2p - 1)` of its variance for uniform errors, so known elements enter with p = 4.
Elements that are not known keep least squares with the base eliminated.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdetune.noise import Weights, as_merged, fit_variance
from jdetune.solvers.intersection import Scales
from jdetune.solvers.likelihood import residuals, weighted_base
from jdetune.solvers.tangent import conjugate_gradients, dot, linearize, move, to_tangent

#: Share of the gradient (squared) at which conjugate gradients stop: one Newton step of several.
GOAL = 1e-4
MAX_STEPS = 100
#: Share of least squares in the curvature, which keeps it positive where residuals vanish.
SHARE = 0.1
#: Residuals beyond this many half units are no rounding error and count no further.
CLIP = 1.5


def refit(
    weights: Weights,
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
    ranks: Int[Array, " model"],
    scales: Scales,
    base: Float[Array, "row col"],
    known: Bool[Array, "row col"],
    variance: Float[Array, "model row col"],
) -> tuple[Array, Array, Array]:
    """One Newton step of the updates, with the base fixed where it is known.

    Args:
      weights: merged weights of one layer as stored.
      left: B of each update, zero past each rank.
      right: A of each update.
      ranks: rank of each update.
      scales: rounding error as row and column factors.
      base: the base where it is known; anything elsewhere.
      known: where it is known.
      variance: of the merged weights' errors (``noise.merge_variance``).

    Returns:
      B and A of the moved updates, and conjugate gradient steps.
    """
    models = as_merged(weights)
    dtype, work = left.dtype, jnp.float32
    active = jnp.arange(left.shape[2], dtype=jnp.int32) < ranks[:, None]
    variance = fit_variance(variance)
    eliminated = weighted_base(models, left, right, variance)
    error = residuals(models, jnp.where(known, base.astype(dtype), eliminated), left, right)
    share = jnp.minimum(jnp.square(error) / (3 * variance), CLIP**2)
    slope = jnp.where(known, share, 1) / variance
    curvature = jnp.where(known, 3 * (1 - SHARE) * share + SHARE, 1) / variance
    at = linearize(left, right, active, scales, curvature, known)
    force = slope * error * scales.row[:, None] * scales.col / at.unit
    size = jnp.sqrt(jnp.mean(jnp.square(force))) + float(jnp.finfo(work).tiny)
    gradient = to_tangent(at.tangent, (force / size).astype(work))
    goal = GOAL * dot(gradient, gradient)
    z, count, _ = conjugate_gradients(at.tangent, gradient, goal, MAX_STEPS)
    b, a = move(at, z, size, scales)
    return b, a, count
