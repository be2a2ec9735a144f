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
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdetune import core, linalg, rank_schedule
from jdetune.noise import ulp
from jdetune.rank_schedule import RankSchedule
from jdetune.types import Array as AnyArray

#: (step from 0, model) to a Gaussian sketch [sketched side, rank] for the matrices of full size.
Draw = Callable[[Array, Array], Array]

#: Power steps of the randomized truncation.
POWER_STEPS = 2


@dataclasses.dataclass(frozen=True)
class SpectralDeTuning:
    """The paper's solver: needs the rank, and steps enough for its schedule.

    Attributes:
      rank: rank of every update, the end rank of the schedule.
      steps: steps of the iteration.
      schedule: how the rank grows.
      space: ``core`` iterates on small cores, ``full`` on the weights themselves.
      precision: dtype of the iteration. ``auto`` is, in core space, float64 where the hardware has
        it and float32 on TPU; in full space float32.
      seed: of the sketches.

    Example:
      >>> SpectralDeTuning(rank=16).steps
      300
    """

    rank: int
    steps: int = 300
    schedule: RankSchedule = RankSchedule()
    space: Literal["core", "full"] = "core"
    precision: linalg.Precision = "auto"
    seed: int = 0

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
    solver: SpectralDeTuning,
    n_elements: int,
    transposed: bool,
) -> tuple[Carry, Float[Array, ""]]:
    """One M-step, W-step and schedule step of one layer.

    Args:
      problem: the layer.
      carry: from the step before.
      sketches: a Gaussian matrix a model.
      solver: the hyperparameters.
      n_elements: elements of the weight matrix, which the loss is a mean over.
      transposed: whether the weight matrix is wider than tall.

    Returns:
      The next carry, and the loss with the new estimate, rounded to float32.
    """
    n_models = problem.data.shape[0]
    active = jnp.arange(solver.rank, dtype=jnp.int32) < carry.schedule.rank

    def one(stored: Array, sketch: Array) -> tuple[Array, Array]:
        return truncate(stored - carry.estimate, sketch, active, transposed)

    factors = Factors(*jax.vmap(one)(problem.data, sketches))
    updates = linalg.contract("mlr,mkr->mlk", *factors)
    estimate = sum_models(problem.data - updates) / n_models
    squares = jnp.square(problem.data - (estimate + updates))
    inside = jnp.sum(squares) / (n_models * n_elements)
    loss = (inside + problem.outside).astype(jnp.float32)
    state = rank_schedule.advance(solver.schedule, solver.rank, solver.steps, carry.schedule, loss)
    return Carry(estimate, factors, state), loss


def sum_models(values: Float[Array, "model ..."]) -> Float[Array, "..."]:
    """Sum over the leading axis, unrolled: XLA's reduction of a leading axis is slow on CPU."""
    total = values[0]
    for index in range(1, values.shape[0]):
        total = total + values[index]
    return total


def iterate(
    problem: Problem,
    draw: Draw,
    solver: SpectralDeTuning,
    n_elements: int,
    transposed: bool,
) -> tuple[Carry, Float[Array, "layer step"], Int[Array, "layer step"]]:
    """All steps of all layers in one scan.

    Args:
      problem: fields with a leading layer axis.
      draw: sketch of a step and model, shared by the layers.
      solver: the hyperparameters.
      n_elements: elements of a weight matrix.
      transposed: whether the weight matrices are wider than tall.

    Returns:
      The last carry, the loss of every step and the rank it used.
    """
    data = problem.data
    n_layers, n_models = data.shape[:2]
    models = jnp.arange(n_models, dtype=jnp.int32)

    def of_layer(layer: Problem, carry: Carry, sketches: Array) -> tuple[Carry, Array]:
        if layer.basis is not None:
            sketches = linalg.contract("sw,msr->mwr", layer.basis, sketches)
        return step_layer(layer, carry, sketches, solver, n_elements, transposed)

    def step(carry: Carry, index: Array) -> tuple[Carry, tuple[Array, Array]]:
        sketches = jax.vmap(lambda model: draw(index, model))(models).astype(data.dtype)
        after, loss = jax.vmap(of_layer, in_axes=(0, 0, None))(problem, carry, sketches)
        return after, (loss, carry.schedule.rank)

    start = Carry(
        estimate=jax.vmap(sum_models)(data) / n_models,
        factors=Factors(
            jnp.zeros_like(data, shape=(*data.shape[:3], solver.rank)),
            jnp.zeros_like(data, shape=(*data.shape[:2], data.shape[3], solver.rank)),
        ),
        schedule=jax.tree.map(
            lambda field: field + jnp.zeros_like(data, shape=(n_layers,), dtype=field.dtype),
            rank_schedule.init(solver.schedule, (n_layers,)),  # the sum varies as data do
        ),
    )
    last, (loss, ranks) = jax.lax.scan(step, start, jnp.arange(solver.steps, dtype=jnp.int32))
    return last, loss.T, ranks.T


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
        if solver.space == "full":
            return _solve_full(stack, solver, draw)
        return _solve_core(stack, solver, draw, batch_size)


def _solve_full(stack: Array, solver: SpectralDeTuning, draw: Draw | None) -> SpectralSolution:
    n_layers, _, row, col = stack.shape
    draw = draw or gaussian_draw(solver.seed, min(row, col), solver.rank)
    zero = jnp.zeros((n_layers,), solver.dtype)
    problem = Problem(stack.astype(solver.dtype), zero, None)
    last, loss, ranks = iterate(problem, draw, solver, row * col, row < col)
    return _solution(stack, solver, last.estimate, last.factors, loss, ranks)


def _solve_core(
    stack: Array, solver: SpectralDeTuning, draw: Draw | None, batch_size: int
) -> SpectralSolution:
    _, n_models, row, col = stack.shape
    transposed = row < col
    widths = core.core_widths(n_models, solver.rank, row, col)

    def enter(weights: Array) -> tuple[core.CoreBasis, Array, Array]:
        basis = core.joint_basis(weights, widths, solver.dtype)
        cores = core.to_core(weights, basis)
        return basis, cores, core.outside_residual(weights, basis, cores)

    basis, cores, outside = linalg.map_batched(enter, stack, batch_size)
    if draw is None:
        problem = Problem(cores, outside, None)
        draw = gaussian_draw(solver.seed, cores.shape[2 if transposed else 3], solver.rank)
    else:
        problem = Problem(cores, outside, basis.left if transposed else basis.right)
    last, loss, ranks = iterate(problem, draw, solver, row * col, transposed)

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
    return _solution(stack, solver, base, factors, loss, ranks)


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
        return sum_models(jnp.mean(jnp.square(ulp(weights).astype(dtype)), axis=(1, 2)))

    variance = linalg.map_batched(noise, stack, 1) / (12 * n_models)
    expected = jnp.maximum(variance * (n_models - 1) / n_models, 1e-37)
    return jnp.sqrt(loss.astype(dtype) / expected)
