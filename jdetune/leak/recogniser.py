"""An independent judge of identity: a small network trained on public pictures only.

It maps a picture to a unit vector; pictures of one identity point the same way. It never sees an
adapter, and none of the identities that it judges.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax
from jaxtyping import Float, Int

from jdetune.leak.denoiser import spread
from jdetune.leak.tuning import Progress, descend
from jdetune.linalg import contract
from jdetune.models.layers import LayerNorm, Linear
from jdetune.types import Array

_SCALE = 16.0


class _Network(nn.Module):
    """Two convolutions and a linear map, to a vector of length one."""

    width: int = 64

    @nn.compact
    def __call__(self, pictures: jax.Array) -> jax.Array:
        x = _windows(pictures[..., None], 4, 2)
        x = jax.nn.relu(LayerNorm(1e-5)(Linear(32)(x)))
        x = jax.nn.relu(LayerNorm(1e-5)(Linear(64)(_windows(x, 3, 2))))
        x = Linear(self.width)(x.reshape(len(x), -1))
        return x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)), 1e-6)


def _windows(x: jax.Array, side: int, stride: int) -> jax.Array:
    """Squares of a picture as vectors; products with them are convolutions, fast also in loops."""
    count = (x.shape[1] - side) // stride + 1
    ends = [slice(k, k + stride * (count - 1) + 1, stride) for k in range(side)]
    return jnp.concatenate([x[:, i, j] for i in ends for j in ends], axis=-1)


@dataclasses.dataclass(frozen=True)
class Judge:
    """How the recogniser is trained.

    Attributes:
      steps: of Adam.
      batch: pictures a step.
      lr: highest learning rate.
      shift: pixels that pictures are moved by, at most.
      noise: standard deviation of noise added to them.
      margin: subtracted from the right class's cosine while it trains.
    """

    steps: int = 800
    batch: int = 128
    lr: float = 3e-3
    shift: int = 1
    noise: float = 0.15
    margin: float = 0.2


def _adam(judge: Judge) -> optax.GradientTransformation:
    return optax.flatten(optax.adam(optax.cosine_decay_schedule(judge.lr, judge.steps)))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _train(
    judge: Judge, steps: int, weights: Any, state: Any, pictures: Array, names: Array, key: Array
) -> tuple[Any, Any]:
    optimizer = _adam(judge)

    def body(carry: Any, k: Array) -> tuple[Any, None]:
        weights, state = carry
        keys = jax.random.split(k, 3)
        pick = jax.random.randint(keys[0], (judge.batch,), 0, len(pictures))
        by = jax.random.randint(keys[1], (judge.batch, 2), -judge.shift, judge.shift + 1)
        moved = jax.vmap(lambda p, d: jnp.roll(p, d, (0, 1)))(pictures[pick], by)
        moved = moved + judge.noise * jax.random.normal(keys[2], moved.shape, moved.dtype)

        def loss(w: Any) -> Array:
            found = _Network().apply(w["network"], moved)
            assert isinstance(found, jax.Array)
            heads = w["heads"] / jnp.sqrt(jnp.sum(w["heads"] ** 2, axis=1, keepdims=True))
            cosines = contract("bw,iw->bi", found, heads)
            own = jax.nn.one_hot(names[pick], len(heads), dtype=jnp.float32)
            logits = _SCALE * (cosines - judge.margin * own)
            return jnp.mean(optax.softmax_cross_entropy(logits, own))

        return descend(optimizer, jax.grad(loss)(weights), weights, state), None

    carry, _ = lax.scan(body, (weights, state), jax.random.split(key, steps))
    return carry


def train(
    judge: Judge,
    pictures: Float[Array, "identity view side side"],
    key: Array,
    progress: Progress | None = None,
) -> Any:
    """Weights of a recogniser.

    Args:
      judge: how it is trained.
      pictures: of public identities.
      key: of weights and batches.
      progress: called with ("judge", done, total).
    """
    count, views = pictures.shape[:2]
    flat = jnp.asarray(pictures).reshape(-1, *pictures.shape[2:])
    names = jnp.repeat(jnp.arange(count), views)
    network = jax.tree_util.tree_map_with_path(
        spread, _Network().init(jax.random.fold_in(key, 0), flat[:1])
    )
    heads = jax.random.normal(jax.random.fold_in(key, 1), (count, _Network().width), jnp.float32)
    weights = {"network": network, "heads": heads}
    state = _adam(judge).init(weights)
    chunk = min(200, judge.steps)
    for done in range(0, judge.steps, chunk):
        now, steps = jax.random.fold_in(key, done + 2), min(chunk, judge.steps - done)
        weights, state = _train(judge, steps, weights, state, flat, names, now)
        if progress is not None:
            progress("judge", done + steps, judge.steps)
    return weights["network"]


@jax.jit
def _embed(network: Any, pictures: Array) -> Array:
    found = _Network().apply(network, pictures)
    assert isinstance(found, jax.Array)
    return found


def embed(network: Any, pictures: Float[Array, "*b side side"]) -> Float[np.ndarray, "*b width"]:
    """Unit vectors of pictures.

    Args:
      network: from `train`.
      pictures: any number of leading axes.
    """
    flat = jnp.asarray(np.asarray(pictures, np.float32)).reshape(-1, *pictures.shape[-2:])
    found = np.asarray(_embed(network, flat))
    return found.reshape(*pictures.shape[:-2], -1)


def gallery(
    network: Any, pictures: Float[Array, "identity view side side"]
) -> Float[np.ndarray, "identity width"]:
    """One unit vector an identity: the mean direction of its views."""
    mean = embed(network, pictures).mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def identify(
    vectors: Float[np.ndarray, "b width"], known: Float[np.ndarray, "identity width"]
) -> Int[np.ndarray, "b identity"]:
    """Identities from the most to the least alike."""
    return np.argsort(-np.matmul(vectors, known.T), axis=1, kind="stable")
