r"""Every element of the base decided on the base's own grid.

:math:`W + M_i` lies in the interval that rounds to :math:`W'_i`. The interval's ends are softened
by what the merge's arithmetic and the error of :math:`M_i` make of them; over all models each grid
point near the estimate then has a likelihood (``jdetune.snap``). One point left is *certain*, else
the element is *ambiguous* and takes the most likely point. Elements that are all but certain are
fed back: with them fixed the updates are fitted anew, and more elements become certain.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jdetune import linalg
from jdetune.blocks import Each, by_rows
from jdetune.certificate import Spread, spread_again
from jdetune.grids import Grid, nearest
from jdetune.noise import Weights, as_merged
from jdetune.snap import Snapped, Unexplained, relative_spacing, relative_ulp, snap
from jdetune.solvers.refit import newton_step, shift_to
from jdetune.solvers.relative import Relative, errors_after, moved, pair_after, zero_step
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


class _Sums(NamedTuple):
    """Sums over elements that count, of each model: their number, of what is seen and expected."""

    number: Float[Array, "*model"]
    seen: Float[Array, "*model"]
    expected: Float[Array, "*model"]

    def means(self) -> tuple[Array, Array]:
        """Means of what is seen and expected."""
        number = jnp.maximum(self.number, 1)
        return self.seen / number, self.expected / number


def _sums(counts: Array, seen: Array, expected: Array) -> _Sums:
    def total(values: Array | int) -> Array:
        return jnp.sum(jnp.where(counts, values, 0).astype(seen.dtype))

    return _Sums(total(1), total(seen), total(expected))


def _seen_outside(
    error: Array, units: Array, softness: Array, unresolved: Array, known: Array
) -> _Sums:
    """How far one model's residuals leave their intervals where known, in units of spacing."""
    outside = jnp.maximum(jnp.abs(error) / units - 0.5, 0)
    deviation = jnp.sqrt(softness + unresolved) / units
    counts = known & (deviation < 0.3)
    return _sums(counts, jnp.minimum(jnp.square(outside), 1), deviation**3)


def _outside(sums: _Sums) -> Float[Array, " model"]:
    """Deviation of unexplained error in units of spacing, from ``_seen_outside``.

    An error uniform on one unit plus a normal one of small deviation s leaves its interval by a
    mean square of 0.532 s^3.
    """
    seen, cubes = sums.means()
    excess = seen - 1.5 * 0.532 * cubes - 1e-5
    return jnp.cbrt(jnp.maximum(excess, 0) / 0.532)


def _seen_fine(error: Array, variance: Array, softness: Array, usual: Array) -> _Sums:
    """One model's residuals of elements whose rounding error is far below the usual."""
    fine = variance < FINE * usual
    return _sums(fine, jnp.square(error), variance + softness)


def _unresolved(sums: _Sums) -> Float[Array, " model"]:
    """Variance of updates too small to be found, from ``_seen_fine``.

    The grid is fine enough there to show them; half again what is expected is no sign of anything.
    """
    n_models = sums.number.shape[0]
    seen, expected = sums.means()
    seen = seen * n_models / (n_models - 1)
    return jnp.where((sums.number > 100) & (seen > 2 * expected), seen - expected, 0)


class Resolved(NamedTuple):
    """Base and updates after all rounds.

    Attributes:
      snapped: the base on its grid.
      step: where the updates are, relative to the layer's; fitted with the known elements.
      unexplained: error of each model that nothing explains; the next round counts on it.
      rounds: of fixing and fitting.
      steps: of conjugate gradients.
      grown: share of elements that the last round fixed.
      residual_ratio: rms of what base and updates leave over, over that of the rounding error.
    """

    snapped: Snapped
    step: Step
    unexplained: Unexplained
    rounds: Int[Array, ""]
    steps: Int[Array, ""]
    grown: Float[Array, ""]
    residual_ratio: Float[Array, ""]


def resolve(
    weights: Weights,
    at: Relative,
    grid: Grid,
    noise: Spread,
    residual_ratio: Float[Array, ""],
    conditioning: Array | float = 1.0,
) -> tuple[Resolved, Array, Array]:
    """Snaps, fixes what is all but certain, fits again, until no more becomes certain.

    Args:
      weights: merged weights of one layer as stored.
      at: the layer relative to the refined base and updates.
      grid: of the base.
      noise: errors of the updates before anything is known.
      residual_ratio: rms of the residuals over that of one rounding; more roundings show in it.
      conditioning: of the closed form.

    Returns:
      The base on its grid, and B and A of the updates fitted with it.
    """
    models = jax.tree.map(jnp.asarray, as_merged(weights))
    more = jnp.square(residual_ratio.astype(jnp.float32)) - 1
    least_slack = jnp.sqrt(jnp.where(more > SEVERAL_ROUNDINGS, more / 12, 0))
    usual = jnp.mean(at.variance, axis=(1, 2))
    unit, fixed = at.units.row[:, None], fixed_below(noise.amplification)

    def spaced(values: Array, unit: Array) -> Array:
        here = models._replace(values=values)
        return relative_spacing(here, at.units._replace(row=unit[:, 0]))

    def one_round(carry: Resolved) -> Resolved:
        base = carry.snapped.base
        before = carry.snapped.wrong < fixed
        step, count = jax.lax.cond(
            jnp.any(before),
            lambda: newton_step(at, carry.step, shift_to(at, base), before),
            lambda: (carry.step, jnp.zeros_like(carry.steps)),
        )
        errors = spread_again(noise, at, before, conditioning)
        tall, wide = pair_after(at, step)

        def centred(rows: tuple) -> tuple[tuple[()], tuple[Array, ...]]:
            """Around the nearest grid point: what is left over, and how soft intervals are."""
            values, unit, each, variance, tall, before, base, of_base, leverages = rows
            after = errors_after(each[0], tall, wide)
            mean = linalg.inverse_variance_mean(each[1], after)
            estimate = of_base + mean.astype(of_base.dtype) * unit * at.units.col
            centre = jnp.where(before, base, nearest(estimate, grid))
            away = ((centre - of_base) / unit / at.units.col).astype(jnp.float32)
            arithmetic = variance - jnp.square(spaced(values, unit)) / 12
            softness = errors.at_rows(*leverages).variance() + jnp.maximum(arithmetic, 0)
            return (), (linalg.stack_models(after) - away, centre, softness)

        leverages, each = (errors.tall, errors.rows), (Each(at.error), Each(at.variance))
        rows = (models.values, unit, each, at.variance, tall, before, base, at.base, leverages)
        _, (rest, centre, softness) = by_rows(centred, rows)

        def judged(rows: tuple) -> tuple[Any, Array]:
            """How far outside of their intervals errors are, and errors less their own pull."""
            each, unit, rest, weight, before, leverages = rows
            scales = at.units._replace(row=unit[:, 0])

            def one(values: Array, error: Array, softness: Array, *more: Array) -> tuple:
                variance, eps, smallest, usual, unresolved = more
                size = relative_ulp(values, eps, smallest, scales)
                fine = _seen_fine(error, variance, softness, usual)
                seen = _seen_outside(error, size, softness, unresolved, before)
                return fine, seen, (jnp.sum(jnp.square(error)), jnp.sum(variance))

            of_models = *models[1:], usual, carry.unexplained.variance
            own = errors.at_rows(*leverages).leverage(weight)
            sums = linalg.map_each(one, *each, *of_models)
            return sums, jnp.where(before, rest / (1 - own), rest)

        each = tuple(map(Each, (models.values, rest, softness, at.variance)))
        sums, error = by_rows(judged, (each, unit, rest, at.weight, before, leverages))
        fine, seen = (_Sums(*map(linalg.stack_models, part)) for part in sums[:2])
        left_over, expected = (jnp.sum(linalg.stack_models(part)) for part in sums[2])
        rough = Unexplained(_unresolved(fine), jnp.maximum(_outside(seen), least_slack))
        found = snap(models, at.units, error, centre, softness, grid, rough)
        share = jnp.mean(found.wrong < fixed, dtype=jnp.float32)
        return Resolved(
            snapped=found,
            step=step,
            unexplained=rough,
            rounds=carry.rounds + 1,
            steps=carry.steps + count,
            grown=share - jnp.mean(before, dtype=jnp.float32),
            residual_ratio=jnp.sqrt(left_over / expected),
        )

    def going(carry: Resolved) -> Array:
        return (carry.rounds < ROUNDS) & (carry.grown > GROWTH)

    zero = 0 * at.error[0, 0, 0]
    none = zero.astype(jnp.int32)
    zeros = 0 * at.error[0]
    start = Snapped(at.base, zeros + 1, 0 * at.base[0, 0], zeros)
    nothing = Unexplained(*2 * [0 * at.error[:, 0, 0]])
    first = Resolved(start, zero_step(at), nothing, none, none, zero + 1, zero)
    found = jax.lax.while_loop(going, one_round, first)
    return found, *moved(at, found.step)
