"""Training the encoder: the paper's Algorithm 2, many fine-tunes side by side.

Public identities are fine-tuned as a victim would; after every step the adapter so far is a
training sample: the encoder reads it, and is asked for the context under which that very model
predicts the noise of its own pictures. Nothing of the fine-tunes is stored.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Float

from jdetune.leak.denoiser import Adapter, Size
from jdetune.leak.diffusion import noise_loss, sample
from jdetune.leak.encoder import Reader, contexts_of, init_encoder
from jdetune.leak.tuning import Private, Progress, Public, Recipe, begin, descend, tune_step
from jdetune.models.params import Params
from jdetune.types import Array


@dataclasses.dataclass(frozen=True)
class Lessons:
    """How the encoder is trained.

    Attributes:
      rounds: sets of fresh fine-tunes.
      side_by_side: fine-tunes in a set.
      pictures: noised pictures of each adapter a step.
      lr: highest learning rate of AdamW; falls to zero along a cosine.
      weight_decay: AdamW's.
    """

    rounds: int = 40
    side_by_side: int = 32
    pictures: int = 2
    lr: float = 3e-3
    weight_decay: float = 5e-4

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """The optimiser, for fine-tunes of so many steps."""
        rate = optax.cosine_decay_schedule(self.lr, self.rounds * steps)
        adamw = optax.adamw(rate, weight_decay=self.weight_decay)
        return optax.flatten(optax.chain(optax.clip_by_global_norm(1.0), adamw))


def own_loss(
    size: Size,
    params: Params,
    noised: int,
    lora: Adapter,
    private: Private,
    context: Float[Array, "context width"],
    keys: Any,
) -> Float[Array, ""]:
    """Mean noise loss of a fine-tune's model on its own pictures under one context.

    Args:
      size: of the model.
      params: base weights.
      noised: pictures that are drawn and noised.
      lora: the adapter.
      private: what it was tuned on, without the leading axis.
      context: under which the noise is predicted.
      keys: two, of the draw and of the noise.
    """
    pick = jax.random.randint(keys[0], (noised,), 0, private.counts)
    where = jnp.broadcast_to(context, (noised, *context.shape))
    return jnp.mean(noise_loss(size, params, lora, keys[1], private.pictures[pick], where))


@partial(jax.jit, static_argnums=(0, 1, 3), donate_argnums=(6, 7))
def _round(
    lessons: Lessons,
    reader: Reader,
    recipe: Recipe,
    size: Size,
    params: Params,
    public: Public,
    weights: Any,
    state: Any,
    private: Private,
    key: Array,
) -> tuple[Any, Any, Array]:
    """One set of fine-tunes, the encoder learning at every step."""
    keys = jax.random.split(key, len(private.counts))
    lora, own = jax.vmap(lambda k: begin(recipe, size, jax.random.fold_in(k, 0)))(keys)
    start, optimizer = lora, lessons.optimizer(recipe.steps)
    step = partial(tune_step, recipe, size, params, public)
    loss = partial(own_loss, size, params, lessons.pictures)

    def body(carry: Any, number: Array) -> tuple[Any, Array]:
        lora, own, weights, state = carry
        now = jax.vmap(lambda k: jax.random.fold_in(k, number + 1))(keys)
        lora, own = jax.vmap(step)(private, lora, own, now)
        for_sample, *then = jax.random.split(jax.random.fold_in(now[0], 7), len(keys) + 1)

        def mean_loss(w: Any) -> Array:
            contexts = contexts_of(reader, size, w, lora, start, number + 1, for_sample)
            pairs = jax.vmap(jax.random.split)(jnp.stack(then))
            return jnp.mean(jax.vmap(loss)(lora, private, contexts[:, 0], pairs))

        value, gradient = jax.value_and_grad(mean_loss)(weights)
        return (lora, own, *descend(optimizer, gradient, weights, state)), value

    carry, losses = lax.scan(body, (lora, own, weights, state), jnp.arange(recipe.steps))
    return carry[2], carry[3], losses


def learn(
    lessons: Lessons,
    reader: Reader,
    recipe: Recipe,
    size: Size,
    params: Params,
    public: Public,
    private: Private,
    key: Array,
    progress: Progress | None = None,
) -> tuple[Any, Float[np.ndarray, " round"]]:
    """An encoder trained on public identities.

    Args:
      lessons: how.
      reader: sizes of the encoder.
      recipe: the victims'.
      size: of the model.
      params: its weights.
      public: for the class prior.
      private: what could be fine-tuned on; every round draws from it.
      key: of weights, fine-tunes and noise.
      progress: called with ("encoder", done, total).

    Returns:
      Weights of the encoder, and the mean loss of every round.
    """
    lora, _ = begin(recipe, size, key)
    weights = init_encoder(reader, size, jax.random.fold_in(key, 0), lora)
    state, means = lessons.optimizer(recipe.steps).init(weights), []
    for number in range(lessons.rounds):
        now = jax.random.fold_in(key, number + 1)
        rows = jax.random.choice(now, len(private), (lessons.side_by_side,), replace=False)
        weights, state, losses = _round(
            lessons, reader, recipe, size, params, public, weights, state, private[rows], now
        )
        means.append(float(jnp.mean(losses)))
        if progress is not None:
            progress("encoder", number + 1, lessons.rounds)
    return weights, np.array(means)


@partial(jax.jit, static_argnums=(0, 1, 6))
def _reconstruct(
    reader: Reader,
    size: Size,
    params: Params,
    weights: Any,
    lora: tuple[Adapter, Adapter | None, Adapter],
    step: Array,
    samples: int,
    key: Array,
) -> Array:
    seen, start, through = lora
    for_contexts, for_noise = jax.random.split(key)
    contexts = contexts_of(reader, size, weights, seen, start, step, for_contexts, samples)
    keys = jax.random.split(for_noise, len(contexts))
    return jax.vmap(partial(sample, size, params))(through, keys, contexts)


def reconstruct(
    reader: Reader,
    size: Size,
    params: Params,
    weights: Any,
    lora: Adapter,
    step: int,
    key: Array,
    start: Adapter | None = None,
    samples: int = 4,
    through: Adapter | None = None,
) -> Float[Array, "tune sample side side"]:
    """Pictures that the victims' own models draw under the encoder's contexts.

    Args:
      reader: sizes of the encoder.
      size: of the model.
      params: base weights.
      weights: of the encoder.
      lora: victims' adapters, with a leading axis.
      step: fine-tuning steps that they are taken to have had.
      key: of contexts and noise.
      start: factors before training; only for an encoder of "factors".
      samples: pictures of each.
      through: adapters of the models that draw; those that are read if None.
    """
    every = (lora, start, lora if through is None else through)
    return _reconstruct(reader, size, params, weights, every, jnp.float32(step), samples, key)


@partial(jax.jit, static_argnums=(0, 4))
def draw(
    size: Size,
    params: Params,
    lora: Adapter,
    context: Float[Array, "tune *sample context width"],
    samples: int,
    key: Array,
) -> Float[Array, "tune sample side side"]:
    """Pictures that each victim's model draws under contexts of its own.

    Args:
      size: of the model; static.
      params: base weights.
      lora: adapters, with a leading axis.
      context: of each, or of each of its pictures.
      samples: pictures of each; static.
      key: of the noise.
    """

    def one(own: Adapter, where: Array, k: Array) -> Array:
        if where.ndim == 3:
            return sample(size, params, own, k, where)
        return sample(size, params, own, k, jnp.broadcast_to(where, (samples, *where.shape)))

    return jax.vmap(one)(lora, context, jax.random.split(key, len(context)))
