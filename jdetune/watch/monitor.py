"""A monitor: the range of cosines seen in calibration, and what lies outside of it.

Activations are ``[sample, token, layer, width]`` from any framework, at the places that
`Directions.places` names. Of each input only the least and greatest cosine with each direction
over its tokens counts (`Extremes`), apart for tokens given (user) and generated (assistant).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from jdetune.linalg import contract
from jdetune.types import Array
from jdetune.watch.directions import Directions

#: Roles of tokens, in the order of the role axis.
ROLES = ("user", "assistant")
#: How far outside of the range a cosine must lie; the paper's.
MARGIN = 0.01


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extremes:
    """Least and greatest cosine of every input with every direction, by role.

    Attributes:
      low: [sample, role, layer, slot]; +inf where there is no token of this role or no direction.
      high: likewise; -inf.
    """

    low: Float[Array, "sample role layer slot"]
    high: Float[Array, "sample role layer slot"]

    def __len__(self) -> int:
        """Number of inputs."""
        return self.low.shape[0]

    def __getitem__(self, part: slice) -> "Extremes":
        """Some of the inputs."""
        return Extremes(self.low[part], self.high[part])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Monitor:
    """Calibrated ranges; a pytree of arrays.

    Attributes:
      directions: what is watched.
      low: [role, layer, slot], least cosine of the calibration; +inf where there was none.
      high: greatest; -inf.
      samples: [role], inputs that the range is from.
      left_out: [role], samples that were trimmed at each end.
      tested: inputs that were tested before they were added.
      alarms: how many of those were flagged.
      margin: how far outside a cosine must lie.
    """

    directions: Directions
    low: Float[Array, "role layer slot"]
    high: Float[Array, "role layer slot"]
    samples: Int[Array, " role"]
    left_out: Int[Array, " role"]
    tested: Int[Array, ""]
    alarms: Int[Array, ""]
    margin: Float[Array, ""]


def new_monitor(directions: Directions, margin: float = MARGIN) -> Monitor:
    """A monitor that has seen nothing yet, and so flags everything.

    Args:
      directions: what to watch.
      margin: how far outside of the range a cosine must lie; the paper's is 0.01.
    """
    if not margin >= 0:
        raise ValueError(f"margin is 0 or more, got {margin}")
    shape = (len(ROLES), *directions.values.shape)
    zero, roles = jnp.int32(0), jnp.zeros(len(ROLES), jnp.int32)
    low = jnp.full(shape, jnp.inf, jnp.float32)
    return Monitor(directions, low, -low, roles, roles, zero, zero, jnp.float32(margin))


def cosines(
    directions: Directions, activations: Float[Array, "sample token layer width"]
) -> Float[Array, "sample token layer slot"]:
    """Cosine of every activation with every direction; 0 where there is no direction.

    Args:
      directions: what to watch.
      activations: at the directions' places; neither centred nor normed.
    """
    x = jnp.asarray(activations)
    along = contract("btlw,lsw->btls", x, jnp.asarray(directions.vectors))
    length = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
    return along / jnp.maximum(length, 1e-12)


def _by_role(
    valid: Bool[Array, "sample token"], answer: Bool[Array, "sample token"] | None
) -> Bool[Array, "sample role token"]:
    """Which tokens belong to which role."""
    valid = jnp.asarray(valid)
    given = jnp.zeros_like(valid) if answer is None else jnp.asarray(answer)
    return jnp.stack([valid & ~given, valid & given], axis=1)


@jax.jit
def extremes(
    directions: Directions,
    activations: Float[Array, "sample token layer width"],
    valid: Bool[Array, "sample token"],
    answer: Bool[Array, "sample token"] | None = None,
) -> Extremes:
    """What a monitor looks at: least and greatest cosine over the tokens of each role.

    Args:
      directions: what to watch.
      activations: at the directions' places.
      valid: False where there is only padding.
      answer: True for generated tokens; all are given ones if None.
    """
    found = cosines(directions, activations)[:, None]
    counts = _by_role(valid, answer)[..., None, None] & jnp.asarray(directions.valid)
    low = jnp.min(jnp.where(counts, found, jnp.inf), axis=2)
    return Extremes(low, jnp.max(jnp.where(counts, found, -jnp.inf), axis=2))


@jax.jit
def excess(monitor: Monitor, seen: Extremes) -> Float[Array, "sample role layer slot"]:
    """How far each input lies outside of the calibrated range; negative inside.

    Args:
      monitor: calibrated.
      seen: of the inputs.

    Returns:
      The greater of both ends; -inf where there is nothing to look at.
    """
    there = jnp.asarray(seen.high) >= jnp.asarray(seen.low)
    return jnp.where(there, jnp.maximum(seen.high - monitor.high, monitor.low - seen.low), -jnp.inf)


@jax.jit
def flag(monitor: Monitor, seen: Extremes) -> Bool[Array, " sample"]:
    """Inputs of which any direction leaves its range by more than the margin.

    A role that was never calibrated has no range: all of its tokens are outside.

    Args:
      monitor: calibrated.
      seen: of the inputs.
    """
    return jnp.any(excess(monitor, seen) > monitor.margin, axis=(1, 2, 3))


@jax.jit
def observe(monitor: Monitor, seen: Extremes) -> tuple[Monitor, Bool[Array, " sample"]]:
    """Calibrates on further inputs, in order: each is tested, then widens the range.

    The same as one input after another, in one pass.

    Args:
      monitor: so far.
      seen: of inputs that are taken to be harmless.

    Returns:
      The monitor after them, and which were flagged before they were added. Inputs of a role that
      had no range yet are neither tested nor flagged by it.
    """
    present = jnp.any(seen.high >= seen.low, axis=(2, 3))  # [sample, role]
    one = present.astype(jnp.int32)
    before = monitor.samples + jnp.cumsum(one, axis=0) - one
    low = _before(monitor.low, seen.low, lax.cummin)
    high = _before(monitor.high, seen.high, lax.cummax)
    known = (present & (before > 0))[:, :, None, None]
    beyond = jnp.maximum(seen.high - high[:-1], low[:-1] - seen.low)
    flagged = jnp.any(known & (seen.high >= seen.low) & (beyond > monitor.margin), axis=(1, 2, 3))
    tested = jnp.sum(jnp.any(known, axis=(1, 2, 3)), dtype=jnp.int32)
    after = dataclasses.replace(
        monitor,
        low=low[-1],
        high=high[-1],
        samples=monitor.samples + jnp.sum(one, axis=0),
        tested=monitor.tested + tested,
        alarms=monitor.alarms + jnp.sum(flagged, dtype=jnp.int32),
    )
    return after, flagged


def _before(start: Array, values: Array, running) -> Array:
    """Running extremes before each sample, and after the last."""
    return running(jnp.concatenate([start[None], values]), axis=0)


def pooled(monitor: Monitor) -> Monitor:
    """A monitor whose roles share one range, for calibrations that had one role only."""
    low, high = jnp.min(monitor.low, axis=0), jnp.max(monitor.high, axis=0)
    samples, shape = jnp.max(monitor.samples), monitor.low.shape
    return dataclasses.replace(
        monitor,
        low=jnp.broadcast_to(low, shape),
        high=jnp.broadcast_to(high, shape),
        samples=jnp.broadcast_to(samples, (len(ROLES),)),
        left_out=jnp.broadcast_to(jnp.max(monitor.left_out), (len(ROLES),)),
    )


@jax.jit
def token_excess(
    monitor: Monitor,
    activations: Float[Array, "sample token layer width"],
    valid: Bool[Array, "sample token"],
    answer: Bool[Array, "sample token"] | None = None,
) -> Float[Array, "sample token layer slot"]:
    """How far each token lies outside of the range of its role; -inf for padding.

    Args:
      monitor: calibrated.
      activations: at the directions' places.
      valid: False where there is only padding.
      answer: True for generated tokens; all are given ones if None.
    """
    found = cosines(monitor.directions, activations)[:, None]
    counts = _by_role(valid, answer)[..., None, None] & jnp.asarray(monitor.directions.valid)
    beyond = jnp.maximum(found - monitor.high[:, None], monitor.low[:, None] - found)
    return jnp.max(jnp.where(counts, beyond, -jnp.inf), axis=1)
