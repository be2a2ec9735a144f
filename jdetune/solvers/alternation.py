"""The steps of Spectral DeTuning, in whatever space their data are: one scan for all layers.

``solvers.spectral`` has the algorithm, its source and the entry point.

A truncation is from a new Gaussian sketch, as published, or warm, from the factors of the step
before; ``solvers.truncation`` has both.

Warm steps are for layers that have been at the end rank for a while. While the rank grows it is the
randomness of the sketches that ends a plateau: warm steps lower the loss a little for ever, the
rank grows late, and fewer layers converge. At the end rank, while the base is still far off,
published truncations get ahead of exact ones, which warm steps equal: on layers slow to converge
(4 models of 100x80, rank 16, 600 steps) exact ones were 59 steps behind at step 400, warm ones 41
if ten steps had settled the layer and 15 if forty had. Once a layer converges, all are the same.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdetune import linalg, rank_schedule
from jdetune.rank_schedule import RankSchedule
from jdetune.solvers import truncation

#: (step from 0, model) to a Gaussian sketch [sketched side, rank] for the matrices of full size.
Draw = Callable[[Array, Array], Array]

#: Steps at the end rank before the first warm one. Six layers of three real models of rank 16 ended
#: 0.021 +- 0.011 decades worse than without warm steps after 10 of them, 0.004 +- 0.004 after 40.
SETTLING_STEPS = 40


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about a run.

    Attributes:
      rank: end rank, the size of the rank axis.
      steps: number of steps.
      schedule: how the rank grows.
      n_elements: elements of the weight matrix, which the loss is a mean over.
      transposed: whether the weight matrix is wider than tall; the sketch is then of its rows.
      exact_every: steps from one new sketch to the next, once a layer is settled at the end rank.
    """

    rank: int
    steps: int
    schedule: RankSchedule
    n_elements: int
    transposed: bool
    exact_every: int = 1


class Factors(NamedTuple):
    """Updates of one layer in the space of the iteration: left @ right^T."""

    left: Float[Array, "model left_side rank"]
    right: Float[Array, "model right_side rank"]


class Carry(NamedTuple):
    """What one step hands to the next, for one layer; ``settled`` counts steps at the end rank."""

    estimate: Float[Array, "left_side right_side"]
    factors: Factors
    schedule: rank_schedule.RankState
    settled: Int[Array, ""]


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


def update_layer(
    problem: Problem,
    carry: Carry,
    sketches: Float[Array, "model sketched rank"] | None,
    plan: Plan,
) -> Factors:
    r"""M-step of one layer: :math:`M_i = \mathrm{trunc}_r(W'_i - W^*)`.

    Args:
      problem: the layer.
      carry: from the step before.
      sketches: a Gaussian matrix a model, for the published truncation; None for a warm one.
      plan: what is static.

    Returns:
      The updates.
    """
    active = jnp.arange(plan.rank, dtype=jnp.int32) < carry.schedule.rank
    if sketches is None:
        method, starts = (
            truncation.refine,
            carry.factors.left if plan.transposed else carry.factors.right,
        )
    elif problem.basis is None:
        method, starts = truncation.truncate, sketches
    else:
        method, starts = (
            truncation.truncate,
            linalg.contract("sw,msr->mwr", problem.basis, sketches),
        )

    def one(stored: Array, start: Array) -> tuple[Array, Array]:
        return method(stored - carry.estimate, start, active, plan.transposed)

    return Factors(*jax.vmap(one)(problem.data, starts))


def finish_layer(
    problem: Problem, carry: Carry, factors: Factors, plan: Plan
) -> tuple[Carry, Float[Array, ""]]:
    r"""W-step and schedule step of one layer: :math:`W^* = \mathrm{mean}_i(W'_i - M_i)`.

    Args:
      problem: the layer.
      carry: from the step before.
      factors: the updates M_i of this step.
      plan: what is static.

    Returns:
      The next carry, and the loss with the new estimate, rounded to float32.
    """
    n_models = problem.data.shape[0]
    updates = linalg.contract("mlr,mkr->mlk", *factors)
    estimate = linalg.sum_models(problem.data - updates) / n_models
    squares = jnp.square(problem.data - (estimate + updates))
    inside = jnp.sum(squares) / (n_models * plan.n_elements)
    loss = (inside + problem.outside).astype(jnp.float32)
    state = rank_schedule.advance(plan.schedule, plan.rank, plan.steps, carry.schedule, loss)
    settled = jnp.where(carry.schedule.rank == plan.rank, carry.settled + 1, 0)
    return Carry(estimate, factors, state, settled), loss


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
    update = jax.vmap(functools.partial(update_layer, plan=plan), in_axes=(0, 0, None))
    finish = jax.vmap(functools.partial(finish_layer, plan=plan))

    def step(carry: Carry, index: Array) -> tuple[Carry, tuple[Array, Array]]:
        def new() -> Factors:
            sketches = jax.vmap(lambda model: draw(index, model))(models).astype(data.dtype)
            return update(problem, carry, sketches)

        if plan.exact_every == 1:
            factors = new()
        else:
            due = (index % plan.exact_every == 0) | (index == plan.steps - 1)
            may = (carry.settled >= SETTLING_STEPS) & ~due
            warm = functools.partial(update, problem, carry, None)
            factors = _either(may, warm, new, carry.factors)
        after, loss = finish(problem, carry, factors)
        return after, (loss, carry.schedule.rank)

    zero = jnp.zeros_like(data, shape=(n_layers,), dtype=jnp.int32)  # varies as data do
    start = Carry(
        estimate=jax.vmap(linalg.sum_models)(data) / n_models,
        factors=Factors(
            jnp.zeros_like(data, shape=(*data.shape[:3], plan.rank)),
            jnp.zeros_like(data, shape=(*data.shape[:2], data.shape[3], plan.rank)),
        ),
        schedule=jax.tree.map(
            lambda field: field + zero.astype(field.dtype),
            rank_schedule.init(plan.schedule, (n_layers,)),
        ),
        settled=zero,
    )
    last, (loss, ranks) = jax.lax.scan(step, start, jnp.arange(plan.steps, dtype=jnp.int32))
    return last, loss.T, ranks.T


def _either(
    wanted: Bool[Array, " layer"],
    one: Callable[[], Factors],
    other: Callable[[], Factors],
    before: Factors,
) -> Factors:
    """``one`` for the layers that want it, ``other`` for the rest; neither runs for no layer.

    Its conditions are scalars outside of the vmap over layers, so they are real branches.
    """
    first = jax.lax.cond(jnp.any(wanted), one, lambda: before)
    second = jax.lax.cond(jnp.all(wanted), lambda: before, other)
    mask = wanted[:, None, None, None]
    return jax.tree.map(lambda a, b: jnp.where(mask, a, b), first, second)
