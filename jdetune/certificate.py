r"""How wrong the recovered base is, without ground truth.

Rounding errors of the known size are drawn and sent through the linearised fit: one solve of the
Gauss-Newton system gives the errors of the updates that such rounding makes. Their size, relative
to what each element's leverage says, is the ``spread`` that ``jdetune.exact`` takes into account;
the error of the base relative to what it would be if the updates were known is the amplification.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jdetune import linalg
from jdetune.blocks import Each, by_rows
from jdetune.solvers.relative import Relative, tangent_of
from jdetune.solvers.tangent import (
    Tangent,
    conjugate_gradients,
    pair,
    sharper,
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
#: Amplification, and share of the base that is known, up to which the factors of a replicate with
#: nothing known still hold. Where more is known they are too small, by a quarter at 0.95.
ONE_REPLICATE = 1.1
MOST_KNOWN = 0.9


class Spread(NamedTuple):
    """Errors of the updates and of the base that rounding alone makes; float32.

    The variance of an update's element is ``tall @ wide``, the leverage's, times a factor: a row's
    times a column's, or the least. In squared units of the layer's rounding error.

    Attributes:
      tall: rows of the leverage variance.
      wide: columns of it.
      rows: factor of each row.
      cols: factor of each column.
      least: factor at least.
      amplification: rms error of the base over that with the updates known.
    """

    tall: Float[Array, "model row 3"]
    wide: Float[Array, "model 3 col"]
    rows: Float[Array, "row 1"]
    cols: Float[Array, "1 col"]
    least: Float[Array, ""]
    amplification: Float[Array, ""]

    def at_rows(self, tall: Array, rows: Array) -> "Spread":
        """The same of some rows, given ``tall`` and ``rows`` of them."""
        return self._replace(tall=tall, rows=rows)

    def variance(self) -> Float[Array, "model row col"]:
        """Variance of each update's elements."""
        factor = jnp.maximum(self.rows * self.cols, self.least)
        return _low_rank(self.tall, self.wide) * factor

    def leverage(self, weight: Float[Array, "model row col"]) -> Float[Array, "model row col"]:
        """Share of each element's own error that its update takes up, in a fit weighted so."""
        return jnp.minimum(_low_rank(self.tall, self.wide) * weight, 0.5)


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
    tangent = tangent_of(at, known)
    words = _random_words(*tangent.weight.shape)
    models = range(tangent.weight.shape[0])
    drawn = (words, Each(tangent.weight), tangent.total)

    def weighted(rows: tuple) -> linalg.PerModel:
        words, weights, total = rows

        def pull(model: Array | int, weight: Array, base: Array | float = 0.0) -> Array:
            return weight * (_error(words, model, weight) - base)

        mean = linalg.sum_each(pull, models, weights) / total
        return linalg.map_each(lambda i, weight: pull(i, weight, mean), models, weights)

    gradient = to_tangent(tangent, drawn, weighted)
    share = (GOAL * sharper(conditioning)).astype(jnp.float32)
    step, _ = conjugate_gradients(tangent, gradient, MAX_STEPS, share=share)
    moved_rows, moved_cols = pair(tangent.left, tangent.right, step)
    tall, wide = _leverage_variance(tangent)

    def power(rows: tuple) -> tuple[Any, Any]:
        (words, weights, total), known, moved_rows, tall = rows
        moved = linalg.map_each(linalg.matmul, moved_rows, moved_cols)

        def left_over(model: Array | int, weight: Array, moved: Array) -> Array:
            return weight * (_error(words, model, weight) - moved)

        whole = linalg.sum_models(weights)
        matters = jnp.where(known, 1e-6, 1.0) * whole
        single = matters * linalg.sum_each(jnp.square, moved)
        together = matters * jnp.square(linalg.sum_models(moved))
        moved_base = linalg.sum_each(left_over, models, weights, moved) / total
        base = jnp.where(known, 0, whole * jnp.square(moved_base))
        cols, each = ([expected] for expected in _sums_of_product(matters, tall, wide))
        for figure in (single, together):
            cols.append(jnp.sum(figure, axis=0, keepdims=True))
            each.append(jnp.sum(figure, axis=1, keepdims=True))
        return (cols, jnp.sum(base), jnp.sum(~known, dtype=jnp.float32)), each

    (cols, base, unknown), rows = by_rows(power, (drawn, known, moved_rows, tall))
    return Spread(tall, wide, *_factors(rows, cols), jnp.sqrt(base / jnp.maximum(unknown, 1)))


def spread_again(
    first: Spread, at: Relative, known: Bool[Array, "row col"], conditioning: Array | float = 1.0
) -> Spread:
    """``spread``, without a replicate where the factors of the one with nothing known still hold.

    Args:
      first: errors with nothing known.
      at: the layer relative to its base and updates.
      known: where the base is known exactly.
      conditioning: of the closed form.
    """
    share = jnp.mean(known, dtype=jnp.float32)
    holds = (first.amplification <= ONE_REPLICATE) & (share <= MOST_KNOWN)

    def by_leverage() -> Spread:
        tall, wide = _leverage_variance(tangent_of(at, known))
        return first._replace(tall=tall, wide=wide)

    once_more = ~holds & (share > 0)
    return jax.lax.cond(once_more, lambda: spread(at, known, conditioning), by_leverage)


def _random_words(n_models: int, row: int, col: int) -> Array:
    """Random bits, one a model: drawing is a large part of a replicate."""
    return jax.random.bits(jax.random.key(1), (-(-n_models // 32), row, col), jnp.uint32)


def _error(
    words: Array, model: Array | int, weight: Float[Array, "row col"]
) -> Float[Array, "row col"]:
    """An error of the size that the weight says, of random sign."""
    bit = words[model // 32] >> jnp.uint32(model % 32) & 1
    return (1 - 2 * bit.astype(jnp.float32)) * jax.lax.rsqrt(weight)


def _leverage_variance(tangent: Tangent) -> tuple[Array, Array]:
    """Variance of the updates' elements if rows and columns were fitted one by one."""
    rows, cols = _positive(tangent.rows), _positive(tangent.cols)
    u = jnp.sum(jnp.square(tangent.left), axis=2)[:, :, None]
    v = jnp.sum(jnp.square(tangent.right), axis=2)[:, None, :]
    whole = _positive(jnp.mean(rows, axis=1, keepdims=True))
    tall = jnp.concatenate([u, 1 / rows, -u / whole], axis=2)
    return tall, jnp.concatenate([1 / cols, v, v], axis=1)


def _low_rank(tall: Array, wide: Array) -> Float[Array, "model row col"]:
    """A product with so few terms that it is no more than three passes over a matrix."""
    terms = [tall[:, :, k, None] * wide[:, None, k, :] for k in range(tall.shape[2])]
    return functools.reduce(jnp.add, terms)


def _sums_of_product(
    matters: Float[Array, "row col"], tall: Array, wide: Array
) -> tuple[Float[Array, "1 col"], Float[Array, "row 1"]]:
    """Column and row sums of ``matters`` times a product, all models together, without it."""
    narrow = jnp.moveaxis(tall, 0, 1).reshape(tall.shape[1], -1)
    flat = wide.reshape(-1, wide.shape[2])
    cols = jnp.sum(flat * linalg.matmul(narrow.T, matters), axis=0, keepdims=True)
    return cols, jnp.sum(narrow * linalg.matmul(matters, flat.T), axis=1, keepdims=True)


def _factors(rows: Sequence[Array], cols: Sequence[Array]) -> tuple[Array, Array, Array]:
    """Power of a replicate over that of the leverages: a row's and a column's factor, the least.

    Of single updates, or of their mean where errors common to all models make that the larger.

    Args:
      rows: sums of each row: expected, of single updates, of their mean.
      cols: the same of each column.
    """
    larger = jnp.sum(cols[2]) > jnp.sum(cols[1])
    rows_power, cols_power = (jnp.where(larger, part[2], part[1]) for part in (rows, cols))
    whole = jnp.sum(cols_power) / _positive(jnp.sum(cols[0]))
    rows_factor = rows_power / _positive(rows[0])
    cols_factor = cols_power / _positive(cols[0]) / _positive(whole)
    return rows_factor, cols_factor, LEAST_FACTOR * whole


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
