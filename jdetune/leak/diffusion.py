r"""The diffusion itself: noise, its prediction, and sampling.

A picture x and noise e mix on a quarter circle,
:math:`x_t = \cos(\pi t/2)\, x + \sin(\pi t/2)\, e`, for t from 0 to 1. The network estimates x, and
the noise follows. The loss is the squared error of the noise, as in the papers, but with a weight
of at most that of the picture's error, :math:`\min(1, \tan^2(\pi t/2))`: where there is hardly any
noise, the network's few channels cannot tell it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from jdetune.leak.denoiser import Adapter, Size, estimate
from jdetune.models.params import Params
from jdetune.types import Array

#: Times of training and sampling stay this far from 0 and 1.
EDGE = 0.02


def _mix(time: Float[Array, " b"]) -> tuple[Array, Array]:
    angle = (0.5 * jnp.pi * time)[:, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def noise_of(
    noisy: Float[Array, "b side side"],
    time: Float[Array, " b"],
    clean: Float[Array, "b side side"],
) -> Float[Array, "b side side"]:
    """Noise that is in a picture, if this one is below it."""
    cos, sin = _mix(time)
    return (noisy - cos * clean) / sin


def noise_loss(
    size: Size,
    params: Params,
    lora: Adapter | None,
    key: Array,
    pictures: Float[Array, "b side side"],
    context: Float[Array, "b context width"],
) -> Float[Array, " b"]:
    """Mean weighted squared error of the predicted noise, for each picture, at a random time.

    Args:
      size: of the model; static.
      params: its weights.
      lora: factors, or None.
      key: of times and noise.
      pictures: clean.
      context: of each.
    """
    for_time, for_noise = jax.random.split(key)
    time = jax.random.uniform(for_time, (len(pictures),), jnp.float32, EDGE, 1 - EDGE)
    noise = jax.random.normal(for_noise, pictures.shape, jnp.float32)
    cos, sin = _mix(time)
    noisy = cos * pictures + sin * noise
    guess = noise_of(noisy, time, estimate(size, params, lora, noisy, time, context))
    weight = jnp.minimum(1.0, (sin / cos) ** 2)
    return jnp.mean(weight * (guess - noise) ** 2, axis=(1, 2))


@partial(jax.jit, static_argnums=(0, 5))
def sample(
    size: Size,
    params: Params,
    lora: Adapter | None,
    key: Array,
    context: Float[Array, "b context width"],
    steps: int = 12,
) -> Float[Array, "b side side"]:
    """Pictures out of noise, by DDIM.

    Args:
      size: of the model; static.
      params: its weights.
      lora: factors, or None.
      key: of the noise that it starts from.
      context: of each picture.
      steps: of denoising; static.
    """
    shape = (len(context), size.side, size.side)
    times = jnp.linspace(1 - EDGE, EDGE, steps + 1, dtype=jnp.float32)

    def step(x: Array, now: tuple[Array, Array]) -> tuple[Array, None]:
        time, after = (jnp.full((shape[0],), t) for t in now)
        clean = jnp.clip(estimate(size, params, lora, x, time, context), -1.0, 1.0)
        noise = noise_of(x, time, clean)
        cos, sin = _mix(after)
        return cos * clean + sin * noise, None

    start = jax.random.normal(key, shape, jnp.float32)
    last, _ = lax.scan(step, start, (times[:-1], times[1:]))
    return jnp.clip(last, -1.0, 1.0)
