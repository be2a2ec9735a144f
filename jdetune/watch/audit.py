"""Audit: for every direction the inputs with extreme cosine, and whether they share a topic."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from jdetune.types import Array
from jdetune.watch.directions import Directions
from jdetune.watch.monitor import Extremes

#: Ends of a direction, in the order of the end axis.
ENDS = ("lowest", "highest")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Leaders:
    """The inputs with the most extreme cosines so far; best first, places not filled have -inf.

    Attributes:
      scores: [end, layer, slot, place]; cosines, negated at the low end.
      samples: numbers of the inputs.
      seen: inputs so far.
    """

    scores: Float[Array, "end layer slot place"]
    samples: Int[Array, "end layer slot place"]
    seen: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One end of one direction.

    Attributes:
      direction: in words.
      layer: place on the layer axis.
      slot: place on the slot axis.
      end: "lowest" or "highest".
      samples: numbers of the inputs, most extreme first.
      cosines: theirs.
      precision: share of them that are of a known topic; None if none is known.
      topic: the commonest topic among them; None if none is known.
      topic_share: its share.
    """

    direction: str
    layer: int
    slot: int
    end: str
    samples: tuple[int, ...]
    cosines: tuple[float, ...]
    precision: float | None = None
    topic: str | None = None
    topic_share: float | None = None


def no_leaders(directions: Directions, count: int = 10) -> Leaders:
    """Leaders of no inputs.

    Args:
      directions: what is audited.
      count: inputs to keep at each end.
    """
    shape = (len(ENDS), *directions.values.shape, count)
    return Leaders(
        jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, -1, jnp.int32), jnp.int32(0)
    )


@jax.jit
def lead(leaders: Leaders, seen: Extremes) -> Leaders:
    """Leaders after further inputs, over both roles.

    Args:
      leaders: so far.
      seen: of the inputs, numbered on from those before.
    """
    low, high = jnp.min(seen.low, axis=1), jnp.max(seen.high, axis=1)  # over roles
    scores = jnp.moveaxis(jnp.stack([-low, high]), 1, -1)
    numbers = leaders.seen + jnp.arange(scores.shape[-1], dtype=jnp.int32)
    every = jnp.concatenate([leaders.scores, scores], axis=-1)
    whose = jnp.concatenate([leaders.samples, jnp.broadcast_to(numbers, scores.shape)], axis=-1)
    best, places = lax.top_k(every, leaders.scores.shape[-1])
    chosen = jnp.take_along_axis(whose, places, axis=-1)
    return Leaders(best, jnp.where(best > -jnp.inf, chosen, -1), numbers[-1] + 1)


def findings(
    directions: Directions,
    leaders: Leaders,
    wanted: Bool[np.ndarray, " sample"] | None = None,
    topics: list[str] | None = None,
) -> list[Finding]:
    """Every end of every direction; strongest directions of the update first.

    Args:
      directions: what was audited.
      leaders: over all inputs.
      wanted: which inputs are of the topics that were trained, for precision@k.
      topics: topic of each input, for the commonest one.
    """
    values, found = np.asarray(directions.values), []
    order = sorted(np.argwhere(values > 0).tolist(), key=lambda place: -values[tuple(place)])
    for layer, slot in order:
        for number, end in enumerate(ENDS):
            scores = np.asarray(leaders.scores[number, layer, slot])
            kept = np.asarray(leaders.samples[number, layer, slot])[np.isfinite(scores)]
            scores = scores[np.isfinite(scores)]
            finding = Finding(
                directions.label(layer, slot),
                layer,
                slot,
                end,
                tuple(int(sample) for sample in kept),
                tuple(float(s if number else -s) for s in scores),
            )
            if wanted is not None and len(kept):
                share = float(np.mean(np.asarray(wanted)[kept]))
                finding = dataclasses.replace(finding, precision=share)
            if topics is not None and len(kept):
                own = [topics[sample] for sample in kept]
                commonest = max(dict.fromkeys(own), key=own.count)
                share = own.count(commonest) / len(own)
                finding = dataclasses.replace(finding, topic=commonest, topic_share=share)
            found.append(finding)
    return found


def precision_at(
    leaders: Leaders, wanted: Bool[np.ndarray, " sample"], k: int
) -> Float[np.ndarray, "end layer slot"]:
    """Share of the k most extreme inputs that are wanted; NaN where there are fewer.

    Args:
      leaders: over all inputs.
      wanted: which inputs count.
      k: at most as many as leaders keep.
    """
    if not 1 <= k <= leaders.scores.shape[-1]:
        raise ValueError(f"k is 1 to {leaders.scores.shape[-1]}, got {k}")
    samples = np.asarray(leaders.samples)[..., :k]
    share = np.mean(np.asarray(wanted)[np.maximum(samples, 0)], axis=-1)
    return np.where(np.all(samples >= 0, axis=-1), share, np.nan)
