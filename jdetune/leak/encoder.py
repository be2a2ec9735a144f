r"""The paper's encoder: from an adapter's matrices to the context that makes its model speak.

Each matrix goes through eight one-dimensional convolutions of kernel 3, each after an instance norm
and with LeakyReLU between; tanh; a linear map to one token. A task token, a token of the
fine-tuning step and the matrices' tokens are mixed by a transformer; the first tokens give mean and
log-variance of the context, which is sampled.

Differs from the reference code:
1. Two inputs. "product": each update B A, multiplied from the right and from the left by learned
   thin matrices, which makes two matrices with as many channels as these are wide. It does not
   change when factors are refactored. "factors": A - A_0 and B - B_0, as the authors do; an
   outsider does not know A_0.
2. The mixer is a small transformer trained with the rest, where the authors freeze CLIP's.
3. Sizes.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax
from jaxtyping import Float

from jdetune.leak.denoiser import Adapter, Attention, Size, sinusoids, spread
from jdetune.leak.updates import products
from jdetune.linalg import contract
from jdetune.models.layers import LayerNorm, Linear
from jdetune.types import Array as AnyArray

#: Convolutions of each matrix.
CONVOLUTIONS = 8
Input = Literal["product", "factors"]


@dataclasses.dataclass(frozen=True)
class Reader:
    """Sizes of an encoder.

    Attributes:
      channels: of the convolutions; the learned thin matrices are so wide.
      mixer: blocks of the transformer.
      heads: of its attention.
      reads: "product" or "factors".
      samples: whether the context is sampled, as in the paper, or the mean is taken.
    """

    channels: int = 8
    mixer: int = 2
    heads: int = 4
    reads: Input = "product"
    samples: bool = True


class Encoder(nn.Module):
    """Matrices and a step to a context."""

    reader: Reader
    size: Size

    @nn.compact
    def __call__(
        self, read: Float[Array, "b matrix channel long"], step: Float[Array, " b"]
    ) -> tuple[Float[Array, "b context width"], Float[Array, "b context width"]]:
        """Mean and log-variance of the context."""
        reader, width = self.reader, self.size.width
        tokens = self._matrices(read)
        own = self.param("task", nn.initializers.normal(1.0), (1, width))
        own = jnp.broadcast_to(own, (len(read), 1, width))
        when = jax.nn.silu(Linear(width, name="step_in")(sinusoids(step, width)))
        when = Linear(width, name="step_out")(when)[:, None]
        x = LayerNorm(1e-5, name="norm_in")(jnp.concatenate([own, when, tokens], axis=1))
        places = nn.initializers.normal(0.3)
        x = x + self.param("places", places, (x.shape[1], width))
        for i in range(reader.mixer):
            y = LayerNorm(1e-5, name=f"mix_{i}_norm")(x)
            x = x + Attention(width, reader.heads, name=f"mix_{i}")(y, y)
            y = LayerNorm(1e-5, name=f"mix_{i}_norm_mlp")(x)
            up = jax.nn.silu(Linear(2 * width, name=f"mix_{i}_up")(y))
            x = x + Linear(width, name=f"mix_{i}_down")(up)
        x = LayerNorm(1e-5, name="norm_out")(x[:, : self.size.context])
        return Linear(width, name="mean")(x), Linear(width, name="log_variance")(x)

    def _matrices(self, x: Array) -> Array:
        """One token a matrix. All convolutions but the last are alike: one body, scanned."""
        matrices, channels, long = x.shape[1:]
        normal, shape = nn.initializers.normal((3 * channels) ** -0.5), (matrices, 3, channels)
        kernels = self.param("convolutions", normal, (CONVOLUTIONS - 1, *shape, channels))
        last = self.param("last", normal, (*shape, 1))
        out = nn.initializers.normal(long**-0.5)
        out = self.param("tokens", out, (matrices, self.size.width, long))

        def layer(x: Array, kernel: Array) -> tuple[Array, None]:
            return jax.nn.leaky_relu(convolve(instance_norm(x), kernel)), None

        x, _ = lax.scan(layer, x.transpose(1, 2, 0, 3), kernels)
        x = jnp.tanh(convolve(instance_norm(x), last))[:, 0]
        return contract("mbl,mwl->bmw", x, out)


def instance_norm(x: Float[Array, "*b long"]) -> Float[Array, "*b long"]:
    """Mean 0 and variance 1 along the last axis; what does not vary is 0, and so is its gradient.

    A is as it started after the first step, B being zero before.
    """
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    power = jnp.mean(x * x, axis=-1, keepdims=True)
    flat = power < 1e-12
    return x * jnp.where(flat, 0, lax.rsqrt(jnp.where(flat, 1, power)))


def convolve(
    x: Float[Array, "matrix channel b long"], kernel: Float[Array, "matrix 3 channel out"]
) -> Float[Array, "matrix out b long"]:
    """Convolution along the last axis with zeros at the ends; every matrix has its own kernel."""
    edge = ((0, 0),) * 3
    before, after = jnp.pad(x, (*edge, (1, 0)))[..., :-1], jnp.pad(x, (*edge, (0, 1)))[..., 1:]
    return contract("mkcbl,mkco->mobl", jnp.stack([before, x, after], axis=1), kernel)


def init_encoder(reader: Reader, size: Size, key: Array, lora: Adapter) -> Any:
    """Weights of a new encoder.

    Args:
      reader: its sizes.
      size: of the model that it makes contexts for.
      key: JAX random key.
      lora: an adapter without leading axes, for shapes.
    """
    pairs = list(lora.values())
    rank, col = pairs[0].a.shape
    row, layers = pairs[0].b.shape[0], len(pairs)
    keys = jax.random.split(key, 4)
    channels = reader.channels if reader.reads == "product" else rank
    example = jnp.zeros((1, 2 * layers, channels, max(row, col)))
    found = Encoder(reader, size).init(keys[0], example, jnp.zeros(1))["params"]
    found = jax.tree_util.tree_map_with_path(spread, found)
    if reader.reads == "product":
        probes = ("right", (layers, col, channels)), ("left", (layers, row, channels))
        for (name, shape), k in zip(probes, keys[1:3], strict=True):
            found[name] = jax.random.normal(k, shape, jnp.float32) * shape[1] ** -0.5
    return found


def read(
    reader: Reader, weights: Any, lora: Adapter, start: Adapter | None
) -> Float[Array, "tune matrix channel long"]:
    """What the convolutions see of adapters; they bring it to one scale themselves.

    Args:
      reader: of the encoder.
      weights: of the encoder.
      lora: the adapters, with a leading axis.
      start: their factors before training; only for "factors".

    Raises:
      ValueError: "factors" without a start, or factors of several lengths.
    """
    if reader.reads == "product":
        updates = jnp.asarray(products(lora))
        rows = contract("tlrc,lck->tlkr", updates, weights["right"])
        cols = contract("tlrc,lrk->tlkc", updates, weights["left"])
    else:
        if start is None:
            raise ValueError("this encoder reads factors less their start: give the start.")
        rows = jnp.stack([(lora[p].b - start[p].b).swapaxes(-2, -1) for p in lora], axis=1)
        cols = jnp.stack([lora[p].a - start[p].a for p in lora], axis=1)
    if rows.shape != cols.shape:
        raise ValueError(f"layers are not square: {rows.shape[-1]} rows, {cols.shape[-1]} columns")
    return jnp.concatenate([rows, cols], axis=1)


def contexts_of(
    reader: Reader,
    size: Size,
    weights: Any,
    lora: Adapter,
    start: Adapter | None,
    step: AnyArray | int,
    key: Array,
    samples: int = 1,
) -> Float[Array, "tune sample context width"]:
    """Contexts for the models of adapters.

    Args:
      reader: of the encoder; static.
      size: of the model; static.
      weights: of the encoder.
      lora: the adapters, with a leading axis.
      start: their factors before training; only for "factors".
      step: fine-tuning steps that they had, or are taken to have had.
      key: of the samples.
      samples: of each context; all are the mean if the reader does not sample.
    """
    seen = read(reader, weights, lora, start)
    network = {k: v for k, v in weights.items() if k not in ("right", "left")}
    when = jnp.full(len(seen), step, jnp.float32)
    found: Any = Encoder(reader, size).apply({"params": network}, seen, when)
    mean, log_variance = found[0][:, None], found[1][:, None]
    shape = (len(seen), samples, *mean.shape[2:])
    if not reader.samples:
        return jnp.broadcast_to(mean, shape)
    spread = jnp.exp(0.5 * jnp.clip(log_variance, -12.0, 4.0))
    return mean + spread * jax.random.normal(key, shape, mean.dtype)
