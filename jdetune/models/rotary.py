"""Rotary positions: wavelengths, their scaling for long contexts, and the rotation."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jdetune.models.config import ROPE_KEYS, LlamaConfig


def frequencies(config: LlamaConfig) -> Float[np.ndarray, " half"]:
    r"""Angle a position of every pair of coordinates, :math:`\theta^{-2i/d}`, scaled as asked.

    Example:
      >>> frequencies(LlamaConfig(head_dim=4)).tolist()
      [1.0, 0.009999999776482582]
    """
    size = config.head_dim
    powers = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    plain = np.float32(1) / np.float32(config.rope_theta) ** powers
    scaling: dict[str, Any] = dict(config.rope_scaling)
    match scaling.get("rope_type", "default"):
        case "linear":
            return plain / np.float32(scaling["factor"])
        case "llama3":
            return _llama3(plain, *(scaling[key] for key in ROPE_KEYS["llama3"]))
    return plain


def _llama3(
    plain: np.ndarray, factor: float, low: float, high: float, context: float
) -> np.ndarray:
    """Short wavelengths stay, long ones are stretched, those between are blended."""
    turns = context * plain.astype(np.float64) / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - kept) * plain / factor + kept * plain).astype(np.float32)


def rotate(
    x: Float[Array, "b t head size"],
    positions: Int[Array, "b t"],
    angles: Float[np.ndarray, " half"],
) -> Float[Array, "b t head size"]:
    """Turns coordinate i with coordinate i + size/2, by position times angle."""
    turn = positions[..., None].astype(x.dtype) * jnp.asarray(angles)
    cos, sin = jnp.cos(turn)[:, :, None], jnp.sin(turn)[:, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
