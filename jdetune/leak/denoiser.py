"""A small conditional diffusion model in Flax: a residual MLP with cross-attention to a context.

Weights are a flat dict from name to array, named and oriented as in PyTorch's checkpoints, so that
adapters, merged models and `jdetune.recover` work on it as on any other model.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Int

from jdetune.errors import InputError
from jdetune.models.layers import LORA, LayerNorm, Linear, Lora, attend, split_heads
from jdetune.models.params import Params, put
from jdetune.types import Array as AnyArray

#: Name of the table of word vectors, which the module itself does not hold.
WORDS = "words.weight"
#: Path of a linear layer to its factors.
Adapter = Mapping[str, Lora]


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of a denoiser.

    Attributes:
      side: pixels a side of a picture.
      width: of the residual stream and of context vectors.
      heads: of attention.
      blocks: cross-attention and MLP each.
      context: tokens of a context.
      words: entries of the table of word vectors; the last one is the empty word.
    """

    side: int = 16
    width: int = 64
    heads: int = 4
    blocks: int = 2
    context: int = 8
    words: int = 161

    @property
    def empty(self) -> int:
        """The word that says nothing."""
        return self.words - 1


class Attention(nn.Module):
    """Attention of tokens over a source, without biases."""

    width: int
    heads: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t width"], source: Float[Array, "b s width"]
    ) -> Float[Array, "b t width"]:
        """What every token takes from the source."""
        query = Linear(self.width, bias=False, name="q")(x)
        key = Linear(self.width, bias=False, name="k")(source)
        value = Linear(self.width, bias=False, name="v")(source)
        heads = [split_heads(part, self.heads) for part in (query, key, value)]
        allowed = jnp.ones((x.shape[0], 1, source.shape[1]), bool)
        mixed = attend(heads[0], heads[1], heads[2], allowed)
        return Linear(self.width, bias=False, name="o")(mixed)


class Denoiser(nn.Module):
    """Estimates the picture below the noise; `diffusion.noise_of` makes noise of it."""

    size: Size

    @nn.compact
    def __call__(
        self,
        noisy: Float[Array, "b side side"],
        time: Float[Array, " b"],
        context: Float[Array, "b context width"],
    ) -> Float[Array, "b side side"]:
        """The estimate."""
        size, width = self.size, self.size.width
        when = Linear(width, name="time_in")(sinusoids(time * 1000.0, width))
        when = Linear(width, name="time_out")(jax.nn.silu(when))
        x = Linear(width, name="pixels_in")(noisy.reshape(len(noisy), -1)) + when
        for i in range(size.blocks):
            own = LayerNorm(1e-5, name=f"blocks_{i}_norm_cross")(x)[:, None]
            x = x + Attention(width, size.heads, name=f"blocks_{i}_cross")(own, context)[:, 0]
            own = LayerNorm(1e-5, name=f"blocks_{i}_norm_mlp")(x)
            up = jax.nn.silu(Linear(width, name=f"blocks_{i}_up")(own + when))
            x = x + Linear(width, name=f"blocks_{i}_down")(up)
        out = Linear(size.side**2, name="pixels_out")(LayerNorm(1e-5, name="norm")(x))
        return out.reshape(noisy.shape)


def sinusoids(positions: Float[Array, " b"], width: int) -> Float[Array, "b width"]:
    """Sines and cosines of a position at wavelengths from 6 to 60,000."""
    rates = jnp.exp(-jnp.log(10000.0) * jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angles = positions[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def init_params(size: Size, key: Array) -> Params:
    """Random weights: normal, of variance one over the inputs; norms one, biases zero.

    Args:
      size: of the model.
      key: JAX random key.
    """
    tree, params = _tree(size), {}
    for (name, (_, shape)), k in zip(tree.items(), jax.random.split(key, len(tree)), strict=True):
        draw = jax.random.normal(k, shape, jnp.float32)
        if name.endswith("bias"):
            params[name] = jnp.zeros(shape, jnp.float32)
        elif len(shape) == 1:
            params[name] = jnp.ones(shape, jnp.float32)
        else:
            params[name] = draw * shape[1] ** -0.5
    params["pixels_out.weight"] = 0.1 * params["pixels_out.weight"]
    words = jax.random.normal(jax.random.fold_in(key, 1), (size.words, size.width), jnp.float32)
    return {**params, WORDS: words}


@cache
def _tree(size: Size) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Name of every weight of the module to its path in Flax's tree and its shape."""
    example = (
        jnp.zeros((1, size.side, size.side)),
        jnp.zeros(1),
        jnp.zeros((1, size.context, size.width)),
    )
    tree = jax.eval_shape(lambda: Denoiser(size).init(jax.random.key(0), *example))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [tuple(str(key.key) for key in path) for path, _ in leaves]
    return {".".join(p): (p, leaf.shape) for p, (_, leaf) in zip(paths, leaves, strict=True)}


def estimate(
    size: Size,
    params: Params,
    lora: Adapter | None,
    noisy: Float[AnyArray, "b side side"],
    time: Float[AnyArray, " b"],
    context: Float[AnyArray, "b context width"],
) -> Float[Array, "b side side"]:
    """The model as a pure function; ``jax.vmap`` over ``lora`` runs many fine-tunes.

    Args:
      size: of the model; static.
      params: its weights.
      lora: factors by layer.
      noisy: pictures with noise.
      time: 0 (clean) to 1 (noise).
      context: vectors, as `vectors` makes them of words.
    """
    tree: dict[str, Any] = {}
    for name, (path, _) in _tree(size).items():
        put(tree, path, params[name])
    variables = {"params": tree}
    if lora is not None:
        variables[LORA] = {}
        for layer, pair in lora.items():
            put(variables[LORA], (*layer.split("."), "factors"), pair)
    found = Denoiser(size).apply(variables, noisy, time, context)
    assert isinstance(found, jax.Array)
    return found


def vectors(params: Params, words: Int[AnyArray, "*b context"]) -> Float[Array, "*b context width"]:
    """The context that words make."""
    return jnp.take(params[WORDS], words, axis=0)


def targets(
    size: Size, ends: Sequence[str] = ("q", "k", "v", "o", "up", "down")
) -> dict[str, tuple[int, int]]:
    """Linear layers of the blocks by path, with the shape [out, in] of their weight.

    Args:
      size: of the model.
      ends: last words of paths; the paper adapts queries and values.

    Raises:
      InputError: nothing is a target.
    """
    found = {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, (_, shape) in _tree(size).items()
        if name.startswith("blocks_")
        and name.endswith(".weight")
        and len(shape) == 2
        and name.removesuffix(".weight").replace(".", "_").split("_")[-1] in ends
    }
    if not found:
        raise InputError(f"no linear layer of the denoiser is a target: {', '.join(ends)}.")
    return found


def init_lora(
    key: Array, shapes: Mapping[str, tuple[int, int]], rank: int, scaling: float = 1.0
) -> dict[str, Lora]:
    r"""New factors: A uniform in :math:`\pm 1/\sqrt{in}`, B zero; as PEFT draws them.

    Args:
      key: JAX random key; ``jax.vmap`` over keys makes many adapters.
      shapes: from `targets`.
      rank: of every layer.
      scaling: PEFT's ``lora_alpha / r``.
    """
    adapter = {}
    keys = jax.random.split(key, len(shapes))
    for k, (path, (out, width)) in zip(keys, shapes.items(), strict=True):
        a = jax.random.uniform(k, (rank, width), jnp.float32, -1, 1) * width**-0.5
        adapter[path] = Lora(a, jnp.zeros((out, rank), jnp.float32), scaling)
    return adapter


def spread(path: Any, x: Array) -> Array:
    """Initial weights of a `Linear`, which start at 0.02, at variance one over the inputs.

    For ``jax.tree_util.tree_map_with_path``; other weights stay.
    """
    return x * (x.shape[1] ** -0.5 / 0.02) if path[-1].key == "weight" and x.ndim == 2 else x
