r"""Spectral DeTuning: the paper's iterative recovery, in full space or in core space.

Alternates, for models :math:`i = 1..n` and a rank r that a schedule raises,

.. math::
   M_i \leftarrow \mathrm{SVD}_r(W'_i - W^*), \qquad
   W^* \leftarrow \tfrac1n \sum_i (W'_i - M_i),

from :math:`W^* = \mathrm{mean}_i W'_i`, with the loss
:math:`\mathrm{mean}_{i, x, y} (W'_i - W^* - M_i)^2_{xy}`. The truncation is a randomized one: with
a Gaussian sketch :math:`\Omega` of r columns and two power steps,
:math:`M_i = Q Q^T (W'_i - W^*)`.

Source: Horwitz, Kahana, Hoshen, "Recovering the Pre-Fine-Tuning Weights of Generative Models"
(ICML 2024, arXiv 2402.10208), Algorithm 1, and its published code.

Differs from the authors' code:

1. All layers and models run in one compiled scan; the rank axis has the size of the end rank and
   columns past the current rank are zero.
2. ``space="full"`` keeps float32 weights of full size as they do. ``space="core"`` runs the same
   iteration on the cores of ``jdetune.core``, in float64 where the hardware has it, so rounding no
   longer limits it: on real float32 merges of five models it ends two decades lower.
3. :math:`Q Q^T (W'_i - W^*)` is used as it stands; they factor it once more, which changes nothing
   but rounding.
4. The loss of a step is rounded to float32 before the schedule sees it, as theirs is in effect.
5. The Gaussian numbers are JAX's; those of one step and model are the same in all layers, so a
   layer's result does not depend on which layers run beside it.
6. The rank of the first step may not exceed the end rank.
7. In core space, layers that have been at the end rank for 40 steps are truncated from a new sketch
   only every ``exact_every`` steps and in the last one; the steps between are warm: one subspace
   step from the factors before. ``exact_every=1`` leaves that out.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jdetune import core, linalg
from jdetune.noise import ulp
from jdetune.rank_schedule import RankSchedule
from jdetune.solvers.alternation import Draw, Factors, Plan, Problem, iterate
from jdetune.types import Array as AnyArray


@dataclasses.dataclass(frozen=True)
class SpectralDeTuning:
    """The paper's solver: needs the rank, and steps enough for its schedule.

    Attributes:
      rank: rank of every update, the end rank of the schedule.
      steps: steps of the iteration.
      schedule: how the rank grows.
      space: ``full`` iterates on the weights themselves, as the paper does; ``core`` on small
        cores, which is faster and, in float64, more accurate.
      precision: dtype of the iteration. ``auto`` is, in core space, float64 where the hardware has
        it and float32 on TPU; in full space float32.
      seed: of the sketches.
      exact_every: steps from one truncation with a new sketch to the next, in core space and once
        a layer has settled at the end rank; 1 is as published, which full space always is.

    Example:
      >>> SpectralDeTuning(rank=16).steps
      300
    """

    rank: int
    steps: int = 300
    schedule: RankSchedule = RankSchedule()
    space: Literal["core", "full"] = "full"
    precision: linalg.Precision = "auto"
    seed: int = 0
    exact_every: int = 10

    def __post_init__(self) -> None:
        """Refuses values that no run can have."""
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.rank < self.schedule.start_rank:
            raise ValueError(
                f"rank must be at least the schedule's start_rank {self.schedule.start_rank}, "
                f"got {self.rank}"
            )
        if self.space not in ("core", "full"):
            raise ValueError(f"space is core or full, got {self.space!r}")
        if self.exact_every < 1:
            raise ValueError(f"exact_every must be at least 1, got {self.exact_every}")
        linalg.resolve_dtype(self.precision)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the iteration and of everything it returns."""
        if self.space == "full" and self.precision == "auto":
            return jnp.dtype("float32")
        return linalg.resolve_dtype(self.precision)


class SpectralSolution(NamedTuple):
    """Layers, solved: the base and the updates as left @ core @ right^T.

    ``left`` or ``right`` (the one of the longer side) has orthonormal columns, the other carries
    the size; ``core`` is the identity up to the rank of the last step and zero past it.
    """

    base: Float[Array, "layer row col"]
    left: Float[Array, "layer model row rank"]
    core: Float[Array, "layer model rank rank"]
    right: Float[Array, "layer model col rank"]
    ranks: Int[Array, "layer model"]
    loss: Float[Array, "layer step"]
    rank_history: Int[Array, "layer step"]
    residual_ratio: Float[Array, " layer"]


def gaussian_draw(seed: int, side: int, rank: int) -> Draw:
    """Independent Gaussian sketches [side, rank], float32, by step and model."""

    def draw(step: Array, model: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), model)
        return jax.random.normal(key, (side, rank), jnp.float32)

    return draw


def solve(
    stack: Float[AnyArray, "layer model row col"],
    solver: SpectralDeTuning,
    draw: Draw | None = None,
    batch_size: int = 1,
) -> SpectralSolution:
    """Runs the solver on same-shaped layers; pure: works under jit, vmap and shard_map.

    Args:
      stack: merged weights as stored, float32, float16 or bfloat16; two models or more.
      solver: the hyperparameters; static.
      draw: sketches of full size instead of the solver's own, static; in core space they are
        brought to the core with its basis, so both spaces then follow the same path.
      batch_size: layers whose full-size passes (basis, residual, base) are worked on at a time.

    Returns:
      The solution. Floating arrays are in ``solver.dtype`` but for the loss, float32: trace in
      ``linalg.scope(solver.dtype)``.

    Raises:
      ValueError: fewer than two models, or a rank above the smaller side.

    Example:
      >>> import functools
      >>> from jdetune import synth
      >>> stack = synth.family(n_models=4, row=40, col=32, rank=2).merged[None]
      >>> solver = SpectralDeTuning(rank=2, steps=60, schedule=RankSchedule(patience=3))
      >>> with linalg.scope(solver.dtype):
      ...     found = jax.jit(functools.partial(solve, solver=solver))(stack)
      ...     print(found.base.shape, found.rank_history[0, 0], found.rank_history[0, -1])
      (1, 40, 32) 1 2
    """
    _, n_models, row, col = stack.shape
    if n_models < 2:
        raise ValueError(f"the stack needs at least two models, got {n_models}")
    if solver.rank > min(row, col):
        raise ValueError(f"rank {solver.rank} exceeds the smaller side of [{row}, {col}]")
    with linalg.scope(solver.dtype):
        stack = jnp.asarray(stack)
        every = 1 if solver.space == "full" else solver.exact_every
        plan = Plan(solver.rank, solver.steps, solver.schedule, row * col, row < col, every)
        if solver.space == "full":
            found = _solve_full(stack, solver, plan, draw)
        else:
            found = _solve_core(stack, solver, plan, draw, batch_size)
        return _solution(stack, solver, *found)


def _solve_full(
    stack: Array, solver: SpectralDeTuning, plan: Plan, draw: Draw | None
) -> tuple[Array, Factors, Array, Array]:
    """Base, updates, losses and ranks, from the weights themselves."""
    n_layers, _, row, col = stack.shape
    draw = draw or gaussian_draw(solver.seed, min(row, col), solver.rank)
    zero = jnp.zeros((n_layers,), solver.dtype)
    problem = Problem(stack.astype(solver.dtype), zero, None)
    last, loss, ranks = iterate(problem, draw, plan)
    return last.estimate, last.factors, loss, ranks


def _solve_core(
    stack: Array, solver: SpectralDeTuning, plan: Plan, draw: Draw | None, batch_size: int
) -> tuple[Array, Factors, Array, Array]:
    """Base, updates, losses and ranks, by way of the cores."""
    _, n_models, row, col = stack.shape
    widths = core.core_widths(n_models, solver.rank, row, col)

    def enter(weights: Array) -> tuple[core.CoreBasis, Array, Array]:
        basis = core.joint_basis(weights, widths, solver.dtype)
        cores = core.to_core(weights, basis)
        return basis, cores, core.outside_residual(weights, basis, cores)

    basis, cores, outside = linalg.map_batched(enter, stack, batch_size)
    if draw is None:
        problem = Problem(cores, outside, None)
        draw = gaussian_draw(solver.seed, cores.shape[2 if plan.transposed else 3], solver.rank)
    else:
        problem = Problem(cores, outside, basis.left if plan.transposed else basis.right)
    last, loss, ranks = iterate(problem, draw, plan)

    def leave(operands: tuple[Array, core.CoreBasis, Factors]) -> tuple[Array, Factors]:
        weights, basis, factors = operands
        mean_update = linalg.contract("mlr,mkr->lk", *factors) / n_models
        base = core.base_from_core(weights, basis, mean_update)
        full = Factors(
            linalg.contract("sl,mlr->msr", basis.left, factors.left),
            linalg.contract("sk,mkr->msr", basis.right, factors.right),
        )
        return base, full

    base, factors = linalg.map_batched(leave, (stack, basis, last.factors), batch_size)
    return base, factors, loss, ranks


def _solution(
    stack: Array,
    solver: SpectralDeTuning,
    base: Array,
    factors: Factors,
    loss: Array,
    ranks: Array,
) -> SpectralSolution:
    n_layers, n_models = stack.shape[:2]
    last_rank = jnp.broadcast_to(ranks[:, -1:], (n_layers, n_models))
    active = jnp.arange(solver.rank, dtype=jnp.int32) < last_rank[..., None]
    identity = jnp.eye(solver.rank, dtype=solver.dtype)
    return SpectralSolution(
        base=base,
        left=factors.left,
        core=jnp.where(active[..., None], identity, 0),
        right=factors.right,
        ranks=last_rank,
        loss=loss,
        rank_history=ranks,
        residual_ratio=_residual_ratio(stack, loss[:, -1], solver.dtype),
    )


def _residual_ratio(stack: Array, loss: Array, dtype: jnp.dtype) -> Array:
    """Rms of the residual over that of the rounding error, per layer; 1 explains everything."""
    n_models = stack.shape[1]

    def noise(weights: Array) -> Array:
        return linalg.sum_models(jnp.mean(jnp.square(ulp(weights).astype(dtype)), axis=(1, 2)))

    variance = linalg.map_batched(noise, stack, 1) / (12 * n_models)
    expected = jnp.maximum(variance * (n_models - 1) / n_models, 1e-37)
    return jnp.sqrt(loss.astype(dtype) / expected)
