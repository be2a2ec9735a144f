"""Greedy and sampled generation: one compiled loop over a static cache."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jdetune.models.hooks import Edit, Hooks
from jdetune.models.llama import Llama, empty_cache
from jdetune.models.lora import Adapter
from jdetune.models.params import Params
from jdetune.models.run import run

#: Prompts are padded to a multiple of this, so that few programs are compiled.
BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: the logits are divided by it.
      top_k: only so many likeliest tokens; all if None.
      top_p: then only the likeliest that together have this probability.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Refuses what cannot be drawn from."""
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or (self.top_k or 1) < 1:
            raise ValueError(f"temperature and top_k above 0, top_p in (0, 1]; got {self}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What was generated.

    Attributes:
      tokens: [batch, new], int32; padding after the end.
      lengths: [batch], tokens up to and with the end.
      state: the edit's state at the end.
    """

    tokens: Any
    lengths: Any
    state: Any = None


def generate(
    module: Llama,
    params: Params,
    ids: Any,
    mask: Any = None,
    *,
    new_tokens: int,
    end: tuple[int, ...] = (),
    pad: int = 0,
    sampling: Sampling | None = None,
    key: Array | None = None,
    lora: Adapter | None = None,
    edit: Edit | None = None,
    state: Any = None,
) -> Generated:
    """Continues prompts; stops when all texts have ended.

    Args:
      module: a decoder.
      params: its weights.
      ids: prompts, [batch, token], padded on the left.
      mask: [batch, token], nonzero for tokens; no padding if None.
      new_tokens: at most so many.
      end: ids that end a text.
      pad: id that follows the end.
      sampling: how to draw; the likeliest token each time if None.
      key: random key, needed for sampling.
      lora: factors to run with.
      edit: changes activations (`hooks`); ``Place.answer`` is False for the prompt.
      state: the edit's first state.

    Returns:
      New tokens, their number, and the edit's state.

    Raises:
      ValueError: a prompt is empty or ends in padding, or the key is missing.
    """
    ids = np.asarray(ids, np.int32)
    mask = np.ones(ids.shape, bool) if mask is None else np.asarray(mask) != 0
    if new_tokens < 1 or not mask.size or not mask[:, -1].all():
        raise ValueError("prompts are padded on the left and have a token; new_tokens is 1 or more")
    if sampling is not None and key is None:
        raise ValueError("sampling needs a key, such as jax.random.key(0)")
    extra = ((0, 0), (-ids.shape[1] % BUCKET, 0))
    ids, mask = np.pad(ids, extra), np.pad(mask, extra)
    key = jax.random.key(0) if key is None else key
    ends, pad_id = np.asarray(end, np.int32), np.int32(pad)
    return _generate(
        module, params, lora, ids, mask, key, state, ends, pad_id, new_tokens, sampling, edit
    )


@partial(jax.jit, static_argnums=(0, 9, 10, 11))
def _generate(
    module: Llama,
    params: Params,
    lora: Adapter | None,
    ids: Any,
    mask: Any,
    key: Array,
    state: Any,
    end: Any,
    pad: Any,
    new_tokens: int,
    sampling: Sampling | None,
    edit: Edit | None,
) -> Generated:
    batch, given = ids.shape
    cache = empty_cache(module.config, batch, given + new_tokens - 1)
    first = run(
        module, params, ids, mask, lora=lora, edit=edit, cache=cache, last=True, state=state
    )
    answering = module.clone(hooks=Hooks(answer=True))

    def ended(token: Array) -> Array:
        return jnp.any(token[..., None] == end, axis=-1)

    def draw(logits: Array, step: Array) -> Array:
        return pick(logits[:, -1], sampling, jax.random.fold_in(key, step))

    def body(carry: Any) -> Any:
        step, tokens, done, cache, state = carry
        before = lax.dynamic_slice_in_dim(tokens, step - 1, 1, axis=1)
        out = run(
            answering, params, before, lora=lora, edit=edit, cache=cache, last=True, state=state
        )
        token = jnp.where(done, pad, draw(out.logits, step))
        tokens = lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
        return step + 1, tokens, done | ended(token), out.cache, out.state

    def unfinished(carry: Any) -> Array:
        step, _, done, _, _ = carry
        return (step < new_tokens) & ~jnp.all(done)

    token = draw(first.logits, jnp.int32(0))
    tokens = jnp.full((batch, new_tokens), pad, jnp.int32).at[:, 0].set(token)
    carry = (jnp.int32(1), tokens, ended(token), first.cache, first.state)
    step, tokens, _, _, state = lax.while_loop(unfinished, body, carry)
    ends = ended(tokens)  # padding may be an end too: the first one counts
    reached = jnp.argmax(ends, axis=1) + 1
    lengths = jnp.where(jnp.any(ends, axis=1), reached, jnp.minimum(step, new_tokens))
    return Generated(tokens, lengths.astype(jnp.int32), state)


def pick(logits: Float[Array, "b vocabulary"], sampling: Sampling | None, key: Array) -> Array:
    """Next tokens: the likeliest, or drawn.

    Args:
      logits: of the next token.
      sampling: how to draw; the likeliest if None.
      key: random key.

    Returns:
      [batch], int32.
    """
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        chance = jax.nn.softmax(ordered, axis=-1)
        kept = jnp.cumsum(chance, axis=-1) - chance < sampling.top_p  # what comes before is less
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)
