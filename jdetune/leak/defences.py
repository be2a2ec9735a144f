"""What a publisher can do to an adapter before release. None of it gives a guarantee.

All take and return factors with any leading axes. DP-SGD, which does give one, is a matter of
training (`tuning.Recipe.noise`), as is early stopping.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jdetune.leak.denoiser import Adapter
from jdetune.leak.updates import factored
from jdetune.linalg import inverse, matmul
from jdetune.models.layers import Lora
from jdetune.types import Array

#: Levels of NF4 (QLoRA, arXiv 2305.14314): quantiles of a normal distribution.
NF4 = np.array([
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])  # fmt: skip
#: Numbers that share a scale in NF4.
BLOCK = 64
#: One program for all layers of a shape.
_inverse = jax.jit(inverse)


def noised(adapter: Adapter, ratio: float, key: Array) -> dict[str, Lora]:
    """Normal noise on both factors, of so many times each factor's root mean square.

    Args:
      adapter: factors.
      ratio: 0 or more.
      key: JAX random key.
    """
    found = {}
    for k, (path, pair) in zip(jax.random.split(key, len(adapter)), adapter.items(), strict=True):
        for_a, for_b = jax.random.split(k)
        found[path] = Lora(_add(pair.a, ratio, for_a), _add(pair.b, ratio, for_b), pair.scaling)
    return found


def _add(x: Array, ratio: float, key: Array) -> Array:
    rms = jnp.sqrt(jnp.mean(x * x, axis=(-2, -1), keepdims=True))
    return x + ratio * rms * jax.random.normal(key, x.shape, x.dtype)


def truncated(adapter: Adapter, rank: int) -> dict[str, Lora]:
    """The nearest update of a lower rank, in every layer.

    Args:
      adapter: factors.
      rank: to keep.
    """
    dense = {path: np.asarray(p.scaling * matmul(p.b, p.a)) for path, p in adapter.items()}
    return factored(dense, rank)


def quantised(adapter: Adapter, how: Callable[[np.ndarray], np.ndarray]) -> dict[str, Lora]:
    """Factors rounded to a coarse grid and back.

    Args:
      adapter: factors.
      how: `int8` or `nf4`.
    """

    def rounded(x: Array) -> jax.Array:
        return jnp.asarray(how(np.asarray(x)), jnp.float32)

    return {path: Lora(rounded(p.a), rounded(p.b), p.scaling) for path, p in adapter.items()}


def int8(array: np.ndarray) -> np.ndarray:
    """255 levels a row.

    Example:
      >>> int8(np.array([[1.0, 0.5]])).round(4)
      array([[1.    , 0.5039]])
    """
    scale = np.abs(array).max(axis=-1, keepdims=True) / 127
    return np.round(array / np.maximum(scale, 1e-30)) * scale


def nf4(array: np.ndarray) -> np.ndarray:
    """16 levels a block of 64 numbers; a last block may be shorter.

    Example:
      >>> nf4(np.array([[1.0, 0.5]])).round(4)
      array([[1.    , 0.4407]])
    """
    flat = np.pad(array.reshape(-1), (0, -array.size % BLOCK)).reshape(-1, BLOCK)
    scale = np.abs(flat).max(axis=1, keepdims=True)
    middles = (NF4[1:] + NF4[:-1]) / 2
    found = NF4[np.searchsorted(middles, flat / np.maximum(scale, 1e-30))] * scale
    return found.reshape(-1)[: array.size].reshape(array.shape)


def refactored(adapter: Adapter, key: Array) -> dict[str, Lora]:
    """The same update from other factors: A to Q A, B to B Q^-1, with a random Q for each.

    Args:
      adapter: factors.
      key: JAX random key.
    """
    found = {}
    for k, (path, pair) in zip(jax.random.split(key, len(adapter)), adapter.items(), strict=True):
        rank = pair.a.shape[-2]
        shape = (*pair.a.shape[:-2], rank, rank)
        q = jax.random.normal(k, shape, jnp.float32) + 2 * jnp.eye(rank, dtype=jnp.float32)
        found[path] = Lora(matmul(q, pair.a), matmul(pair.b, _inverse(q)), pair.scaling)
    return found
