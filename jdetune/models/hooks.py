"""Looking at activations and changing them on the way: taps and edits.

Every model calls `Hooks.visit` at the same places, so one monitor works on all of them:

| kind | what is there | layers |
|---|---|---|
| residual | embeddings, then the residual stream after each block | 0 to L |
| attention | output of the matrix that ends attention, before anything is added | 0 to L-1 |
| mlp | output of the matrix that ends the MLP, before anything is added | 0 to L-1 |
| sum | BERT only: what the block's last LayerNorm is given | 0 to L-1 |

"residual" is transformers' ``hidden_states``, but for the last one of models with a final norm:
here it is what the norm is given.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import Array

KINDS = ("residual", "attention", "mlp", "sum")


class Place(NamedTuple):
    """Where an activation is.

    Attributes:
      kind: one of `KINDS`.
      layer: as the table above counts.
      valid: [batch, token], False where there is only padding.
      answer: whether the tokens are being generated; False for those given.
    """

    kind: str
    layer: int
    valid: Array
    answer: bool


#: (activations [batch, token, width], place, state) to new activations and state. Kind and layer
#: are known when the model is traced: an edit that returns its input there costs nothing.
Edit: TypeAlias = Callable[[Array, Place, Any], tuple[Array, Any]]


class Trace(NamedTuple):
    """What goes along with the residual stream.

    Attributes:
      state: the edit's own pytree.
      seen: kind to activations.
    """

    state: Any
    seen: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What to record and what to change; static, so a new one compiles anew.

    Attributes:
      taps: kinds to record, after the edit.
      edit: pure function that sees and changes every activation of the table.
      answer: what `Place.answer` says.
    """

    taps: tuple[str, ...] = ()
    edit: Edit | None = None
    answer: bool = False

    def __post_init__(self) -> None:
        """Refuses taps that are not there."""
        unknown = set(self.taps) - set(KINDS)
        if unknown:
            raise ValueError(f"taps are of {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")

    def visit(
        self, x: Array, kind: str, layer: int, valid: Array, trace: Trace
    ) -> tuple[Array, Trace]:
        """Edits and records one activation.

        Args:
          x: [batch, token, width].
          kind: one of `KINDS`.
          layer: as the table above counts.
          valid: [batch, token].
          trace: state and records so far.

        Returns:
          The activation that the model goes on with, and the trace.
        """
        state, seen = trace
        if self.edit is not None:
            x, state = self.edit(x, Place(kind, layer, valid, self.answer), state)
        if kind in self.taps:
            seen = {**seen, kind: x}
        return x, Trace(state, seen)


def stack_taps(seen: list[dict[str, Array]]) -> dict[str, Array]:
    """Records of all blocks by kind, each [layer, batch, token, width]."""
    kinds = {kind: None for one in seen for kind in one}
    return {kind: jnp.stack([one[kind] for one in seen if kind in one]) for kind in kinds}
