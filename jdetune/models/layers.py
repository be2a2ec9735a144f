"""Layers that the models share; weights are named and oriented as in PyTorch's checkpoints.

Products ask for full float32 precision (``jdetune.linalg.contract``), on every device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from jdetune.errors import InputError
from jdetune.linalg import contract

#: Collection that holds LoRA factors, beside "params".
LORA = "lora"
_NORMAL = nn.initializers.normal(0.02)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
    """LoRA factors of one linear layer: its weight acts as ``W + scaling * b @ a``.

    A pytree: a leading adapter axis on ``a`` and ``b`` makes many adapters for ``jax.vmap``.

    Attributes:
      a: [rank, in].
      b: [out, rank].
      scaling: PEFT's ``alpha / r``; static, not trained.
    """

    a: Any
    b: Any
    scaling: float = dataclasses.field(default=1.0, metadata={"static": True})


class Linear(nn.Module):
    """``x W^T + bias``, and a LoRA update where one is given."""

    features: int
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """The product; LoRA's goes through the rank, so the base weight is never copied."""
        weight = self.param("weight", _NORMAL, (self.features, x.shape[-1]))
        y = contract("...i,oi->...o", x, weight)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,))
        if self.has_variable(LORA, "factors"):
            factors = self.get_variable(LORA, "factors")
            down = contract("...i,ri->...r", x, factors.a)
            y = y + factors.scaling * contract("...r,or->...o", down, factors.b)
        return y


class Embedding(nn.Module):
    """A table of vectors, which can be the output matrix as well."""

    rows: int
    features: int

    def setup(self) -> None:
        """Makes the table."""
        if self.has_variable(LORA, "factors"):
            raise InputError("LoRA on an embedding cannot be run. Merge it into the weights first.")
        self.weight = self.param("weight", _NORMAL, (self.rows, self.features))

    def __call__(self, ids: Int[Array, "*b"]) -> Float[Array, "*b width"]:
        """Rows by number."""
        return jnp.take(self.weight, ids, axis=0)

    def attend(self, x: Float[Array, "*b width"]) -> Float[Array, "*b rows"]:
        """Logits of a tied head."""
        return contract("...i,oi->...o", x, self.weight)


class LayerNorm(nn.Module):
    """Mean 0 and variance 1 over the last axis, then scale and shift."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*b width"]) -> Float[Array, "*b width"]:
        """The normalised activations."""
        weight = self.param("weight", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return centred * lax.rsqrt(variance + self.eps) * weight + bias


class RMSNorm(nn.Module):
    """Mean square 1 over the last axis, then scale."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*b width"]) -> Float[Array, "*b width"]:
        """The normalised activations."""
        weight = self.param("weight", nn.initializers.ones, x.shape[-1:])
        return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * weight


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def activation(name: str) -> Callable[[Array], Array]:
    """An activation by the name that config.json has.

    Raises:
      InputError: the name is not known.
    """
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise InputError(f"hidden_act {name!r} is not known; models with {known} can be run.")
    return _ACTIVATIONS[name]


def split_heads(x: Float[Array, "b t width"], heads: int) -> Float[Array, "b t head size"]:
    """The last axis as heads."""
    return x.reshape(*x.shape[:-1], heads, -1)


def attend(
    query: Float[Array, "b t head size"],
    key: Float[Array, "b s group size"],
    value: Float[Array, "b s group size"],
    allowed: Bool[Array, "b _ s"],
) -> Float[Array, "b t width"]:
    """Scaled dot-product attention; several query heads may share one key and value head.

    Args:
      query: queries of every head.
      key: keys; heads are a multiple of groups.
      value: values.
      allowed: which keys a query may see. One that may see none gets their mean, not NaN.

    Returns:
      Mixed values, heads side by side.
    """
    batch, tokens, heads, size = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, tokens, groups, heads // groups, size)
    scores = contract("btkgd,bskd->bkgts", query, key) * size**-0.5
    scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(scores.dtype).min)
    mixed = contract("bkgts,bskd->btkgd", jax.nn.softmax(scores, axis=-1), value)
    return mixed.reshape(batch, tokens, heads * size)
