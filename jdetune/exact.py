r"""Every element of the base decided on the base's own grid.

:math:`W + M_i` lies in the interval that rounds to :math:`W'_i`. The interval's ends are softened
by what the merge's arithmetic and the error of :math:`M_i` make of them; over all models each grid
point near the estimate then has a likelihood (``jdetune.snap``). One point left is *certain*, else
the element is *ambiguous* and takes the most likely point. Elements that are all but certain are
fed back: with them fixed the updates are fitted anew, and more elements become certain.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jdetune import linalg
from jdetune.certificate import spread
from jdetune.grids import Grid, nearest
from jdetune.noise import Weights, as_merged
from jdetune.snap import Snapped, Unexplained, relative_spacing, snap
from jdetune.solvers.refit import newton_step, shift_to
from jdetune.solvers.relative import Relative, errors_after, moved, zero_step
from jdetune.solvers.tangent import Step

#: An element is fixed for the next fit if all other grid points together are less likely than this
#: (where noise is not amplified).
FIXED = 1e-4
#: An element is certain if all other grid points together are less likely than this.
CERTAIN = 1e-4
#: Rounds of fixing and fitting: until the share of fixed elements grows by less than ``GROWTH``.
ROUNDS = 6
GROWTH = 0.01
#: Residual power beyond one rounding's from which several roundings are taken for certain.
SEVERAL_ROUNDINGS = 0.2
#: Elements whose rounding variance is below this share of the mean show what nothing explains.
FINE = 0.01


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


def _outside(
    error: Array, units: Array, softness: Array, unresolved: Array, known: Array
) -> Float[Array, " model"]:
    """Deviation of unexplained error in units of spacing: how far residuals leave their intervals.

    An error uniform on one unit plus a normal one of small deviation s leaves its interval by a
    mean square of 0.532 s^3.
    """

    def one(operands: tuple[Array, ...]) -> Array:
        error, units, softness, unresolved = operands
        outside = jnp.maximum(jnp.abs(error) / units - 0.5, 0)
        deviation = jnp.sqrt(softness + unresolved) / units
        counts = known & (deviation < 0.3)
        seen = _mean_where(counts, jnp.minimum(jnp.square(outside), 1))
        excess = seen - 1.5 * 0.532 * _mean_where(counts, deviation**3) - 1e-5
        return jnp.cbrt(jnp.maximum(excess, 0) / 0.532)

    return linalg.each_model(one, (error, units, softness, unresolved))


def _unresolved(error: Array, variance: Array, softness: Array) -> Float[Array, " model"]:
    """Variance of updates too small to be found, seen where the grid is fine enough to show them.

    Judged by elements whose rounding error is far below the usual; half again what is expected of
    them is no sign of anything.
    """
    n_models = error.shape[0]

    def one(operands: tuple[Array, ...]) -> Array:
        error, variance, softness = operands
        fine = variance < FINE * jnp.mean(variance)
        seen = _mean_where(fine, jnp.square(error)) * n_models / (n_models - 1)
        expected = _mean_where(fine, variance + softness)
        enough = jnp.sum(fine, dtype=error.dtype) > 100
        return jnp.where(enough & (seen > 2 * expected), seen - expected, 0)

    return linalg.each_model(one, (error, variance, softness))


def _mean_where(where: Array, values: Array) -> Float[Array, ""]:
    number = jnp.maximum(jnp.sum(where, dtype=values.dtype), 1)
    return jnp.sum(jnp.where(where, values, 0)) / number


class Resolved(NamedTuple):
    """Base and updates after all rounds.

    Attributes:
      snapped: the base on its grid.
      step: where the updates are, relative to the layer's; fitted with the known elements.
      amplification: of the rounding noise, before anything was known.
      slack: deviation of each model's error that nothing explains, in units of spacing.
      rounds: of fixing and fitting.
      steps: of conjugate gradients.
      grown: share of elements that the last round fixed.
      residual_ratio: rms of what base and updates leave over, over that of the rounding error.
    """

    snapped: Snapped
    step: Step
    amplification: Float[Array, ""]
    slack: Float[Array, " model"]
    rounds: Int[Array, ""]
    steps: Int[Array, ""]
    grown: Float[Array, ""]
    residual_ratio: Float[Array, ""]


def resolve(
    weights: Weights,
    at: Relative,
    grid: Grid,
    residual_ratio: Float[Array, ""],
    conditioning: Array | float = 1.0,
) -> tuple[Resolved, Array, Array]:
    """Snaps, fixes what is all but certain, fits again, until no more becomes certain.

    Args:
      weights: merged weights of one layer as stored.
      at: the layer relative to the refined base and updates.
      grid: of the base.
      residual_ratio: rms of the residuals over that of one rounding; more roundings show in it.
      conditioning: of the closed form.

    Returns:
      The base on its grid, and B and A of the updates fitted with it.
    """
    models = as_merged(weights)
    units = relative_spacing(models, at.units)
    more = jnp.square(residual_ratio.astype(jnp.float32)) - 1
    least_slack = jnp.sqrt(jnp.where(more > SEVERAL_ROUNDINGS, more / 12, 0))
    total = linalg.sum_models(1 / at.variance)

    def one_round(carry: Resolved) -> Resolved:
        base = carry.snapped.base
        before = carry.snapped.wrong < fixed_below(carry.amplification)
        step, count = jax.lax.cond(
            jnp.any(before),
            lambda: newton_step(at, carry.step, shift_to(at, base), before),
            lambda: (carry.step, jnp.zeros_like(carry.steps)),
        )
        errors = spread(at, before, conditioning)
        rest = errors_after(at, step)
        mean = (linalg.sum_models(rest / at.variance) / total).astype(at.base.dtype)
        estimate = at.base + mean * at.units.row[:, None] * at.units.col
        centre = jnp.where(before, base, nearest(estimate, grid))
        rest = rest - shift_to(at, centre)
        softness = errors.variance + jnp.maximum(at.variance - jnp.square(units) / 12, 0)
        unresolved = _unresolved(rest, at.variance, softness)
        outside = _outside(rest, units, softness, unresolved, before)
        rough = Unexplained(unresolved, jnp.maximum(outside, least_slack))
        found = snap(models, at.units, rest, centre, before, softness, errors.leverage, grid, rough)
        amplification = jnp.where(carry.rounds == 0, errors.amplification, carry.amplification)
        fixed = jnp.mean(found.wrong < fixed_below(amplification), dtype=jnp.float32)
        return Resolved(
            snapped=found,
            step=step,
            amplification=amplification,
            slack=rough.slack,
            rounds=carry.rounds + 1,
            steps=carry.steps + count,
            grown=fixed - jnp.mean(before, dtype=jnp.float32),
            residual_ratio=jnp.sqrt(jnp.sum(jnp.square(rest)) / jnp.sum(at.variance)),
        )

    def going(carry: Resolved) -> Array:
        return (carry.rounds < ROUNDS) & (carry.grown > GROWTH)

    zero = 0 * at.error[0, 0, 0]
    none = zero.astype(jnp.int32)
    nothing = 0 * at.base[0, 0]
    start = Snapped(at.base, jnp.ones_like(at.error[0]), nothing, nothing)
    first = Resolved(start, zero_step(at), zero, 0 * at.error[:, 0, 0], none, none, zero + 1, zero)
    found = jax.lax.while_loop(going, one_round, first)
    return found, *moved(at, found.step)
