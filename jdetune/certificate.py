r"""How wrong the recovered base is, without ground truth.

Rounding errors of the known size are drawn and sent through the linearised fit: one solve of the
Gauss-Newton system gives the errors of the updates that such rounding makes. Their size, relative
to what each element's leverage says, is the ``spread`` that ``jdetune.exact`` takes into account;
the error of the base relative to what it would be if the updates were known is the amplification.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jdetune import linalg
from jdetune.solvers.relative import Relative, tangent_of
from jdetune.solvers.tangent import (
    Tangent,
    conjugate_gradients,
    free_information,
    sharper,
    to_matrices,
    to_tangent,
)
from jdetune.status import Status

#: Share of the preconditioned gradient (squared) at which the solve of a replicate stops.
GOAL = 1e-2
MAX_STEPS = 1000
#: Rows and columns never count as surer than this share of the whole layer: one replicate is noisy.
LEAST_FACTOR = 0.7
#: Amplification up to which a layer counts as at the floor of the rounding.
AT_THE_FLOOR = 2.0


class Spread(NamedTuple):
    """Errors of the updates and of the base that rounding alone makes; float32.

    Attributes:
      variance: variance of each update's elements, by leverage times ``factor``, in squared units
        of the layer's rounding error.
      leverage: share of each element's own error that its update takes up.
      amplification: rms error of the base over that with the updates known.
    """

    variance: Float[Array, "model row col"]
    leverage: Float[Array, "model row col"]
    amplification: Float[Array, ""]


def spread(
    at: Relative, known: Bool[Array, "row col"], conditioning: Array | float = 1.0
) -> Spread:
    r"""Errors of the updates, from one replicate of the rounding errors.

    An element of an update has the variance :math:`|U_x|^2 / g_y + |V_y|^2 / g_x - \dots` if rows
    and columns were independent, where g is the information that rows and columns hold once the
    base is eliminated. The replicate says by which factor this is too small.

    Args:
      at: the layer relative to its base and updates.
      known: where the base is known exactly.
      conditioning: of the closed form.

    Returns:
      Variances, leverages and amplification.
    """
    tangent = tangent_of(at, at.weight, known)
    errors = _signs(*tangent.weight.shape) * jax.lax.rsqrt(tangent.weight)
    mean = linalg.sum_models(tangent.weight * errors) / tangent.total
    gradient = to_tangent(tangent, tangent.weight * (errors - mean))
    share = (GOAL * sharper(conditioning)).astype(jnp.float32)
    step, _ = conjugate_gradients(tangent, gradient, MAX_STEPS, share=share)
    moved = to_matrices(tangent, step)
    alone = _leverage_variance(tangent)
    whole = linalg.sum_models(tangent.weight)
    factor = _power(moved, alone, jnp.where(known, 1e-6, 1.0) * whole)
    moved_base = linalg.sum_models(tangent.weight * (errors - moved)) / tangent.total
    share = jnp.sum(jnp.where(known, 0, whole * jnp.square(moved_base)))
    share = share / jnp.maximum(jnp.sum(~known, dtype=jnp.float32), 1)
    return Spread(
        variance=alone * factor,
        leverage=jnp.minimum(alone * tangent.weight, 0.5),
        amplification=jnp.sqrt(share),
    )


def _signs(n_models: int, row: int, col: int) -> Float[Array, "model row col"]:
    """Random signs, 32 models from one random word: drawing is a large part of a replicate."""
    words = jax.random.bits(jax.random.key(1), (-(-n_models // 32), row, col), jnp.uint32)
    models = [words[k // 32] >> (k % 32) & 1 for k in range(n_models)]
    return 1 - 2 * jnp.stack(models).astype(jnp.float32)


def _leverage_variance(tangent: Tangent) -> Float[Array, "model row col"]:
    """Variance of the updates' elements if rows and columns were fitted one by one."""
    free = free_information(tangent)
    rows, cols = _positive(jnp.mean(free, axis=2)), _positive(jnp.mean(free, axis=1))
    u = jnp.sum(jnp.square(tangent.left), axis=2)
    v = jnp.sum(jnp.square(tangent.right), axis=2)
    whole = _positive(jnp.mean(rows, axis=1))[:, None, None]
    both = u[:, :, None] * v[:, None, :]
    return u[:, :, None] / cols[:, None, :] + v[:, None, :] / rows[:, :, None] - both / whole


def _power(moved: Array, alone: Array, matters: Array) -> Float[Array, "row col"]:
    """Power of a replicate over that of the leverages, as row and column factors.

    Of single updates, or of their mean where errors common to all models make that the larger.
    """
    expected = matters * linalg.sum_models(alone)
    single = matters * linalg.sum_models(jnp.square(moved))
    together = matters * jnp.square(linalg.sum_models(moved))
    power = jnp.where(jnp.sum(together) > jnp.sum(single), together, single)
    rows = jnp.sum(power, axis=1) / _positive(jnp.sum(expected, axis=1))
    cols = jnp.sum(power, axis=0) / _positive(jnp.sum(expected, axis=0))
    whole = jnp.sum(power) / _positive(jnp.sum(expected))
    return jnp.maximum(rows[:, None] * cols / _positive(whole), LEAST_FACTOR * whole)


def _positive(value: Array) -> Array:
    return jnp.maximum(value, jnp.finfo(value.dtype).tiny)


def verdict(status: Status, exact_fraction: float, amplification: float) -> str:
    """What the figures mean, in words.

    Args:
      status: of the layer.
      exact_fraction: estimated share of exact elements.
      amplification: of the rounding noise.

    Example:
      >>> verdict(Status.OK, 0.97, 1.3), verdict(Status.OK, 0.6, 12.4)
      ('at the floor', 'amplified by 12')
    """
    if status is Status.SHARED_DIRECTIONS:
        return "not identifiable"
    if not status.has_base:
        return "failed"
    if exact_fraction >= 1 - 1e-9:
        return "exact"
    if not amplification > AT_THE_FLOOR:
        return "at the floor"
    return f"amplified by {amplification:.2g}"
