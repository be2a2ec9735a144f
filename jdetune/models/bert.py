"""BERT, as sentence encoders such as all-MiniLM-L6-v2 use it; dropout is left out."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Bool, Float, Int

from jdetune.models.config import BertConfig
from jdetune.models.hooks import Hooks, Trace, stack_taps
from jdetune.models.layers import Embedding, LayerNorm, Linear, activation, attend, split_heads
from jdetune.models.output import Output


class BertBlock(nn.Module):
    """Attention and MLP, each with its LayerNorm after the sum."""

    config: BertConfig
    index: int
    hooks: Hooks = Hooks()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t width"], valid: Bool[Array, "b t"], trace: Trace
    ) -> tuple[Float[Array, "b t width"], Trace]:
        """One block."""
        c, at = self.config, self.index
        query, key, value = (
            split_heads(
                Linear(c.hidden_size, name=f"attention.self.{part}")(x), c.num_attention_heads
            )
            for part in ("query", "key", "value")
        )
        mixed = attend(query, key, value, valid[:, None, :])
        out = Linear(c.hidden_size, name="attention.output.dense")(mixed)
        out, trace = self.hooks.visit(out, "attention", at, valid, trace)
        x = LayerNorm(c.layer_norm_eps, name="attention.output.LayerNorm")(out + x)
        inner = activation(c.hidden_act)(Linear(c.intermediate_size, name="intermediate.dense")(x))
        out = Linear(c.hidden_size, name="output.dense")(inner)
        out, trace = self.hooks.visit(out, "mlp", at, valid, trace)
        total, trace = self.hooks.visit(out + x, "sum", at, valid, trace)
        x = LayerNorm(c.layer_norm_eps, name="output.LayerNorm")(total)
        return self.hooks.visit(x, "residual", at + 1, valid, trace)


class Bert(nn.Module):
    """A BERT encoder, with a classification head if the config has labels.

    Attributes:
      config: sizes.
      hooks: what to record and change.
      remat: compute activations again for the gradient instead of keeping them.
    """

    config: BertConfig
    hooks: Hooks = Hooks()
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b t"],
        mask: Array | None = None,
        segments: Array | None = None,
        state: object = None,
    ) -> Output:
        """Encodes token ids.

        Args:
          ids: token ids.
          mask: [batch, token], nonzero for tokens and zero for padding; no padding if None.
          segments: [batch, token], BERT's token types; zero if None.
          state: the edit's state.

        Returns:
          Output: hidden states, logits if there is a head.
        """
        c = self.config
        valid = jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)
        segments = jnp.zeros_like(ids) if segments is None else segments
        places = jnp.arange(ids.shape[1])[None]
        x = Embedding(c.vocab_size, c.hidden_size, name="embeddings.word_embeddings")(ids)
        x = x + Embedding(
            c.type_vocab_size, c.hidden_size, name="embeddings.token_type_embeddings"
        )(segments)
        x = x + Embedding(
            c.max_position_embeddings, c.hidden_size, name="embeddings.position_embeddings"
        )(places)
        x = LayerNorm(c.layer_norm_eps, name="embeddings.LayerNorm")(x)
        x, trace = self.hooks.visit(x, "residual", 0, valid, Trace(state, {}))
        seen, block = [trace.seen], nn.remat(BertBlock) if self.remat else BertBlock
        for i in range(c.num_hidden_layers):
            layer = block(c, i, self.hooks, name=f"encoder.layer.{i}")
            x, trace = layer(x, valid, Trace(trace.state, {}))
            seen.append(trace.seen)
        logits = None
        if c.labels:
            pooled = jnp.tanh(Linear(c.hidden_size, name="pooler.dense")(x[:, 0]))
            logits = Linear(c.labels, name="classifier")(pooled)
        return Output(x, logits, stack_taps(seen), trace.state)

    @staticmethod
    def example() -> tuple[Array, ...]:
        """The smallest input, to find the parameters' shapes with."""
        return (jnp.zeros((1, 1), jnp.int32),)


def mean_pool(hidden: Float[Array, "b t width"], mask: Array) -> Float[Array, "b width"]:
    """Mean over the tokens of each text, padding left out; zero for a text of none."""
    weight = mask.astype(bool).astype(hidden.dtype)[..., None]
    return jnp.sum(hidden * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1e-9)


def normalise(x: Float[Array, "*b width"]) -> Float[Array, "*b width"]:
    """Vectors of length one; a zero vector stays zero."""
    length = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
    return x / jnp.maximum(length, 1e-12)
