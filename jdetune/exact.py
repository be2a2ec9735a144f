r"""Every element of the base decided on the base's own grid.

:math:`W + M_i` lies in the interval that rounds to :math:`W'_i`. The interval's ends are softened
by what the merge's arithmetic and the error of :math:`M_i` make of them; over all models each grid
point near the estimate then has a likelihood. One point left is *certain*, else the element is
*ambiguous* and takes the most likely point. Elements that are all but certain are fed back: with
them fixed the updates are fitted anew, and more elements become certain.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdetune import linalg
from jdetune.certificate import spread
from jdetune.grids import Grid, at_binade, nearest, step_up, unit_of
from jdetune.noise import Merged, Weights, as_merged, merge_variance, spacing
from jdetune.solvers.intersection import Scales
from jdetune.solvers.likelihood import residuals, weighted_base
from jdetune.solvers.refit import refit

#: Grid points tried either side of the estimate.
REACH = 2
#: An element is fixed for the next fit if all other grid points together are less likely than this
#: (where noise is not amplified).
FIXED = 1e-4
#: An element is certain if all other grid points together are less likely than this.
CERTAIN = 1e-4
#: Rounds of fixing and fitting: until the share of fixed elements grows by less than ``GROWTH``.
ROUNDS = 6
GROWTH = 0.01
#: Where the estimate's deviation is above this many grid units, points are not told apart.
WIDE = 0.8
#: An element that is less sure than its grid is fine is zero if zero is, in log, at most this less
#: likely than the best: an exact zero is the one tiny weight that models do have.
LIKELY = 12.0
#: Residual power beyond one rounding's from which several roundings are taken for certain.
SEVERAL_ROUNDINGS = 0.2
#: Elements whose rounding variance is below this share of the mean show what nothing explains.
FINE = 0.01
#: Models whose factors between 1 and 4 are multiplied before one logarithm is taken.
PRODUCT = 32
#: Logistic distributions of unit variance: their tails are those of a float32 sum's error.
LOGISTIC = 1.8138


class Snapped(NamedTuple):
    """The base on its grid.

    Attributes:
      base: most likely grid point.
      wrong: probability that it is another.
      error: expected squared error.
      mean_error: expected squared error of the mean of the models on that grid, for comparison.
    """

    base: Float[Array, "row col"]
    wrong: Float[Array, "row col"]
    error: Float[Array, "row col"]
    mean_error: Float[Array, ""]


def certain_below(amplification: Float[Array, ""]) -> Float[Array, ""]:
    """Probability of another grid point below which an element is certain.

    Smaller where noise is amplified: errors common to many elements are then known less well than
    one replicate says.
    """
    return CERTAIN / jnp.maximum(amplification, 1) ** 4


def fixed_below(amplification: Float[Array, ""]) -> Float[Array, ""]:
    """Probability of another grid point below which an element is fixed for the next fit.

    Smaller where noise is amplified, as ``certain_below``: a wrong element that is fixed pulls the
    updates with it. Not as small, for too few fixed elements leave the noise amplified.
    """
    return FIXED / jnp.maximum(amplification, 1) ** 2


def snap(
    weights: Weights,
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
    centre: Float[Array, "row col"],
    known: Bool[Array, "row col"],
    softness: Float[Array, "model row col"],
    leverage: Float[Array, "model row col"],
    grid: Grid,
) -> Snapped:
    r"""Most likely grid point of every element and how sure it is.

    The likelihood of a grid point w is :math:`\prod_i P(w + M_i \in \mathrm{round}^{-1}(W'_i))`
    with M known up to its variance. Where the estimate is less sure than the grid is fine, points
    one deviation apart stand for the grid.

    Args:
      weights: merged weights of one layer as stored.
      left: B of each update.
      right: A of each update.
      centre: estimate of the base, on its grid.
      known: elements that the updates were fitted with; their own pull on the fit is taken out.
      softness: variance of all error but the last rounding: that of the updates' elements and of
        the merge's arithmetic.
      leverage: share of each element's own error that the fit took up.
      grid: of the base.

    Returns:
      The base in the dtype of ``centre`` with its probabilities.
    """
    models = jax.tree.map(jnp.asarray, as_merged(weights))
    dtype = left.dtype
    units = _positive_spacing(models, dtype)
    error = residuals(models, centre, left, right)
    error = jnp.where(known, error / (1 - leverage.astype(dtype)), error)
    unit = unit_of(centre, grid)
    deviation = jax.lax.rsqrt(jnp.sum(1 / (softness + jnp.square(units) / 12), axis=0))
    stride = jnp.where(deviation > WIDE * unit, deviation, 0)
    scale = jnp.maximum(jnp.sqrt(softness), 1e-3 * units)
    down, up = _halves(models, units)
    bounds = ((error - down) / scale, (error + up) / scale, 1 / scale)

    def point(step: int) -> Array:
        far = nearest(centre + step * stride, grid)
        return jnp.where(stride > 0, far, step_up(centre, grid, step))

    steps = [point(step) - centre for step in range(-REACH, REACH + 1)]
    *logs, of_zero = _likelihoods([*steps, -centre], bounds)
    top = functools.reduce(jnp.maximum, logs)
    chances = [jnp.exp(log - top) for log in logs]
    whole = functools.reduce(jnp.add, chances)
    chosen, best = steps[0], chances[0]
    for step, chance in zip(steps[1:], chances[1:], strict=True):
        chosen, best = jnp.where(chance > best, step, chosen), jnp.maximum(chance, best)
    # the others are added up by themselves: the best one's share is too near one to be taken off
    others = [jnp.where(step == chosen, 0, part) for step, part in zip(steps, chances, strict=True)]
    wrong = (functools.reduce(jnp.add, others) / whole).astype(dtype)
    # on a coarse stride, the grid points that one stride stands for share its probability
    wrong = jnp.where(stride > unit, 1 - (1 - wrong) * unit / jnp.maximum(stride, unit), wrong)
    reference = models.values[0].astype(dtype)
    away = linalg.sum_models(models.values.astype(dtype) - reference)
    mean = nearest(reference + away / models.values.shape[0], grid) - centre

    def expected(at: Array) -> Array:
        """Mean squared distance of the points from one of them."""
        parts = [
            c.astype(dtype) * jnp.square(step - at) for step, c in zip(steps, chances, strict=True)
        ]
        return functools.reduce(jnp.add, parts) / whole.astype(dtype)

    mean_error = jnp.mean(expected(mean))
    may_be_zero = (stride > 0) & (of_zero > top - LIKELY)
    chosen = jnp.where(may_be_zero, -centre, chosen)
    wrong = jnp.where(may_be_zero, _chance(centre, deviation, may_be_zero), wrong)
    error = expected(chosen)
    error = jnp.where(may_be_zero, wrong * error, error)
    nothing = jnp.all(models.values == 0, axis=0)  # a zero row: updates leave it alone
    return Snapped(
        base=jnp.where(nothing, 0, centre + chosen),
        wrong=jnp.where(nothing, 0, wrong).astype(jnp.float32),
        error=jnp.where(nothing, 0, error),
        mean_error=mean_error,
    )


def _positive_spacing(models: Merged, dtype: jnp.dtype) -> Float[Array, "model row col"]:
    units = spacing(models).astype(dtype)
    return jnp.maximum(units, 1e-9 * jnp.mean(units) + 1e-37)


def _likelihoods(
    steps: Sequence[Array], bounds: tuple[Array, Array, Array]
) -> list[Float[Array, "row col"]]:
    """Log likelihood of the centre plus each step, up to what all steps have in common.

    Args:
      steps: of one shape each, relative to the centre.
      bounds: ends of each model's interval around the centre and the steps' scale, in deviations.
    """
    parts = tuple(part.astype(jnp.float32) for part in bounds)
    fine = [step.astype(jnp.float32) for step in steps]

    def add(carry: list, model: tuple[Array, ...]) -> tuple[list, None]:
        below, above, sharpness = model
        after = []
        for (log, outside), step in zip(carry, fine, strict=True):
            over = step * sharpness
            tail, factor = _inside(below - over, above - over)
            after.append((log + tail, outside * factor))
        return after, None

    logs = [jnp.zeros_like(step) for step in fine]
    for start in range(0, parts[0].shape[0], PRODUCT):
        some = jax.tree.map(lambda part, start=start: part[start : start + PRODUCT], parts)
        found, _ = jax.lax.scan(add, [(log, jnp.ones_like(log)) for log in logs], some)
        logs = [log - jnp.log(outside) for log, outside in found]
    return logs


def _inside(low: Array, high: Array) -> tuple[Array, Array]:
    r"""Probability that a logistic error of unit deviation lies between low and high, in two parts.

    With a < b scaled and mirrored to a + b <= 0, its logarithm is
    :math:`\log(1 - e^{a-b}) + \min(b, 0) - \log((1 + e^a)(1 + e^{-|b|}))`. The first term, of the
    width alone, is the same for all grid points and is left out. Returned are the second term and
    the product, between 1 and 4, whose logarithm the third is: nothing overflows.
    """
    a, b = low * LOGISTIC, high * LOGISTIC
    a, b = jnp.minimum(a, -b), jnp.minimum(b, -a)
    return jnp.minimum(b, 0), (1 + jnp.exp(a)) * (1 + jnp.exp(-jnp.abs(b)))


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
    at_edge = at_binade(jnp.asarray(models.values), jnp.asarray(models.smallest)[:, None, None])
    inward = jnp.where(at_edge, 0.25, 0.5) * units
    positive = models.values > 0
    return jnp.where(positive, inward, units / 2), jnp.where(positive, units / 2, inward)


def _outside(error: Array, units: Array, softness: Array, known: Array) -> Float[Array, " model"]:
    """Deviation of unexplained error in units of spacing: how far residuals leave their intervals.

    An error uniform on one unit plus a normal one of small deviation s leaves its interval by a
    mean square of 0.532 s^3.
    """
    outside = jnp.maximum(jnp.abs(error) / units - 0.5, 0)
    deviation = jnp.sqrt(softness) / units
    counts = known & (deviation < 0.3)
    seen = _mean_where(counts, jnp.minimum(jnp.square(outside), 1))
    excess = jnp.maximum(seen - 1.5 * 0.532 * _mean_where(counts, deviation**3) - 1e-5, 0)
    return jnp.cbrt(excess / 0.532)


def _unresolved(error: Array, variance: Array, softness: Array) -> Float[Array, " model"]:
    """Variance of updates too small to be found, seen where the grid is fine enough to show them.

    Judged by elements whose rounding error is far below the usual; half again what is expected of
    them is no sign of anything.
    """
    fine = variance < FINE * jnp.mean(variance, axis=(1, 2), keepdims=True)
    enough = jnp.sum(fine, axis=(1, 2)) > 100
    n_models = error.shape[0]
    seen = _mean_where(fine, jnp.square(error)) * n_models / (n_models - 1)
    expected = _mean_where(fine, variance + softness)
    return jnp.where(enough & (seen > 2 * expected), seen - expected, 0)


def _mean_where(where: Array, values: Array) -> Float[Array, " model"]:
    number = jnp.maximum(jnp.sum(where, (1, 2), dtype=values.dtype), 1)
    return jnp.sum(jnp.where(where, values, 0), (1, 2)) / number


class Resolved(NamedTuple):
    """Base and updates after all rounds.

    Attributes:
      snapped: the base on its grid.
      left: B of each update, fitted with the known elements of the base.
      right: A of each update.
      amplification: of the rounding noise, before anything was known.
      slack: deviation of each model's error that nothing explains, in units of spacing.
      rounds: of fixing and fitting.
      steps: of conjugate gradients.
      grown: share of elements that the last round fixed.
      residual_ratio: rms of what base and updates leave over, over that of the rounding error.
    """

    snapped: Snapped
    left: Float[Array, "model row rank"]
    right: Float[Array, "model rank col"]
    amplification: Float[Array, ""]
    slack: Float[Array, " model"]
    rounds: Int[Array, ""]
    steps: Int[Array, ""]
    grown: Float[Array, ""]
    residual_ratio: Float[Array, ""]


def resolve(
    weights: Weights,
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
    ranks: Int[Array, " model"],
    scales: Scales,
    grid: Grid,
    variance: Float[Array, "model row col"],
    residual_ratio: Float[Array, ""],
    rounding: str = "R1",
    conditioning: Array | float = 1.0,
) -> Resolved:
    """Snaps, fixes what is all but certain, fits again, until no more becomes certain.

    Args:
      weights: merged weights of one layer as stored.
      left: B of the refined updates, zero past each rank.
      right: A of the refined updates.
      ranks: rank of each update.
      scales: rounding error as row and column factors.
      grid: of the base.
      variance: of the merged weights' errors with these updates.
      residual_ratio: rms of the residuals over that of one rounding; more roundings show in it.
      rounding: rule of the merge, R0 to R3.
      conditioning: of the closed form.

    Returns:
      The base on its grid and the updates fitted with it.
    """
    models = as_merged(weights)
    active = jnp.arange(left.shape[2], dtype=jnp.int32) < ranks[:, None]
    units = _positive_spacing(models, left.dtype)
    more = jnp.square(residual_ratio) - 1
    least_slack = jnp.sqrt(jnp.where(more > SEVERAL_ROUNDINGS, more / 12, 0))

    def estimate(left: Array, right: Array, variance: Array) -> Array:
        return nearest(weighted_base(models, left, right, variance), grid)

    def one_round(state: tuple[Resolved, Array]) -> tuple[Resolved, Array]:
        carry, variance = state
        base = carry.snapped.base
        before = carry.snapped.wrong < fixed_below(carry.amplification)
        left, right, count = refit(
            models, carry.left, carry.right, ranks, scales, base, before, variance
        )
        variance = merge_variance(models, left, right, rounding)
        errors = spread(variance, left, right, active, scales, before, conditioning)
        centre = jnp.where(before, base, estimate(left, right, variance))
        softness = errors.variance + jnp.maximum(variance - jnp.square(units) / 12, 0)
        rest = residuals(models, centre, left, right)
        softness = softness + _unresolved(rest, variance, softness)[:, None, None]
        slack = jnp.maximum(_outside(rest, units, softness, before), least_slack)
        softness = softness + jnp.square(slack[:, None, None] * units)
        found = snap(models, left, right, centre, before, softness, errors.leverage, grid)
        amplification = jnp.where(carry.rounds == 0, errors.amplification, carry.amplification)
        fixed = jnp.mean(found.wrong < fixed_below(amplification), dtype=jnp.float32)
        already = jnp.mean(before, dtype=jnp.float32)
        after = Resolved(
            snapped=found,
            left=left,
            right=right,
            amplification=amplification,
            slack=slack,
            rounds=carry.rounds + 1,
            steps=carry.steps + count,
            grown=fixed - already,
            residual_ratio=jnp.sqrt(jnp.sum(jnp.square(rest)) / jnp.sum(variance)),
        )
        return after, variance

    def going(state: tuple[Resolved, Array]) -> Array:
        carry, _ = state
        return (carry.rounds < ROUNDS) & (carry.grown > GROWTH)

    base = estimate(left, right, variance)
    ones = jnp.ones(base.shape, jnp.float32)
    zero, none = jnp.zeros_like(left[0, 0, 0]), jnp.zeros_like(ranks[0])
    start = Snapped(base, ones, jnp.zeros_like(base), zero)
    one = jnp.float32(1) + 0 * ones[0, 0]
    first = Resolved(start, left, right, 0 * one, 0 * left[:, 0, 0], none, none, one, zero)
    return jax.lax.while_loop(going, one_round, (first, variance))[0]
