"""The rank schedule of Spectral DeTuning ("increase on plateau") as a pure state machine.

Every operation is elementwise and branches are ``jnp.where``, so one state holds a scalar or one
entry a layer, and ``advance`` works under jit, vmap, scan and shard_map alike.

Source: Horwitz, Kahana, Hoshen, "Recovering the Pre-Fine-Tuning Weights of Generative Models"
(ICML 2024, arXiv 2402.10208), section on the rank scheduler, and its published code.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jdetune.types import Array as AnyArray


@dataclasses.dataclass(frozen=True)
class RankSchedule:
    """When the rank of the updates grows.

    Attributes:
      start_rank: rank of the first step.
      factor: what a plateau multiplies the rank by.
      patience: steps without a new best loss that are put up with; the next one is a plateau.
      force_end_rank_percent: share of the steps, at the end, that run at the end rank whatever
        the loss does.

    Example:
      >>> RankSchedule().patience
      15
    """

    start_rank: int = 1
    factor: int = 2
    patience: int = 15
    force_end_rank_percent: float = 0.5

    def __post_init__(self) -> None:
        """Refuses values that no schedule can have."""
        if self.start_rank < 1:
            raise ValueError(f"start_rank must be at least 1, got {self.start_rank}")
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")
        if self.patience < 0:
            raise ValueError(f"patience must be at least 0, got {self.patience}")
        if not 0 <= self.force_end_rank_percent <= 1:
            raise ValueError(
                "force_end_rank_percent is a share between 0 and 1, "
                f"got {self.force_end_rank_percent}"
            )


class RankState(NamedTuple):
    """State after ``step`` losses; ``rank`` is the one for the next step."""

    step: Int[Array, "*layer"]
    rank: Int[Array, "*layer"]
    best: Float[Array, "*layer"]
    bad_steps: Int[Array, "*layer"]


def init(
    schedule: RankSchedule, shape: tuple[int, ...] = (), dtype: jnp.dtype | type = jnp.float32
) -> RankState:
    """State before the first step.

    Args:
      schedule: the hyperparameters.
      shape: () for one layer, (layer,) for many.
      dtype: dtype in which losses are compared.

    Returns:
      Step 0, the start rank, a best loss of infinity and no bad steps; integers are int32.

    Example:
      >>> state = init(RankSchedule())
      >>> int(state.rank), float(state.best)
      (1, inf)
    """
    return RankState(
        step=jnp.zeros(shape, jnp.int32),
        rank=jnp.full(shape, schedule.start_rank, jnp.int32),
        best=jnp.full(shape, jnp.inf, dtype),
        bad_steps=jnp.zeros(shape, jnp.int32),
    )


def forced_from(
    schedule: RankSchedule, n_steps: int | Int[AnyArray, "..."]
) -> int | Int[AnyArray, "..."]:
    r"""First step (counted from 1) after which the rank is the end rank whatever the loss does.

    :math:`\lceil n - n f \rceil` with the forced share f, in float64 as Python computes it: a step
    is an integer, so comparing with the ceiling is comparing with the number itself.

    Example:
      >>> forced_from(RankSchedule(), 300), forced_from(RankSchedule(), 7)
      (150, 4)
    """
    share = schedule.force_end_rank_percent
    if isinstance(n_steps, int):
        return math.ceil(n_steps - n_steps * share)
    # XLA may fuse a product and a difference into one operation that rounds once, where Python
    # rounds twice. The products of the two halves of the share are exact below 2^26 steps, so
    # their sum is the rounded product either way.
    mantissa, exponent = math.frexp(share)
    high = math.ldexp(math.floor(math.ldexp(mantissa, 26)), exponent - 26)
    with jax.enable_x64(True):
        exact = jnp.asarray(n_steps).astype(jnp.float64)
        product = exact * high + exact * (share - high)
        return jnp.ceil(exact - product).astype(jnp.int32)


def advance(
    schedule: RankSchedule,
    end_rank: int | Int[AnyArray, "..."],
    n_steps: int | Int[AnyArray, "..."],
    state: RankState,
    loss: Float[AnyArray, "..."],
) -> RankState:
    """State after one more loss.

    Before the forced part a loss below the best (strictly; NaN is not below) becomes the best and
    clears the count of bad steps; any other loss adds one to it. A count above the patience
    multiplies the rank, up to ``end_rank``, and is cleared, at the end rank too. In the forced part
    the rank is ``end_rank``; best and count stay as they are.

    Args:
      schedule: the hyperparameters.
      end_rank: rank that is never exceeded; may be traced.
      n_steps: total number of steps of the run, below 2^26; may be traced.
      state: from ``init`` or ``advance``.
      loss: loss of the step that used ``state.rank``; compared in the dtype of ``state.best``.

    Returns:
      The next state; its ``rank`` is for the next step.

    Example:
      >>> import jax.numpy as jnp
      >>> schedule, ranks = RankSchedule(patience=0), []
      >>> state = init(schedule)
      >>> for loss in (1.0, 2.0, 0.5, 0.5):
      ...     state = advance(schedule, 16, 100, state, jnp.float32(loss))
      ...     ranks.append(int(state.rank))
      >>> ranks
      [1, 2, 2, 4]
    """
    end_rank = jnp.asarray(end_rank, jnp.int32)
    loss = jnp.asarray(loss).astype(state.best.dtype)
    step = state.step + 1
    forced = step >= forced_from(schedule, n_steps)

    better = loss < state.best
    bad_steps = jnp.where(better, 0, state.bad_steps + 1)
    plateau = bad_steps > schedule.patience
    grown = jnp.minimum(schedule.factor * state.rank, end_rank)
    return RankState(
        step=step,
        rank=jnp.where(forced, end_rank, jnp.where(plateau, grown, state.rank)),
        best=jnp.where(better & ~forced, loss, state.best),
        bad_steps=jnp.where(forced, state.bad_steps, jnp.where(plateau, 0, bad_steps)),
    )
