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
from jdetune.blocks import Each, by_rows
from jdetune.noise import Weights, as_merged, merge_variance
from jdetune.solvers.pairs import Scales
from jdetune.solvers.relative import Relative, moved, tangent_of, units_of, view
from jdetune.solvers.tangent import (
    Step,
    conjugate_gradients,
    preconditioned_size,
    sharper,
    to_tangent,
)

#: Rounds in float32 arithmetic, whose own error keeps the gradient above the tolerance.
FLOAT32_ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Refinement:
    """When the refinement stops.

    Attributes:
      tolerance: stop when the preconditioned gradient is this share of what the rounding error
        alone would make of it; less where directions are nearly shared. What is left is far below
        the error that the rounding makes of base and updates.
      max_steps: conjugate gradient steps a round, at the latest.
      rounds: Gauss-Newton steps at the latest; one or two are enough unless directions are nearly
        shared.
    """

    tolerance: float = 0.3
    max_steps: int = 300
    rounds: int = 6


class Refined(NamedTuple):
    """Updates after refinement, as factors, with what the solver has to say.

    ``steps`` counts conjugate gradient steps over all rounds; ``reached`` is the preconditioned
    gradient at these updates, as a share of what rounding alone makes of it.
    """

    left: Float[Array, "model row rank"]
    right: Float[Array, "model rank col"]
    steps: Int[Array, ""]
    reached: Float[Array, ""]
    rounds: Int[Array, ""]


class MostLikely(NamedTuple):
    """What ``most_likely`` finds.

    Attributes:
      updates: the refined updates.
      base: most likely base for them.
      base_variance: the base's if the updates were known.
      ratio: rms of the residuals over that of the rounding error; about 1, as what the fitted
        updates take up is a few percent.
      at: the layer relative to base and updates.
    """

    updates: Refined
    base: Float[Array, "row col"]
    base_variance: Float[Array, "row col"]
    ratio: Float[Array, ""]
    at: Relative


def refine(
    weights: Weights,
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
    ranks: Int[Array, " model"],
    scales: Scales,
    options: Refinement,
    rounding: str = "R1",
    conditioning: Array | float = 1.0,
) -> tuple[Refined, Relative]:
    """Gauss-Newton from the closed form to the most likely updates.

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
      The updates in the dtype of ``left``, and the layer relative to them.
    """
    models = as_merged(weights)
    active = jnp.arange(left.shape[2], dtype=jnp.int32) < ranks[:, None]
    units = units_of(models, scales)
    variance = merge_variance(models, left, right, rounding, units)
    freedom = jnp.sum(ranks).astype(jnp.float32) * (left.shape[1] + right.shape[2])
    freedom = jnp.maximum(freedom, 1)
    rounds = options.rounds if left.dtype == jnp.float64 else min(options.rounds, FLOAT32_ROUNDS)
    goal = freedom * (options.tolerance**2 * sharper(conditioning)).astype(jnp.float32)

    at = view(models, left, right, active, units, variance)
    tangent = tangent_of(at)

    def look(at: Relative) -> tuple[Step, Array]:
        space = tangent._replace(left=at.left, right=at.right)
        gradient = to_tangent(space, (Each(at.weight), Each(at.error)), _weighted)
        return gradient, preconditioned_size(space, gradient)

    def going(carry: tuple) -> Array:
        found, _, _, size = carry
        return (found.rounds < rounds) & (size > goal)

    def one_round(carry: tuple) -> tuple:
        found, at, gradient, _ = carry
        space = tangent._replace(left=at.left, right=at.right)
        step, count = conjugate_gradients(space, gradient, options.max_steps, goal)
        left, right = moved(at, step)
        at = view(models, left, right, active, units, variance, at.weight)
        gradient, size = look(at)
        reached = jnp.sqrt(size / freedom)
        found = Refined(left, right, found.steps + count, reached, found.rounds + 1)
        return found, at, gradient, size

    gradient, size = look(at)
    none = jnp.zeros_like(ranks[0])
    start = Refined(left, right, none, jnp.sqrt(size / freedom), none)
    found, at, _, _ = jax.lax.while_loop(going, one_round, (start, at, gradient, size))
    return found, at


def _weighted(rows: tuple) -> linalg.PerModel:
    """Errors times weights, with the base that fits best."""
    mean = linalg.weighted_mean(*rows)
    return linalg.map_each(lambda weight, error: weight * (error - mean), *rows)


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
    found, at = refine(weights, left, right, ranks, scales, options, rounding, conditioning)
    n_models = left.shape[0]

    def some(rows: tuple) -> tuple[tuple[Array, Array], Array]:
        error, variance, each = rows
        sums = jnp.sum(jnp.square(error)), jnp.sum(variance)
        return sums, linalg.sum_each(jnp.reciprocal, each)

    rows = (at.error, at.variance, Each(at.variance))
    (left_over, expected), information = by_rows(some, rows)
    share = left_over / expected
    ratio = jnp.sqrt(share * n_models / (n_models - 1)).astype(left.dtype)
    known = jnp.square(at.units.row[:, None] * at.units.col) / information.astype(left.dtype)
    return MostLikely(found, at.base, known, ratio, at)
