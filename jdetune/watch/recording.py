"""Activations and extremes of the project's Flax models, in batches; which token fired."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jdetune.models.bert import Bert
from jdetune.models.lora import Adapter
from jdetune.models.names import Model
from jdetune.models.params import Params
from jdetune.models.run import run
from jdetune.types import Array
from jdetune.watch.directions import Directions
from jdetune.watch.monitor import ROLES, Extremes, Monitor, extremes, token_excess


class Firing(NamedTuple):
    """A direction that left its range.

    Attributes:
      sample: number of the input.
      token: place of the token.
      role: "user" or "assistant".
      direction: in words.
      layer: place of the direction on the layer axis.
      slot: place on the slot axis.
      excess: cosine outside of the range.
    """

    sample: int
    token: int
    role: str
    direction: str
    layer: int
    slot: int
    excess: float


def natural_place(module: Model) -> str:
    """Where `directions` should look: after each block; in BERT before its last LayerNorm.

    That is where the sum is to which the matrices write.
    """
    return "sum" if isinstance(module, Bert) else "residual"


def record(
    module: Model,
    params: Params,
    *inputs: Any,
    directions: Directions,
    lora: Adapter | None = None,
) -> Float[Array, "sample token layer width"]:
    """Activations at the places of some directions; for use under ``jax.jit`` and ``jax.vmap``.

    Args:
      module: from `jdetune.models`.
      params: its weights.
      *inputs: ids and mask, or pixels.
      directions: say where.
      lora: factors to run with.
    """
    kinds = tuple(dict.fromkeys(kind for kind, _ in directions.places))
    taps = run(module, params, *inputs, lora=lora, taps=kinds).taps
    return jnp.stack([taps[kind][number] for kind, number in directions.places], axis=2)


@partial(jax.jit, static_argnums=0)
def model_extremes(
    module: Model,
    params: Params,
    directions: Directions,
    ids: Any,
    valid: Bool[Array, "sample token"],
    answer: Bool[Array, "sample token"] | None = None,
    lora: Adapter | None = None,
) -> Extremes:
    """What a monitor looks at, of a batch of token ids.

    Args:
      module: from `jdetune.models`.
      params: its weights.
      directions: what to watch.
      ids: [sample, token].
      valid: where they are tokens.
      answer: True for generated tokens; all are given ones if None.
      lora: factors to run with.
    """
    acts = record(module, params, ids, valid, directions=directions, lora=lora)
    return extremes(directions, acts, valid, answer)


def joined(parts: Iterable[Extremes]) -> Extremes:
    """Extremes of several batches as one, on the host."""
    found = list(parts)
    return Extremes(
        np.concatenate([np.asarray(part.low) for part in found]),
        np.concatenate([np.asarray(part.high) for part in found]),
    )


def firings(
    monitor: Monitor,
    activations: Float[Array, "sample token layer width"],
    valid: Bool[Array, "sample token"],
    answer: Bool[Array, "sample token"] | None = None,
) -> list[Firing]:
    """Which direction fired on which token, the furthest outside first.

    Args:
      monitor: calibrated.
      activations: at the directions' places.
      valid: False where there is only padding.
      answer: True for generated tokens; all are given ones if None.
    """
    beyond = np.asarray(token_excess(monitor, activations, valid, answer))
    given = np.zeros(beyond.shape[:2], bool) if answer is None else np.asarray(answer)
    found = [
        Firing(
            int(sample),
            int(token),
            ROLES[int(given[sample, token])],
            monitor.directions.label(int(layer), int(slot)),
            int(layer),
            int(slot),
            float(beyond[sample, token, layer, slot]),
        )
        for sample, token, layer, slot in np.argwhere(beyond > float(monitor.margin))
    ]
    return sorted(found, key=lambda firing: (firing.sample, -firing.excess))


def in_batches(
    function: Callable[..., Any], arrays: Sequence[np.ndarray], size: int
) -> Iterable[Any]:
    """Calls a function on batches of one height; what padding rows gave is cut off.

    Args:
      function: arrays [size, ...] to a pytree with the same leading axis.
      arrays: of equal length.
      size: rows in a batch.
    """
    for start in range(0, len(arrays[0]), size):
        part = [array[start : start + size] for array in arrays]
        rows = len(part[0])
        padded = [
            np.pad(a, ((0, size - rows), *((0, 0),) * (a.ndim - 1)), mode="edge") for a in part
        ]
        yield jax.tree.map(lambda leaf, rows=rows: leaf[:rows], function(*padded))
