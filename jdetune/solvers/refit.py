r"""Updates fitted again once most of the base is known exactly.

Where the base is known, :math:`W'_i - W` is the update plus one rounding error, which is uniform on
half a unit either side. Least squares wastes that: the estimate with loss :math:`|e|^p` has
:math:`3 / (2p - 1)` of its variance for uniform errors, so known elements enter with p = 4.
Elements that are not known keep least squares with the base eliminated.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdetune import linalg
from jdetune.blocks import Each, by_rows
from jdetune.noise import Weights, as_merged, merge_variance
from jdetune.solvers.pairs import Scales
from jdetune.solvers.relative import (
    Relative,
    errors_after,
    moved,
    pair_after,
    units_of,
    view,
    zero_step,
)
from jdetune.solvers.tangent import (
    Step,
    Tangent,
    as_step,
    axpy,
    conjugate_gradients,
    information,
    onto,
    project,
)

#: Share of the preconditioned gradient, squared, to stop at: this is one Newton step of several.
GOAL = 5e-2
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
    rounds: int = 1,
) -> tuple[Array, Array]:
    """Newton steps of the updates, with the base fixed where it is known.

    Args:
      weights: merged weights of one layer as stored.
      left: B of each update, zero past each rank.
      right: A of each update.
      ranks: rank of each update.
      scales: rounding error as row and column factors.
      base: the base where it is known; anything elsewhere.
      known: where it is known.
      rounds: number of steps.

    Returns:
      B and A of the moved updates.
    """
    models = as_merged(weights)
    active = jnp.arange(left.shape[2], dtype=jnp.int32) < ranks[:, None]
    units = units_of(models, scales)
    variance = merge_variance(models, left, right, "R1", units)
    at = view(models, left, right, active, units, variance)
    away = shift_to(at, base)
    step = zero_step(at)
    for _ in range(rounds):
        step, _ = newton_step(at, step, away, known)
    return moved(at, step)


def shift_to(at: Relative, base: Float[Array, "row col"]) -> Float[Array, "row col"]:
    """A base less the one that a layer is relative to, in units of the rounding error."""
    away = base.astype(at.base.dtype) - at.base
    return (away / at.units.row[:, None] / at.units.col).astype(jnp.float32)


def newton_step(
    at: Relative,
    step: Step,
    away: Float[Array, "row col"],
    known: Bool[Array, "row col"],
) -> tuple[Step, Int[Array, ""]]:
    """One Newton step from updates that were moved already.

    Args:
      at: the layer relative to its base and updates.
      step: where the updates are.
      away: the base where it is known, from ``shift_to``.
      known: where it is known.

    Returns:
      Where the updates are then, and conjugate gradient steps.
    """
    tall, wide = pair_after(at, step)

    def some(rows: tuple) -> tuple[Any, Any]:
        errors, left, tall, weight, weights, away, known = rows
        errors = errors_after(errors, tall, wide)
        mean = linalg.weighted_mean(weights, errors)
        error = linalg.stack_models(errors) - jnp.where(known, away, mean)
        share = jnp.minimum(jnp.square(error) * weight / 3, CLIP**2)
        curvature = jnp.where(known, 3 * (1 - SHARE) * share + SHARE, 1) * weight
        total = jnp.where(known, jnp.inf, linalg.sum_models(curvature))
        slope = jnp.where(known, share, 1) * weight
        q, p = onto(left, at.right, slope * error)
        cols, each = information(curvature, total)
        return (q, cols), (p, curvature, total, each)

    rows = (Each(at.error), at.left, tall, at.weight, Each(at.weight), away, known)
    (q, cols), (p, curvature, total, each) = by_rows(some, rows)
    parts = (at.left, at.right, at.active, curvature, total, each, cols / away.shape[0])
    tangent = Tangent(*parts)
    gradient = project(tangent, as_step(q, p))
    z, count = conjugate_gradients(tangent, gradient, MAX_STEPS, share=GOAL)
    return axpy(step, jnp.float32(1), z), count
