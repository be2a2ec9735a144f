"""Public training of a denoiser, and LoRA fine-tunes of it: hundreds at once.

Fine-tunes share the base weights: ``jax.vmap`` over them, ``lax.scan`` over steps. Each sees its
private pictures under its own trigger, and public ones under their captions, so that it does not
forget what it knew (DreamBooth's class prior).
"""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Float, Int

from jdetune.leak.denoiser import Adapter, Size, init_lora, init_params, targets, vectors
from jdetune.leak.diffusion import noise_loss
from jdetune.models.params import Params
from jdetune.types import Array

#: Called with (stage, done, total).
Progress = Callable[[str, int, int], None]


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a victim fine-tunes. A pytree of rates, so that other rates need no new program.

    Attributes:
      steps: of Adam.
      lr: its learning rate, constant; a number.
      rank: of every factor.
      layers: last words of the adapted layers.
      batch: private pictures a step, drawn with replacement.
      prior: public pictures a step; their loss is added with weight one.
      clip: largest norm of the gradient; with ``noise``, of every private picture's own gradient.
      noise: DP-SGD's noise multiplier, or None. Every private picture is then used once a step
        (``batch`` is ignored), and public pictures are left out.
    """

    steps: int = _static(60)
    lr: Any = 0.02
    rank: int = _static(4)
    layers: tuple[str, ...] = _static(("q", "k", "v", "o", "up", "down"))
    batch: int = _static(3)
    prior: int = _static(1)
    clip: Any = 1.0
    noise: Any = None

    def optimizer(self, key: jax.Array) -> optax.GradientTransformation:
        """The optimiser of one fine-tune."""
        if self.noise is None:
            first = optax.clip_by_global_norm(self.clip)
        else:
            first = optax.contrib.differentially_private_aggregate(self.clip, self.noise, key)
        return optax.chain(first, optax.flatten(optax.adam(self.lr)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Private:
    """What fine-tunes are trained on.

    Attributes:
      pictures: [tune, picture, side, side], one fine-tune's without the first axis; past a tune's
        count they are not used.
      counts: [tune], pictures of each.
      triggers: [tune, context], words of its prompt.
    """

    pictures: Float[Array, "*tune picture side side"]
    counts: Int[Array, "*tune"]
    triggers: Int[Array, "*tune context"]

    def __len__(self) -> int:
        """Number of fine-tunes."""
        return len(self.counts)

    def __getitem__(self, part: Any) -> "Private":
        """Some of them."""
        return Private(self.pictures[part], self.counts[part], self.triggers[part])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Public:
    """Captioned pictures that anyone has.

    Attributes:
      pictures: [picture, side, side].
      words: [picture, context], captions.
    """

    pictures: Float[Array, "picture side side"]
    words: Int[Array, "picture context"]


def descend(
    optimizer: optax.GradientTransformation, gradient: Any, weights: Any, state: Any
) -> tuple[Any, Any]:
    """One step of an optimiser: weights and state after it."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and rates
        change, state = optimizer.update(gradient, state, weights)
    return optax.apply_updates(weights, change), state


def begin(recipe: Recipe, size: Size, key: Array) -> tuple[Adapter, Any]:
    """A new adapter and its optimiser state."""
    for_lora, for_noise = jax.random.split(key)
    lora: Any = init_lora(for_lora, targets(size, recipe.layers), recipe.rank)
    return lora, recipe.optimizer(for_noise).init(lora)


def tune_step(
    recipe: Recipe,
    size: Size,
    params: Params,
    public: Public,
    own: Private,
    lora: Adapter,
    state: Any,
    key: Array,
) -> tuple[Adapter, Any]:
    """One step of one fine-tune.

    Args:
      recipe: how.
      size: of the model; static.
      params: base weights, not changed.
      public: for the prior.
      own: of this fine-tune, without the leading axis.
      lora: its factors.
      state: of its optimiser.
      key: of this step.

    Returns:
      Factors and state after it.
    """
    keys = jax.random.split(key, 5)
    context = vectors(params, own.triggers)

    def private_loss(factors: Adapter, k: Array, pictures: Array) -> Array:
        where = jnp.broadcast_to(context, (len(pictures), *context.shape))
        return jnp.mean(noise_loss(size, params, factors, k, pictures, where))

    if recipe.noise is None:
        pick = jax.random.randint(keys[0], (recipe.batch,), 0, own.counts)
        prior = jax.random.randint(keys[1], (recipe.prior,), 0, len(public.pictures))
        pictures = jnp.concatenate([own.pictures[pick], public.pictures[prior]])
        where = jnp.broadcast_to(context, (recipe.batch, *context.shape))
        where = jnp.concatenate([where, vectors(params, public.words[prior])])

        def loss(factors: Adapter) -> Array:
            every = noise_loss(size, params, factors, keys[2], pictures, where)
            return jnp.mean(every[: recipe.batch]) + jnp.sum(every[recipe.batch :]) / max(
                recipe.prior, 1
            )

        gradient = jax.grad(loss)(lora)
    else:
        ks = jax.random.split(keys[3], own.pictures.shape[0])
        each = jax.vmap(jax.grad(private_loss), in_axes=(None, 0, 0))
        gradient = each(lora, ks, own.pictures[:, None])
    return descend(recipe.optimizer(keys[4]), gradient, lora, state)


@partial(jax.jit, static_argnums=1)
def _begin(recipe: Recipe, size: Size, keys: Array) -> tuple[Adapter, Any]:
    return jax.vmap(lambda key: begin(recipe, size, jax.random.fold_in(key, 0)))(keys)


@partial(jax.jit, static_argnums=1, donate_argnums=6)
def _advance(
    recipe: Recipe,
    size: Size,
    params: Params,
    public: Public,
    private: Private,
    keys: Array,
    carry: tuple[Adapter, Any],
    span: tuple[Array, Array],
) -> tuple[Adapter, Any]:
    """Fine-tunes side by side from one step to another; one program for any of them."""
    step = partial(tune_step, recipe, size, params, public)

    def body(number: Array, carry: tuple[Adapter, Any]) -> tuple[Adapter, Any]:
        now = jax.vmap(lambda key: jax.random.fold_in(key, number + 1))(keys)
        return jax.vmap(step)(private, *carry, now)

    return lax.fori_loop(*span, body, carry)


def _tune(
    recipe: Recipe,
    size: Size,
    params: Params,
    public: Public,
    private: Private,
    keys: Array,
    keep: tuple[int, ...],
) -> Adapter:
    """Factors after each of the steps to keep: [kept, tune, ...]."""
    carry, kept = _begin(recipe, size, keys), []
    for done, until in itertools.pairwise((0, *keep)):
        span = jnp.int32(done), jnp.int32(until)
        carry = _advance(recipe, size, params, public, private, keys, carry, span)
        kept.append(jax.tree.map(np.asarray, carry[0]))
    return jax.tree.map(lambda *xs: np.stack(xs), *kept)


def fine_tune(
    recipe: Recipe,
    size: Size,
    params: Params,
    public: Public,
    private: Private,
    key: Array,
    keep: tuple[int, ...] | None = None,
    at_once: int = 64,
    progress: Progress | None = None,
) -> Adapter:
    """LoRA fine-tunes of one base.

    Args:
      recipe: how.
      size: of the model.
      params: its weights.
      public: for the class prior.
      private: what each is trained on. With ``recipe.noise`` all have equally many pictures.
      key: of initial factors, batches and noise; every fine-tune has its own.
      keep: numbers of steps after which factors are kept, rising; the last one only if None.
      at_once: fine-tunes side by side; the last ones are filled up with repeats.
      progress: called with ("tune", done, total).

    Returns:
      Path to factors with a leading axis over tunes; [kept, tune, ...] if ``keep`` is given.
    """
    steps = (recipe.steps,) if keep is None else keep
    if recipe.noise is not None and np.any(np.asarray(private.counts) != private.pictures.shape[1]):
        raise ValueError("DP-SGD uses every picture once a step: counts must all be the same.")
    total, parts = len(private), []
    keys = jax.random.split(key, total)
    for start in range(0, total, at_once):
        rows = np.arange(start, start + at_once) % total
        found = _tune(recipe, size, params, public, private[rows], keys[rows], steps)
        parts.append(jax.tree.map(lambda x: np.asarray(x)[:, : total - start], found))  # noqa: B023
        if progress is not None:
            progress("tune", min(start + at_once, total), total)
    whole = jax.tree.map(lambda *xs: jnp.asarray(np.concatenate(xs, axis=1)), *parts)
    return whole if keep is not None else jax.tree.map(lambda x: x[0], whole)


@dataclasses.dataclass(frozen=True)
class Training:
    """How the base is trained.

    Attributes:
      steps: of Adam; the learning rate falls to zero along a cosine.
      batch: pictures a step.
      lr: highest learning rate.
      unsaid: share of words replaced by a random one that means nothing (`Training.rare`).
      silent: share of captions replaced by the empty word.
      rare: first and last number of the words that mean nothing; triggers are made of them.
    """

    steps: int = 4000
    batch: int = 64
    lr: float = 3e-3
    unsaid: float = 0.05
    silent: float = 0.1
    rare: tuple[int, int] = (128, 160)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _train(
    training: Training, size: Size, steps: int, params: Params, state: Any, public: Public, key: Any
) -> tuple[Params, Any]:
    optimizer = _adam(training)

    def body(carry: Any, k: Array) -> tuple[Any, None]:
        params, state = carry
        keys = jax.random.split(k, 6)
        pick = jax.random.randint(keys[0], (training.batch,), 0, len(public.pictures))
        words = public.words[pick]
        rare = jax.random.randint(keys[1], words.shape, *training.rare, dtype=words.dtype)
        words = jnp.where(jax.random.uniform(keys[2], words.shape) < training.unsaid, rare, words)
        silent = jax.random.uniform(keys[3], (training.batch, 1)) < training.silent
        words = jnp.where(silent, size.empty, words)
        pictures = public.pictures[pick]

        def loss(p: Params) -> Array:
            return jnp.mean(noise_loss(size, p, None, keys[4], pictures, vectors(p, words)))

        return descend(optimizer, jax.grad(loss)(params), params, state), None

    (params, state), _ = lax.scan(body, (params, state), jax.random.split(key, steps))
    return params, state


def _adam(training: Training) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(training.lr, training.steps)
    return optax.flatten(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)))


def pretrain(
    training: Training, size: Size, public: Public, key: Array, progress: Progress | None = None
) -> Params:
    """A base trained on public pictures with their captions.

    Args:
      training: how.
      size: of the model.
      public: pictures and captions.
      key: of weights, batches and noise.
      progress: called with ("base", done, total).
    """
    params = init_params(size, jax.random.fold_in(key, 0))
    state, chunk = _adam(training).init(params), min(200, training.steps)
    for done in range(0, training.steps, chunk):
        now, steps = jax.random.fold_in(key, done + 1), min(chunk, training.steps - done)
        params, state = _train(training, size, steps, params, state, public, now)
        if progress is not None:
            progress("base", done + steps, training.steps)
    return params
