"""Llama-type decoders: grouped-query attention, rotary positions, RMSNorm, SwiGLU."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jdetune.models.config import LlamaConfig
from jdetune.models.hooks import Hooks, Trace, stack_taps
from jdetune.models.layers import Embedding, Linear, RMSNorm, activation, attend, split_heads
from jdetune.models.output import Cache, Output
from jdetune.models.rotary import frequencies, rotate

#: A layer's buffers of keys and values, and where the new ones go.
Slot = tuple[Array, Array, Array]


class LlamaBlock(nn.Module):
    """Attention and MLP, each with its RMSNorm before."""

    config: LlamaConfig
    index: int
    hooks: Hooks = Hooks()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t width"],
        positions: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        allowed: Bool[Array, "b t s"],
        slot: Slot | None,
        trace: Trace,
    ) -> tuple[Float[Array, "b t width"], tuple[Array, Array], Trace]:
        """One block; returns the keys and values of all tokens so far, too."""
        c, at = self.config, self.index
        y = RMSNorm(c.rms_norm_eps, name="input_layernorm")(x)
        heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
        query, key, value = (
            split_heads(
                Linear(n * c.head_dim, c.attention_bias, name=f"self_attn.{part}_proj")(y), n
            )
            for part, n in heads.items()
        )
        angles = frequencies(c)
        query, key = rotate(query, positions, angles), rotate(key, positions, angles)
        if slot is not None:
            keys, values, place = slot
            key = lax.dynamic_update_slice_in_dim(keys, key, place, axis=1)
            value = lax.dynamic_update_slice_in_dim(values, value, place, axis=1)
        y = attend(query, key, value, allowed)
        y = Linear(c.hidden_size, c.attention_bias, name="self_attn.o_proj")(y)
        y, trace = self.hooks.visit(y, "attention", at, valid, trace)
        x = x + y
        y = RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x)
        gate = Linear(c.intermediate_size, c.mlp_bias, name="mlp.gate_proj")(y)
        up = Linear(c.intermediate_size, c.mlp_bias, name="mlp.up_proj")(y)
        inner = activation(c.hidden_act)(gate) * up
        y = Linear(c.hidden_size, c.mlp_bias, name="mlp.down_proj")(inner)
        y, trace = self.hooks.visit(y, "mlp", at, valid, trace)
        x, trace = self.hooks.visit(x + y, "residual", at + 1, valid, trace)
        return x, (key, value), trace


class Llama(nn.Module):
    """A decoder with its output head.

    Attributes:
      config: sizes.
      hooks: what to record and change.
      remat: compute activations again for the gradient instead of keeping them.
    """

    config: LlamaConfig
    hooks: Hooks = Hooks()
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b t"],
        mask: Array | None = None,
        cache: Cache | None = None,
        last: bool = False,
        state: object = None,
    ) -> Output:
        """Predicts each next token.

        Positions count tokens, not padding, so padding may stand left or right.

        Args:
          ids: token ids.
          mask: [batch, token], nonzero for tokens and zero for padding; no padding if None.
          cache: what came before; the tokens are added to it.
          last: logits of the last token only.
          state: the edit's state.

        Returns:
          Output: hidden states, logits [batch, token, vocabulary], the cache with the tokens.
        """
        c = self.config
        valid = jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)
        positions, allowed, every = _places(valid, cache)
        embed = Embedding(c.vocab_size, c.hidden_size, name="model.embed_tokens")
        x, trace = self.hooks.visit(embed(ids), "residual", 0, valid, Trace(state, {}))
        seen, block = [trace.seen], nn.remat(LlamaBlock) if self.remat else LlamaBlock
        pairs = []
        for i in range(c.num_hidden_layers):
            layer = block(c, i, self.hooks, name=f"model.layers.{i}")
            slot = None if cache is None else (cache.keys[i], cache.values[i], cache.filled)
            x, pair, trace = layer(x, positions, valid, allowed, slot, Trace(trace.state, {}))
            seen.append(trace.seen)
            pairs.append(pair)
        x = RMSNorm(c.rms_norm_eps, name="model.norm")(x)
        final = x[:, -1:] if last else x
        if c.tie_word_embeddings:
            logits = embed.attend(final)
        else:
            logits = Linear(c.vocab_size, bias=False, name="lm_head")(final)
        if cache is not None:
            keys, values = zip(*pairs, strict=True)
            cache = Cache(keys, values, every, cache.filled + ids.shape[1])
        return Output(x, logits, stack_taps(seen), trace.state, cache)

    @staticmethod
    def example() -> tuple[Array, ...]:
        """The smallest input, to find the parameters' shapes with."""
        return (jnp.zeros((1, 1), jnp.int32),)


def empty_cache(config: LlamaConfig, batch: int, length: int) -> Cache:
    """A cache for so many tokens.

    Args:
      config: of the decoder.
      batch: texts.
      length: tokens that fit in, padding included.
    """
    shape = (batch, length, config.num_key_value_heads, config.head_dim)
    keys, values = (
        tuple(jnp.zeros(shape, jnp.float32) for _ in range(config.num_hidden_layers))
        for _ in range(2)
    )
    return Cache(keys, values, jnp.zeros((batch, length), bool), jnp.int32(0))


def _places(valid: Array, cache: Cache | None) -> tuple[Array, Array, Array]:
    """Positions [b, t], which keys each token may see [b, t, s], and which keys are tokens."""
    positions = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    number, every = jnp.arange(valid.shape[1]), valid
    if cache is not None:
        positions = positions + jnp.sum(cache.valid, axis=1, dtype=jnp.int32)[:, None]
        number = number + cache.filled
        every = lax.dynamic_update_slice_in_dim(cache.valid, valid, cache.filled, axis=1)
    before = jnp.arange(every.shape[1])[None] <= number[:, None]
    return jnp.maximum(positions, 0), before[None] & every[:, None, :], every
