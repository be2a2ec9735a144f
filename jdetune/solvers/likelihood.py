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
from jaxtyping import Float, Int

from jdetune import linalg
from jdetune.noise import Weights, as_merged, fit_variance, merge_variance
from jdetune.solvers.intersection import Scales
from jdetune.solvers.tangent import conjugate_gradients, linearize, move, sharper, to_tangent

#: Rounds in float32 arithmetic, whose own error keeps the gradient above the tolerance.
FLOAT32_ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Refinement:
    """When the refinement stops.

    Attributes:
      tolerance: stop when the preconditioned gradient is this share of what the rounding error
        alone would make of it; less where directions are nearly shared.
      max_steps: conjugate gradient steps a round, at the latest.
      rounds: Gauss-Newton steps at the latest; one or two are enough unless directions are nearly
        shared.
    """

    tolerance: float = 1e-2
    max_steps: int = 300
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
    weights: Weights,
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
    variance: Float[Array, "model row col"],
) -> Float[Array, "row col"]:
    """Most likely base for given updates: the mean of W' - M, weighted by inverse variance.

    Summed relative to the first model, so that nothing is lost to the size of the weights.
    """
    values = jnp.asarray(as_merged(weights).values)
    dtype = variance.dtype
    reference = values[0].astype(dtype)

    def add(total: tuple[Array, Array], model: Array) -> tuple[tuple[Array, Array], None]:
        value = values[model].astype(dtype) - reference
        value = value - linalg.matmul(left[model], right[model])
        weight = 1 / variance[model]
        return (total[0] + weight * value, total[1] + weight), None

    zero = jnp.zeros_like(reference)
    models = jnp.arange(values.shape[0], dtype=jnp.int32)
    (moved, total), _ = jax.lax.scan(add, (zero, zero), models)
    return reference + moved / total


def refine(
    weights: Weights,
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
    ranks: Int[Array, " model"],
    scales: Scales,
    options: Refinement,
    rounding: str = "R1",
    conditioning: Array | float = 1.0,
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
      rounding: rule of the merge, R0 to R3.
      conditioning: of the closed form; see ``sharper``.

    Returns:
      The updates in the dtype of ``left``; the base follows from ``weighted_base``.
    """
    models = as_merged(weights)
    dtype, work = left.dtype, jnp.float32
    active = jnp.arange(left.shape[2], dtype=jnp.int32) < ranks[:, None]
    freedom = jnp.sum(ranks).astype(dtype) * (left.shape[1] + right.shape[2])
    rounds = options.rounds if dtype == jnp.float64 else min(options.rounds, FLOAT32_ROUNDS)

    goal_share = options.tolerance**2 * sharper(conditioning)

    def going(carry: Refined) -> Array:
        return (carry.rounds < rounds) & (jnp.square(carry.reached) > goal_share)

    def one_round(carry: Refined) -> Refined:
        variance = fit_variance(merge_variance(models, carry.left, carry.right, rounding))
        base = weighted_base(models, carry.left, carry.right, variance)
        error = residuals(models, base, carry.left, carry.right) / scales.row[:, None] / scales.col
        size = jnp.sqrt(jnp.mean(jnp.square(error))) + float(jnp.finfo(work).tiny)
        at = linearize(carry.left, carry.right, active, scales, 1 / variance)
        gradient = to_tangent(at.tangent, at.tangent.weight * (error / size).astype(work))
        unit = jnp.maximum(freedom, 1) / at.unit / jnp.square(size)
        goal = (goal_share * unit).astype(work)
        z, count, first = conjugate_gradients(at.tangent, gradient, goal, options.max_steps)
        b, a = move(at, z, size, scales)
        return Refined(
            left=b,
            right=a,
            steps=carry.steps + count,
            reached=jnp.sqrt(first.astype(dtype) / unit),
            rounds=carry.rounds + 1,
        )

    none = jnp.zeros_like(ranks[0])
    return jax.lax.while_loop(
        going, one_round, Refined(left, right, none, jnp.inf + 0 * left[0, 0, 0], none)
    )


class MostLikely(NamedTuple):
    """What ``most_likely`` finds.

    Attributes:
      updates: the refined updates.
      base: most likely base for them.
      variance: of the merged weights' errors.
      base_variance: the base's if the updates were known.
      ratio: rms of the residuals over that of the rounding error; about 1, as what the fitted
        updates take up is a few percent.
    """

    updates: Refined
    base: Float[Array, "row col"]
    variance: Float[Array, "model row col"]
    base_variance: Float[Array, "row col"]
    ratio: Float[Array, ""]


def most_likely(
    weights: Weights,
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
    ranks: Int[Array, " model"],
    scales: Scales,
    options: Refinement = Refinement(),
    rounding: str = "R1",
    conditioning: Array | float = 1.0,
) -> MostLikely:
    """Most likely base and updates from those of the closed form.

    Args:
      weights: merged weights of one layer as stored.
      left: B of the closed form, zero past each rank.
      right: A of the closed form.
      ranks: rank of each update.
      scales: rounding error as row and column factors.
      options: when to stop.
      rounding: rule of the merge, R0 to R3.
      conditioning: of the closed form; see ``sharper``.

    Returns:
      Updates and base with their variances.
    """
    models = as_merged(weights)
    found = refine(models, left, right, ranks, scales, options, rounding, conditioning)
    variance = merge_variance(models, found.left, found.right, rounding)
    base = weighted_base(models, found.left, found.right, variance)
    error = residuals(models, base, found.left, found.right)
    n_models = left.shape[0]
    share = jnp.sum(jnp.square(error)) / jnp.sum(variance)
    known = 1 / linalg.sum_models(1 / variance)
    ratio = jnp.sqrt(share * n_models / (n_models - 1))
    return MostLikely(found, base, variance, known, ratio)


def residuals(
    weights: Weights,
    base: Float[Array, "row col"],
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
) -> Float[Array, "model row col"]:
    """What base and updates leave over, :math:`W'_i - W - B_i A_i`, one model at a time."""

    def one(operands: tuple[Array, Array, Array]) -> Array:
        stored, b, a = operands
        return (stored.astype(base.dtype) - base) - linalg.matmul(b, a)

    return jax.lax.map(one, (jnp.asarray(as_merged(weights).values), left, right))
