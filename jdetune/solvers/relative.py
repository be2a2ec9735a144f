r"""A layer in units of its rounding error: all that is fitted after the closed form is float32.

Base and updates of the closed form are right up to a few rounding errors. What they leave over,
and all corrections to them, are small multiples of the rounding error, for which float32 is enough:
only the residual itself, a difference of large numbers, is computed in the dtype of the factors.

An update is :math:`U X V^T` in whitened coordinates. Moved by a tangent vector it becomes
:math:`(U X + P)(V + Q X^{-T})^T`, which has the same rank and holds the second-order term too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jdetune import linalg
from jdetune.blocks import Each, by_rows
from jdetune.noise import Merged, fit_variance, spacing
from jdetune.solvers.pairs import Scales
from jdetune.solvers.tangent import Step, Tangent, information, pair
from jdetune.types import Array as AnyArray


class Relative(NamedTuple):
    """Base and updates of a layer, and what they leave over in units of the rounding error.

    Attributes:
      units: the unit as row and column factors, in the dtype of the factors.
      left: U, orthonormal, zero past each rank; float32.
      right: V, likewise.
      start: U X and V, in the dtype of the factors: U X V^T are the updates.
      turn: the inverse of X, transposed; float32.
      active: which columns are used.
      base: most likely base for these updates, in the dtype of the factors.
      error: what base and updates leave over.
      variance: of the merged weights' errors.
      weight: inverse variances that a fit weighs by.
    """

    units: Scales
    left: Float[Array, "model row rank"]
    right: Float[Array, "model col rank"]
    start: tuple[Float[Array, "model row rank"], Float[Array, "model col rank"]]
    turn: Float[Array, "model rank rank"]
    active: Bool[Array, "model rank"]
    base: Float[Array, "row col"]
    error: Float[Array, "model row col"]
    variance: Float[Array, "model row col"]
    weight: Float[Array, "model row col"]


def units_of(models: Merged, scales: Scales) -> Scales:
    """The rms spacing of the stored weights as row and column factors."""
    dtype, first = scales.row.dtype, Merged(*(part[:1] for part in models))
    white = spacing(first)[0] / (scales.row[:, None] * scales.col).astype(jnp.float32)
    others = jnp.mean(jnp.square(jnp.asarray(models.eps / models.eps[0])).astype(dtype))
    size = jnp.sqrt(jnp.mean(jnp.square(white.astype(dtype))) * others)
    return Scales(scales.row * jnp.maximum(size, float(jnp.finfo(jnp.float32).tiny)), scales.col)


def view(
    models: Merged,
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
    active: Bool[Array, "model rank"],
    units: Scales,
    variance: Float[Array, "model row col"],
    weight: Float[Array, "model row col"] | None = None,
) -> Relative:
    """A layer relative to given updates and the most likely base for them.

    Args:
      models: merged weights of one layer.
      left: B of each update, zero past each rank.
      right: A of each update.
      active: which columns are used.
      units: from ``units_of``.
      variance: from ``noise.merge_variance`` in these units.
      weight: that the fit weighs by, if known already.
    """
    u, v, through, core = _spaces(left / units.row[:, None], right / units.col, active)
    error, base = _errors(models.values, left, right, units, variance)
    return Relative(
        units=units,
        left=u.astype(jnp.float32),
        right=v.astype(jnp.float32),
        start=(through, v),
        turn=jnp.swapaxes(_inverse(core, active), 1, 2).astype(jnp.float32),
        active=active,
        base=base,
        error=error,
        variance=variance,
        weight=1 / fit_variance(variance) if weight is None else weight,
    )


def _spaces(left: Array, right: Array, active: Array) -> tuple[Array, ...]:
    """U, V, U X and X of whitened updates ``left @ right = U X V^T``, U and V orthonormal."""

    def one(operands: tuple[Array, ...]) -> tuple[Array, ...]:
        left, right, active = operands
        u = linalg.orthonormalize_leading(left, active)
        v = linalg.orthonormalize_leading(right.T, active)
        through = linalg.matmul(left, linalg.matmul(right, v))
        return u, v, through, linalg.matmul(u.T, through)

    return linalg.each_model(one, (left, right, active))


def _inverse(core: Array, active: Array) -> Array:
    """Inverses of cores; the identity past each rank."""
    spare = jnp.where(active, 0, 1).astype(core.dtype)
    eye = jnp.eye(core.shape[1], dtype=core.dtype)
    return linalg.inverse(core + eye * spare[:, None])


def _errors(
    values: AnyArray, left: Array, right: Array, units: Scales, variance: Array
) -> tuple[Array, Array]:
    """What is left over with the most likely base, and that base.

    Summed relative to the first model, so that nothing is lost to the size of the weights.
    """
    dtype, across = left.dtype, 1 / units.col

    def some(rows: tuple) -> tuple[tuple[()], tuple[Array, Array]]:
        values, left, variance, unit = rows
        reference = values[0].astype(dtype)
        first, inverse = linalg.matmul(left[0], right[0]), 1 / unit

        def one(operands: tuple[Array, ...]) -> Array:
            stored, b, a = operands
            away = (stored.astype(dtype) - reference) - linalg.matmul(b, a) + first
            return (away * inverse * across).astype(jnp.float32)

        error = linalg.each_model(one, (values, left, right))
        mean = linalg.inverse_variance_mean(variance, error)
        shift = mean.astype(dtype) * unit * units.col
        return (), (error - mean, reference + (shift - first))

    return by_rows(some, (jnp.asarray(values), left, Each(variance), units.row[:, None]))[1]


def pair_after(at: Relative, step: Step) -> tuple[Array, Array]:
    """What a move of the updates adds to them, as products: [model, row, 2 rank] and [.., col]."""
    moved_right = at.right + linalg.contract("mca,mab->mcb", step.q, at.turn)
    return pair(at.left, moved_right, step)


def errors_after(
    errors: linalg.PerModel,
    tall: Float[Array, "model row wide"],
    wide: Float[Array, "model wide col"],
) -> linalg.PerModel:
    """What is left over of some rows once the updates are moved, with the base as it was.

    Args:
      errors: of each model, before.
      tall: of ``pair_after``, these rows.
      wide: of ``pair_after``.
    """

    def one(error: Array, tall: Array, wide: Array) -> Array:
        return error - linalg.matmul(tall, wide)

    return linalg.map_each(one, errors, tall, wide)


def moved(at: Relative, step: Step) -> tuple[Array, Array]:
    """Updates moved by a tangent vector, as B and A in their own dtype."""
    left, right = at.start
    keep = at.active[:, None, :]
    b = left + step.p.astype(left.dtype)
    a = right + linalg.contract("mca,mab->mcb", step.q, at.turn).astype(right.dtype)
    b = jnp.where(keep, b * at.units.row[:, None], 0)
    return b, jnp.swapaxes(jnp.where(keep, a * at.units.col[:, None], 0), 1, 2)


def tangent_of(at: Relative, known: Bool[Array, "row col"] | None = None) -> Tangent:
    """Tangent spaces with the fit's weights; where the base is known, it is not fitted."""
    row = at.weight.shape[1]
    known = jnp.zeros(at.weight.shape[1:], bool) if known is None else known

    def some(rows: tuple) -> tuple[Array, tuple[Array, Array]]:
        weight, each, known = rows
        total = jnp.where(known, jnp.inf, linalg.sum_models(each))
        cols, rows_ = information(weight, total)
        return cols, (total, rows_)

    cols, (total, rows) = by_rows(some, (at.weight, Each(at.weight), known))
    return Tangent(at.left, at.right, at.active, at.weight, total, rows, cols / row)


def zero_step(at: Relative) -> Step:
    """The tangent vector that moves nothing."""
    return jax.tree.map(jnp.zeros_like, Step(at.left, at.right))
