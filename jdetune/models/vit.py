"""Vision transformers: ViT and DINOv2; dropout and stochastic depth are left out."""

from functools import cache

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Bool, Float

from jdetune.linalg import contract
from jdetune.models.config import ViTConfig
from jdetune.models.hooks import Hooks, Trace, stack_taps
from jdetune.models.layers import LayerNorm, Linear, activation, attend, split_heads
from jdetune.models.output import Output

_NORMAL = nn.initializers.normal(0.02)
#: PyTorch's bicubic kernel; JAX's own has -0.5 and blurs when it shrinks.
_BICUBIC = -0.75


class ViTBlock(nn.Module):
    """Attention and MLP, each with its LayerNorm before."""

    config: ViTConfig
    index: int
    hooks: Hooks = Hooks()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t width"], valid: Bool[Array, "b t"], trace: Trace
    ) -> tuple[Float[Array, "b t width"], Trace]:
        """One block."""
        c, at = self.config, self.index
        names = _DINOV2 if c.layer_scale else _VIT
        y = LayerNorm(c.layer_norm_eps, name=names["before"])(x)
        query, key, value = (
            split_heads(
                Linear(c.hidden_size, c.qkv_bias, name=f"attention.attention.{part}")(y),
                c.num_attention_heads,
            )
            for part in ("query", "key", "value")
        )
        y = Linear(c.hidden_size, name="attention.output.dense")(
            attend(query, key, value, valid[:, None, :])
        )
        y, trace = self.hooks.visit(y, "attention", at, valid, trace)
        x = x + self._scaled(y, "layer_scale1.lambda1")
        y = LayerNorm(c.layer_norm_eps, name=names["after"])(x)
        y = activation(c.hidden_act)(Linear(c.intermediate_size, name=names["up"])(y))
        y = Linear(c.hidden_size, name=names["down"])(y)
        y, trace = self.hooks.visit(y, "mlp", at, valid, trace)
        x = x + self._scaled(y, "layer_scale2.lambda1")
        return self.hooks.visit(x, "residual", at + 1, valid, trace)

    def _scaled(self, y: Array, name: str) -> Array:
        if not self.config.layer_scale:
            return y
        return y * self.param(name, nn.initializers.ones, y.shape[-1:])


_VIT = {
    "before": "layernorm_before",
    "after": "layernorm_after",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_DINOV2 = {"before": "norm1", "after": "norm2", "up": "mlp.fc1", "down": "mlp.fc2"}


class ViT(nn.Module):
    """A ViT or DINOv2 encoder, with a classification head if the config has labels.

    Attributes:
      config: sizes.
      hooks: what to record and change.
      remat: compute activations again for the gradient instead of keeping them.
    """

    config: ViTConfig
    hooks: Hooks = Hooks()
    remat: bool = False

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "b channel height col"], state: object = None
    ) -> Output:
        """Encodes images.

        Args:
          pixels: normalised as the model's preprocessor says; sides at least one patch. Positions
            are interpolated to other sizes than the model's own.
          state: the edit's state.

        Returns:
          Output: hidden states with the class token first, logits if there is a head.
        """
        c = self.config
        patches = _patches(pixels, c.patch_size)
        shape = (c.hidden_size, c.num_channels, c.patch_size, c.patch_size)
        weight = self.param("embeddings.patch_embeddings.projection.weight", _NORMAL, shape)
        x = contract("bhwi,oi->bhwo", patches, weight.reshape(c.hidden_size, -1))
        zeros = nn.initializers.zeros
        x = x + self.param("embeddings.patch_embeddings.projection.bias", zeros, (c.hidden_size,))
        grid = c.image_size // c.patch_size
        shape = (1, 1 + grid * grid, c.hidden_size)
        places = self.param("embeddings.position_embeddings", _NORMAL, shape)
        token = self.param("embeddings.cls_token", _NORMAL, (1, 1, c.hidden_size))
        x = x.reshape(len(x), -1, c.hidden_size)
        token = jnp.broadcast_to(token, (len(x), 1, c.hidden_size))
        x = jnp.concatenate([token, x], axis=1)
        x = x + resize_positions(places, patches.shape[1], patches.shape[2])
        valid = jnp.ones(x.shape[:2], bool)
        x, trace = self.hooks.visit(x, "residual", 0, valid, Trace(state, {}))
        seen, block = [trace.seen], nn.remat(ViTBlock) if self.remat else ViTBlock
        for i in range(c.num_hidden_layers):
            layer = block(c, i, self.hooks, name=f"encoder.layer.{i}")
            x, trace = layer(x, valid, Trace(trace.state, {}))
            seen.append(trace.seen)
        x = LayerNorm(c.layer_norm_eps, name="layernorm")(x)
        logits = None
        if c.labels:
            features = x[:, 0]
            if c.layer_scale:
                features = jnp.concatenate([features, jnp.mean(x[:, 1:], axis=1)], axis=-1)
            logits = Linear(c.labels, name="classifier")(features)
        return Output(x, logits, stack_taps(seen), trace.state)

    def example(self) -> tuple[Array, ...]:
        """The smallest input, to find the parameters' shapes with."""
        c = self.config
        return (jnp.zeros((1, c.num_channels, c.patch_size, c.patch_size), jnp.float32),)


def _patches(pixels: Array, size: int) -> Float[Array, "b row col inputs"]:
    """Patches as vectors in the order of the convolution's weight; the rest of the edge is cut."""
    batch, channels, height, width = pixels.shape
    rows, cols = height // size, width // size
    if not rows or not cols:
        raise ValueError(f"images of {height}x{width} have no patch of {size}x{size}")
    cut = pixels[:, :, : rows * size, : cols * size]
    cut = cut.reshape(batch, channels, rows, size, cols, size)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rows, cols, -1)


def resize_positions(
    positions: Float[Array, "one place width"], rows: int, cols: int
) -> Float[Array, "one newplace width"]:
    """Position embeddings for another number of patches: bicubic, as PyTorch does it.

    Args:
      positions: [1, 1 + side * side, width], the class token's first.
      rows: patches from top to bottom.
      cols: patches from left to right.

    Returns:
      [1, 1 + rows * cols, width].
    """
    side = int((positions.shape[1] - 1) ** 0.5)
    if (rows, cols) == (side, side):
        return positions
    grid = positions[0, 1:].reshape(side, side, -1)
    down, across = (jnp.asarray(_bicubic(side, new)) for new in (rows, cols))
    grid = contract("rs,cp,spw->rcw", down, across, grid)
    return jnp.concatenate([positions[:, :1], grid.reshape(1, rows * cols, -1)], axis=1)


@cache
def _bicubic(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of cubic interpolation between pixel centres; edges are repeated."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(at).astype(int)
    weights = np.zeros((new, old))
    for step in range(-1, 3):
        source = np.clip(first + step, 0, old - 1)
        np.add.at(weights, (np.arange(new), source), _cubic(np.abs(at - first - step)))
    return weights.astype(np.float32)


def _cubic(distance: np.ndarray) -> np.ndarray:
    a, d = _BICUBIC, distance
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))
