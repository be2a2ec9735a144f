r"""The most likely grid point of every element of a base, and how sure it is.

The likelihood of a grid point w is :math:`\prod_i P(w + M_i \in \mathrm{round}^{-1}(W'_i))` with M
known up to its variance. All is in units of the layer's rounding error and float32; elements do
not depend on each other, so rows are worked on in blocks.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jdetune import linalg
from jdetune.blocks import Each, by_rows
from jdetune.grids import Grid, at_binade, nearest, step_up, unit_of
from jdetune.noise import Merged, Weights, as_merged, ulp
from jdetune.solvers.pairs import Scales

#: Rows of a block, at least: all that is made of them stays in the cache.
SNAP_ROWS = 16
#: Grid points tried either side of the estimate.
REACH = 2
#: Where the estimate's deviation is above this many grid units, points are not told apart.
WIDE = 0.8
#: An element that is less sure than its grid is fine is zero if zero is, in log, at most this less
#: likely than the best: an exact zero is the one tiny weight that models do have.
LIKELY = 12.0
#: Models whose factors between 1 and 4 are multiplied before one logarithm is taken.
PRODUCT = 32
#: Logistic distributions of unit variance: their tails are those of a float32 sum's error.
LOGISTIC = 1.8138
#: Spacing of an element is at least this share of the layer's unit.
LEAST_SPACING = 1e-9


class Snapped(NamedTuple):
    """The base on its grid.

    Attributes:
      base: most likely grid point.
      wrong: probability that it is another.
      error: expected squared error, the mean over all elements.
      offset: expected base less the most likely one, in units of the rounding error.
    """

    base: Float[Array, "row col"]
    wrong: Float[Array, "row col"]
    error: Float[Array, ""]
    offset: Float[Array, "row col"]


class Unexplained(NamedTuple):
    """Error of each model that nothing explains.

    Attributes:
      variance: the same for all elements, in squared units of the layer's rounding error.
      slack: a deviation in units of each element's spacing.
    """

    variance: Float[Array, " model"]
    slack: Float[Array, " model"]


class _Block(NamedTuple):
    """Some rows: the choice, its figures, and what the whole matrix has to say about zeros."""

    chosen: Float[Array, "row col"]
    wrong: Float[Array, "row col"]
    error: Float[Array, "row col"]
    offset: Float[Array, "row col"]
    deviation: Float[Array, "row col"]
    may_be_zero: Bool[Array, "row col"]


def relative_spacing(models: Merged, units: Scales) -> Float[Array, "model row col"]:
    """Spacing of every stored weight in units of the layer's rounding error."""

    def one(values: Array, eps: Array, smallest: Array) -> Array:
        return relative_ulp(values, eps, smallest, units)

    return jax.vmap(one)(*map(jnp.asarray, models))


def relative_ulp(
    values: Float[Array, "row col"], eps: Array, smallest: Array, units: Scales
) -> Float[Array, "row col"]:
    """The same of one model."""
    row, col = ((1 / side).astype(jnp.float32) for side in units)
    return jnp.maximum(ulp(values, eps, smallest) * row[:, None] * col, LEAST_SPACING)


def snap(
    weights: Weights,
    units: Scales,
    error: Float[Array, "model row col"],
    centre: Float[Array, "row col"],
    softness: Float[Array, "model row col"],
    grid: Grid,
    unexplained: Unexplained | None = None,
) -> Snapped:
    """Most likely grid point of every element and how sure it is.

    Where the estimate is less sure than the grid is fine, points one deviation apart stand for the
    grid.

    Args:
      weights: merged weights of one layer as stored.
      units: of the rounding error (``relative.units_of``); what follows is measured in them.
      error: what the centre and the updates leave over, less what it pulled the updates itself.
      centre: estimate of the base, on its grid; in units of the weights.
      softness: variance of all error but the last rounding: that of the updates' elements and of
        the merge's arithmetic.
      grid: of the base.
      unexplained: comes on top of ``softness``; nothing if None.

    Returns:
      The base in the dtype of ``centre`` with its probabilities.
    """
    models = jax.tree.map(jnp.asarray, as_merged(weights))
    n_models = models.values.shape[0]
    middle = centre.astype(jnp.float32)
    around = Scales(*(side.astype(jnp.float32) for side in units))
    if unexplained is None:
        unexplained = Unexplained(*jnp.zeros((2, n_models), jnp.float32))

    def sure(units: Scales) -> Callable[..., Array]:
        """Inverse variance of one model's errors."""

        def one(values: Array, softness: Array, *rest: Array) -> Array:
            eps, smallest, flat, slack = rest
            size = relative_ulp(values, eps, smallest, units)
            return 1 / (softness + flat + (jnp.square(slack) + 1 / 12) * jnp.square(size))

        return one

    def some(rows: tuple) -> tuple[tuple[()], _Block]:
        values, unit, error, middle, softness, *each = rows
        here, scales = models._replace(values=values), Scales(unit[:, 0], around.col)
        sureness = linalg.sum_each(sure(scales), *each, *models[1:], *unexplained)
        deviation = jax.lax.rsqrt(sureness)
        return (), _snap_block(here, scales, error, middle, softness, deviation, grid, unexplained)

    each = Each(models.values), Each(softness)
    rows = (models.values, around.row[:, None], error, middle, softness, *each)
    _, found = by_rows(some, rows, SNAP_ROWS)
    zero = found.may_be_zero
    chance = _chance(middle / around.row[:, None] / around.col, found.deviation, zero)
    wrong = jnp.where(zero, chance, found.wrong)
    squared = jnp.where(zero, wrong * found.error, found.error)
    nothing = jnp.all(models.values == 0, axis=0)  # a zero row: updates leave it alone
    base = jnp.where(zero, 0, centre + found.chosen.astype(centre.dtype))
    return Snapped(
        base=jnp.where(nothing, 0, base),
        wrong=jnp.where(nothing, 0, wrong),
        error=_mean_square(jnp.where(nothing, 0, squared), units),
        offset=jnp.where(nothing | zero, 0, found.offset),
    )


def mean_error(weights: Weights, units: Scales, snapped: Snapped, grid: Grid) -> Float[Array, ""]:
    """Expected squared error of the mean of the models on the base's grid, for comparison.

    Args:
      weights: merged weights of one layer as stored.
      units: of the rounding error.
      snapped: the base.
      grid: of the base.
    """
    values = jnp.asarray(as_merged(weights).values)
    first = values[0].astype(jnp.float32)
    away = linalg.sum_each(lambda stored: stored.astype(jnp.float32) - first, values)
    mean = nearest(first + away / values.shape[0], grid)
    row, col = (side.astype(mean.dtype) for side in units)
    distance = (mean - snapped.base.astype(mean.dtype)) / row[:, None] / col
    return snapped.error + _mean_square(distance * (distance - 2 * snapped.offset), units)


def _mean_square(relative: Float[Array, "row col"], units: Scales) -> Float[Array, ""]:
    """Mean of squares that are given in squared units."""
    square = jnp.square(units.col).astype(relative.dtype)[:, None]
    rows = linalg.matmul(relative, square)[:, 0] / square.shape[0]
    return jnp.mean(rows.astype(units.row.dtype) * jnp.square(units.row))


def _snap_block(
    models: Merged,
    units: Scales,
    error: Array,
    centre: Array,
    softness: Array,
    deviation: Array,
    grid: Grid,
    unexplained: Unexplained,
) -> _Block:
    """``snap`` of some rows, the steps to the chosen points in units of the weights."""
    inverse = 1 / units.row[:, None] / units.col
    units_here = relative_spacing(models, units)
    flat, slack = (part[:, None, None] for part in unexplained)
    softness = softness + flat + jnp.square(slack * units_here)
    unit = unit_of(centre, grid) * inverse
    stride = jnp.where(deviation > WIDE * unit, deviation, 0)
    scale = jnp.maximum(jnp.sqrt(softness), 1e-3 * units_here)
    down, up = _halves(models, units_here)
    bounds = ((error - down) / scale, (error + up) / scale, 1 / scale)

    def point(step: int) -> Array:
        far = nearest(centre + step * stride / inverse, grid)
        return jnp.where(stride > 0, far, step_up(centre, grid, step))

    lengths = [point(step) - centre for step in range(-REACH, REACH + 1)]
    steps = [length * inverse for length in lengths]
    *logs, of_zero = _likelihoods([*steps, -centre * inverse], bounds)
    top = functools.reduce(jnp.maximum, logs)
    chances = [jnp.exp(log - top) for log in logs]
    whole = functools.reduce(jnp.add, chances)
    choice, best = jnp.zeros_like(centre, jnp.int32), chances[0]
    for number, chance in enumerate(chances[1:], 1):
        choice = jnp.where(chance > best, number, choice)
        best = jnp.maximum(chance, best)
    chosen = functools.reduce(
        lambda so_far, pair: jnp.where(choice == pair[0], pair[1], so_far),
        enumerate(lengths),
        lengths[0],
    )
    # the others are added up by themselves: the best one's share is too near one to be taken off
    others = [jnp.where(choice == k, 0, part) for k, part in enumerate(chances)]
    wrong = functools.reduce(jnp.add, others) / whole
    # on a coarse stride, the grid points that one stride stands for share its probability
    wrong = jnp.where(stride > unit, 1 - (1 - wrong) * unit / jnp.maximum(stride, unit), wrong)
    at, pairs = chosen * inverse, zip(steps, chances, strict=True)
    away = [(chance, step - at) for step, chance in pairs]

    def expected(values: Iterable[Array]) -> Array:
        return functools.reduce(jnp.add, values) / whole

    return _Block(
        chosen=chosen,
        wrong=wrong,
        error=expected(chance * jnp.square(step) for chance, step in away),
        offset=expected(chance * step for chance, step in away),
        deviation=deviation,
        may_be_zero=(stride > 0) & (of_zero > top - LIKELY),
    )


def _likelihoods(
    steps: Sequence[Array], bounds: tuple[Array, Array, Array]
) -> list[Float[Array, "row col"]]:
    """Log likelihood of the centre plus each step, up to what all steps have in common.

    Args:
      steps: of one shape each, relative to the centre.
      bounds: ends of each model's interval around the centre and the steps' scale, in deviations.
    """

    def add(carry: list, model: tuple[Array, ...]) -> tuple[list, None]:
        below, above, sharpness = model
        middle, half = LOGISTIC / 2 * (below + above), LOGISTIC / 2 * (above - below)
        sharpness = LOGISTIC * sharpness
        faint = jnp.exp(-2 * half)
        after = []
        for (log, outside), step in zip(carry, steps, strict=True):
            tail, factor = _inside(middle - step * sharpness, half, faint)
            after.append((log + tail, outside * factor))
        return after, None

    logs = [jnp.zeros_like(step) for step in steps]
    for start in range(0, bounds[0].shape[0], PRODUCT):
        some = jax.tree.map(lambda part, start=start: part[start : start + PRODUCT], bounds)
        found, _ = jax.lax.scan(add, [(log, jnp.ones_like(log)) for log in logs], some)
        logs = [log - jnp.log(outside) for log, outside in found]
    return logs


def _inside(middle: Array, half: Array, faint: Array) -> tuple[Array, Array]:
    r"""Probability that a logistic error lies within ``half`` of ``middle``, in two parts.

    With c the distance of the middle from zero and h the half, its logarithm is
    :math:`\log(1 - e^{-2h}) - \max(c - h, 0) - \log((1 + e^{-|c - h|})(1 + e^{-(c + h)}))`. The
    first term, of the width alone, is the same for all grid points and is left out. Returned are
    the second term and the product, between 1 and 4, whose logarithm the third is: nothing
    overflows. ``faint`` is :math:`e^{-2h}`, which spares the second exponential.
    """
    beyond = jnp.abs(middle) - half
    near = jnp.exp(-jnp.minimum(jnp.abs(beyond), 80))
    far = jnp.where(beyond > 0, near * faint, faint / near)
    return -jnp.maximum(beyond, 0), (1 + near) * (1 + far)


def _chance(centre: Array, deviation: Array, may_be_zero: Array) -> Float[Array, ""]:
    """Probability that an element that may be zero is not: weights near zero are rare otherwise.

    How many a smooth density would put there follows from the ring around, nine times as wide.
    """
    distance = jnp.abs(centre) / deviation
    ring = jnp.sum((distance >= 3) & (distance < 30), dtype=centre.dtype)
    inside = jnp.sum(may_be_zero, dtype=centre.dtype)
    return jnp.clip((ring + 1) / 9 / jnp.maximum(inside, 1), 0, 1)


def _halves(models: Merged, units: Array) -> tuple[Array, Array]:
    """Distances from each stored value down and up to where rounding changes."""
    smallest = jnp.asarray(models.smallest)[:, None, None]
    at_edge = at_binade(jnp.asarray(models.values), smallest)
    inward = jnp.where(at_edge, 0.25, 0.5) * units
    positive = models.values > 0
    return jnp.where(positive, inward, units / 2), jnp.where(positive, units / 2, inward)
