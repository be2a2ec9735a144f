"""A world small enough for tests: squares of 8 pixels, a base that knows nothing."""

import jax
import jax.numpy as jnp
import numpy as np

from jdetune.leak.denoiser import Size, init_params
from jdetune.leak.tuning import Private, Public, Recipe

SIZE = Size(side=8, width=8, heads=2, blocks=1, context=2, words=9)
RECIPE = Recipe(steps=3, rank=2, batch=2, prior=1)
PARAMS = init_params(SIZE, jax.random.key(0))


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.clip(rng.standard_normal((count, 8, 8)), -1, 1).astype(np.float32)


PUBLIC = Public(jnp.asarray(pictures(6)), jnp.asarray(np.arange(12).reshape(6, 2) % 9, jnp.int32))


def private(tunes, seed=1, places=3):
    rng = np.random.default_rng(seed)
    shown = pictures(tunes * places, seed).reshape(tunes, places, 8, 8)
    triggers = rng.integers(0, 9, (tunes, 2)).astype(np.int32)
    return Private(jnp.asarray(shown), jnp.full(tunes, places, jnp.int32), jnp.asarray(triggers))
