"""The steps of Spectral DeTuning, in whatever space their data are: one scan for all layers.

``solvers.spectral`` has the algorithm, its source and the entry point.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdetune import linalg, rank_schedule
from jdetune.rank_schedule import RankSchedule

#: (step from 0, model) to a Gaussian sketch [sketched side, rank] for the matrices of full size.
Draw = Callable[[Array, Array], Array]

#: Power steps of the randomized truncation.
POWER_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about a run.

    Attributes:
      rank: end rank, the size of the rank axis.
      steps: number of steps.
      schedule: how the rank grows.
      n_elements: elements of the weight matrix, which the loss is a mean over.
      transposed: whether the weight matrix is wider than tall; the sketch is then of its rows.
    """

    rank: int
    steps: int
    schedule: RankSchedule
    n_elements: int
    transposed: bool


class Factors(NamedTuple):
    """Updates of one layer in the space of the iteration: left @ right^T."""

    left: Float[Array, "model left_side rank"]
    right: Float[Array, "model right_side rank"]


class Carry(NamedTuple):
    """What one step hands to the next, for one layer."""

    estimate: Float[Array, "left_side right_side"]
    factors: Factors
    schedule: rank_schedule.RankState


class Problem(NamedTuple):
    """One layer in the space of the iteration.

    Attributes:
      data: merged weights, or cores of their differences.
      outside: mean square outside the space, added to the loss.
      basis: basis [sketched side, width] that sketches of full size are brought to the core with,
        or None if they are drawn in the space of the iteration.
    """

    data: Float[Array, "model left_side right_side"]
    outside: Float[Array, ""]
    basis: Float[Array, "sketched width"] | None


def truncate(
    matrix: Float[Array, "left_side right_side"],
    sketch: Float[Array, "sketched rank"],
    active: Bool[Array, " rank"],
    transposed: bool,
) -> tuple[Float[Array, "left_side rank"], Float[Array, "right_side rank"]]:
    r"""Randomized truncation :math:`Q Q^T A` with two power steps and no oversampling.

    Args:
      matrix: A.
      sketch: Gaussian columns, on the right side, or on the left one if ``transposed``.
      active: which of the leading columns are used: their number is the rank.
      transposed: whether Q spans rows (:math:`A Q Q^T`), as for matrices wider than tall.

    Returns:
      Factors, left and right, with zero columns past the rank.

    Example:
      >>> import jax.numpy as jnp
      >>> a = jnp.outer(jnp.arange(3.0), jnp.arange(2.0))
      >>> left, right = truncate(a, jnp.ones((2, 1)), jnp.array([True]), False)
      >>> bool(jnp.allclose(left @ right.T, a))
      True
    """
    if transposed:
        right, left = truncate(matrix.T, sketch, active, transposed=False)
        return left, right

    def image(columns: Array) -> Array:
        return linalg.orthonormalize_leading(linalg.matmul(matrix, columns), active)

    def coimage(columns: Array) -> Array:
        return linalg.contract("ab,ar->br", matrix, columns)

    basis = image(sketch)
    for _ in range(POWER_STEPS):
        basis = image(linalg.orthonormalize_leading(coimage(basis), active))
    return basis, coimage(basis)


def step_layer(
    problem: Problem,
    carry: Carry,
    sketches: Float[Array, "model sketched rank"],
    plan: Plan,
) -> tuple[Carry, Float[Array, ""]]:
    """One M-step, W-step and schedule step of one layer.

    Args:
      problem: the layer.
      carry: from the step before.
      sketches: a Gaussian matrix a model.
      plan: what is static.

    Returns:
      The next carry, and the loss with the new estimate, rounded to float32.
    """
    n_models = problem.data.shape[0]
    active = jnp.arange(plan.rank, dtype=jnp.int32) < carry.schedule.rank

    def one(stored: Array, sketch: Array) -> tuple[Array, Array]:
        return truncate(stored - carry.estimate, sketch, active, plan.transposed)

    factors = Factors(*jax.vmap(one)(problem.data, sketches))
    updates = linalg.contract("mlr,mkr->mlk", *factors)
    estimate = linalg.sum_models(problem.data - updates) / n_models
    squares = jnp.square(problem.data - (estimate + updates))
    inside = jnp.sum(squares) / (n_models * plan.n_elements)
    loss = (inside + problem.outside).astype(jnp.float32)
    state = rank_schedule.advance(plan.schedule, plan.rank, plan.steps, carry.schedule, loss)
    return Carry(estimate, factors, state), loss


def iterate(
    problem: Problem,
    draw: Draw,
    plan: Plan,
) -> tuple[Carry, Float[Array, "layer step"], Int[Array, "layer step"]]:
    """All steps of all layers in one scan.

    Args:
      problem: fields with a leading layer axis.
      draw: sketch of a step and model, shared by the layers.
      plan: what is static.

    Returns:
      The last carry, the loss of every step and the rank it used.
    """
    data = problem.data
    n_layers, n_models = data.shape[:2]
    models = jnp.arange(n_models, dtype=jnp.int32)

    def of_layer(layer: Problem, carry: Carry, sketches: Array) -> tuple[Carry, Array]:
        if layer.basis is not None:
            sketches = linalg.contract("sw,msr->mwr", layer.basis, sketches)
        return step_layer(layer, carry, sketches, plan)

    def step(carry: Carry, index: Array) -> tuple[Carry, tuple[Array, Array]]:
        sketches = jax.vmap(lambda model: draw(index, model))(models).astype(data.dtype)
        after, loss = jax.vmap(of_layer, in_axes=(0, 0, None))(problem, carry, sketches)
        return after, (loss, carry.schedule.rank)

    start = Carry(
        estimate=jax.vmap(linalg.sum_models)(data) / n_models,
        factors=Factors(
            jnp.zeros_like(data, shape=(*data.shape[:3], plan.rank)),
            jnp.zeros_like(data, shape=(*data.shape[:2], data.shape[3], plan.rank)),
        ),
        schedule=jax.tree.map(
            lambda field: field + jnp.zeros_like(data, shape=(n_layers,), dtype=field.dtype),
            rank_schedule.init(plan.schedule, (n_layers,)),  # the sum varies as data do
        ),
    )
    last, (loss, ranks) = jax.lax.scan(step, start, jnp.arange(plan.steps, dtype=jnp.int32))
    return last, loss.T, ranks.T
