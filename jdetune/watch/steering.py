"""Steering: directions that left their range are projected out, for the rest of the sequence."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jdetune.linalg import contract
from jdetune.models.generation import Generated, generate
from jdetune.models.hooks import Place
from jdetune.models.llama import Llama
from jdetune.models.params import Params
from jdetune.watch.monitor import Monitor, cosines

#: Of a direction that earlier ones already span, less than this is left.
_DEPENDENT = 1e-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steered:
    """State of steering.

    Attributes:
      monitor: its ranges.
      out: [batch, layer, slot], directions that are projected out from now on.
    """

    monitor: Monitor
    out: Bool[Array, "batch layer slot"]


@dataclasses.dataclass(frozen=True)
class Steer:
    """An edit for `jdetune.models.run` and `generate`; equal ones share a compiled program.

    At each place the tokens are tested; a direction that leaves the range of its role is taken out
    of all of the sequence's tokens that are looked at then and later. What is left is the
    orthogonal projection onto the complement of the directions that are out, all at once: the
    paper's code takes one after another, and as they are not orthogonal some of each comes back.

    Attributes:
      places: of the directions.
    """

    places: tuple[tuple[str, int], ...]

    def __call__(self, x: Array, place: Place, state: Steered) -> tuple[Array, Steered]:
        """Tests and projects one activation [batch, token, width]."""
        if (place.kind, place.layer) not in self.places:
            return x, state
        layer = self.places.index((place.kind, place.layer))
        monitor, role = state.monitor, int(place.answer)
        here = jax.tree.map(lambda part: part[layer : layer + 1], monitor.directions)
        found = cosines(here, x[:, :, None])[:, :, 0]
        beyond = jnp.maximum(found - monitor.high[role, layer], monitor.low[role, layer] - found)
        fired = (beyond > monitor.margin) & place.valid[..., None] & here.valid[0]
        now = state.out[:, layer] | jnp.any(fired, axis=1)
        x = lax.cond(jnp.any(now), project_out, lambda x, *_: x, x, here.vectors[0], now)
        return x, dataclasses.replace(state, out=jnp.asarray(state.out).at[:, layer].set(now))


def project_out(
    x: Float[Array, "batch token width"],
    vectors: Float[Array, "slot width"],
    out: Bool[Array, "batch slot"],
) -> Float[Array, "batch token width"]:
    """Activations without the span of some directions.

    Args:
      x: activations.
      vectors: unit vectors, not orthogonal to each other.
      out: which of them to take out of which sequence.
    """
    basis = jax.vmap(_basis, in_axes=(None, 0))(vectors, out)
    for _ in range(2):  # once more takes out the rounding of the first
        x = x - contract("bts,bsw->btw", contract("btw,bsw->bts", x, basis), basis)
    return x


def _basis(vectors: Array, out: Array) -> Array:
    """Orthonormal rows that span the chosen vectors; zero rows for the others (Gram-Schmidt)."""

    def add(place: Array, basis: Array) -> Array:
        vector = vectors[place]
        for _ in range(2):
            vector = vector - contract("s,sw->w", contract("sw,w->s", basis, vector), basis)
        length = jnp.sqrt(jnp.sum(vector * vector))
        new = jnp.where(out[place] & (length > _DEPENDENT), vector / jnp.maximum(length, 1e-12), 0)
        return basis.at[place].set(new)

    return lax.fori_loop(0, vectors.shape[0], add, jnp.zeros_like(vectors))


def steered(monitor: Monitor, batch: int) -> dict[str, Any]:
    """Arguments ``edit`` and ``state`` that steer a model.

    Args:
      monitor: calibrated, at places of the model.
      batch: sequences.

    Example: ``generate(module, params, ids, new_tokens=8, **steered(monitor, len(ids)))``
    """
    shape = (batch, *monitor.directions.values.shape)
    state = Steered(monitor, jnp.zeros(shape, bool))
    return {"edit": Steer(monitor.directions.places), "state": state}


def steer(
    module: Llama, params: Params, monitor: Monitor, ids: Any, mask: Any = None, **options: Any
) -> Generated:
    """Generates with every flagged direction projected out, sticky per sequence.

    Args:
      module: a decoder.
      params: its weights, merged.
      monitor: calibrated on it.
      ids: prompts, [batch, token], padded on the left.
      mask: [batch, token], nonzero for tokens; no padding if None.
      **options: of `jdetune.models.generate`, at least ``new_tokens``.

    Returns:
      What was generated; ``state.out`` says which directions were taken out.

    Raises:
      ValueError: the monitor has no range for generated tokens.
    """
    if not int(monitor.samples[1]):
        raise ValueError(
            "the monitor saw no generated tokens; calibrate with answers, or take pooled(monitor)"
        )
    return generate(module, params, ids, mask, **options, **steered(monitor, len(ids)))
