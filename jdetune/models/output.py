"""What a forward pass returns."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, in buffers of fixed length.

    Attributes:
      keys: one array a layer, [batch, length, group, size].
      values: likewise.
      valid: [batch, length], False for padding and for what is not filled yet.
      filled: how many tokens are in it.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    valid: Any
    filled: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Activations of a forward pass.

    Attributes:
      hidden: [batch, token, width], after the final norm where there is one.
      logits: [batch, token, vocabulary] of a decoder, [batch, label] of a classifier, else None.
      taps: kind to [layer, batch, token, width], for the kinds asked for.
      state: the edit's state after the pass.
      cache: of a decoder that was given one.
    """

    hidden: Any
    logits: Any = None
    taps: dict[str, Any] = dataclasses.field(default_factory=dict)
    state: Any = None
    cache: Cache | None = None
