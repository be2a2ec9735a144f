"""The attacks and their baselines on one set of victims."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.leak.setting import Made, Setting
from jdetune.leak import learning, ridge, scoring
from jdetune.leak.denoiser import WORDS, Adapter, vectors
from jdetune.leak.encoder import Reader, contexts_of
from jdetune.leak.updates import products
from jdetune.models import Params

#: Pictures drawn of each victim under one prompt, and triggers guessed, a picture each.
SAMPLES, GUESSES = 4, 24
#: Noised pictures of each victim, to see how well a context predicts the noise.
NOISED = 32
HONEST, SILENT, RIDGE = "honest prompt (utility)", "without a prompt", "ridge on B A"
USUAL = "mean of the trigger words"
MEAN, NEAREST, RANDOM = "mean public picture", "nearest public fine-tune", "random triggers"


def scored(setting: Setting, pictures: Any) -> dict[str, list[float]]:
    """Figures of every victim, as plain numbers."""
    victims = np.arange(len(setting.held))
    found = scoring.score(
        setting.network, np.asarray(pictures), setting.gallery, victims, setting.held.classes,
        setting.targets, setting.usual,
    )  # fmt: skip
    return {
        name: np.round(np.asarray(getattr(found, name), np.float64), 5).tolist()
        for name in ("top1", "top5", "in_class", "cosine", "error", "class_chance")
    }


def drawn(
    setting: Setting, lora: Adapter, number: int, params: Params | None = None
) -> dict[str, Any]:
    """What victims' models draw, by prompt: the honest one, none, other triggers, their mean.

    Which words triggers are made of is part of the recipe that the attacker knows.
    """
    size, params = setting.scale.size, setting.params if params is None else params
    honest = vectors(params, setting.victims.triggers)
    silent = jnp.broadcast_to(params[WORDS][size.empty], honest.shape)
    usual = usual_context(setting, params)
    found = {
        name: learning.draw(size, params, lora, context, SAMPLES, setting.key(number))
        for name, context in ((HONEST, honest), (SILENT, silent), (USUAL, usual))
    }
    shape = (len(honest), GUESSES, size.context)
    words = jax.random.randint(setting.key(number + 1), shape, *setting.scale.training.rare)
    guessed = learning.draw(
        size, params, lora, vectors(params, words), GUESSES, setting.key(number)
    )
    return {**found, RANDOM: guessed}


def usual_context(setting: Setting, params: Params) -> jax.Array:
    """The mean of the words that triggers are made of, for every victim."""
    usual = params[WORDS][slice(*setting.scale.training.rare)].mean(axis=0)
    return jnp.broadcast_to(usual, (len(setting.held), setting.scale.size.context, len(usual)))


def regressed(
    setting: Setting, bank: Mapping[str, Any], targets: np.ndarray, lora: Adapter
) -> dict[str, Any]:
    """What ridge says of victims, and the picture of the nearest fine-tune of the bank."""
    known, own = np.asarray(products(bank)), np.asarray(products(lora))
    fitted = ridge.fit(known, targets.reshape(len(targets), -1))
    guess = ridge.predict(fitted, own).reshape(-1, *targets.shape[1:])
    alike = np.matmul(ridge.features(own), ridge.features(known).T)
    return {RIDGE: guess, NEAREST: targets[alike.argmax(axis=1)]}


def pictures(setting: Setting, made: Made, lora: Adapter) -> dict[str, Any]:
    """What everything that needs no encoder draws of every victim."""
    usual = np.broadcast_to(setting.usual, setting.targets.shape)
    found = {MEAN: usual, **regressed(setting, made.lora, made.targets, lora)}
    return found | drawn(setting, lora, 20)


def plain(setting: Setting, made: Made, lora: Adapter) -> dict[str, dict[str, list[float]]]:
    """Scores of everything that needs no encoder."""
    return {name: scored(setting, p) for name, p in pictures(setting, made, lora).items()}


def encoded(
    setting: Setting,
    reader: Reader,
    weights: Any,
    lora: Adapter,
    step: int,
    start: Adapter | None = None,
    through: Adapter | None = None,
) -> Any:
    """Pictures that victims' models draw under the encoder's contexts."""
    return learning.reconstruct(
        reader, setting.scale.size, setting.params, weights, lora, step, setting.key(21), start,
        SAMPLES, through,
    )  # fmt: skip


def own_noise(
    setting: Setting,
    reader: Reader,
    weights: Any,
    lora: Adapter,
    step: int,
    start: Adapter | None = None,
) -> dict[str, list[float]]:
    """Loss of every victim's model on its own pictures, by context; the encoder is trained on it.

    The mean of the encoder's contexts and the mean trigger word are the same for all victims.
    """
    size, own = setting.scale.size, setting.victims
    made = contexts_of(reader, size, weights, lora, start, step, setting.key(22))[:, 0]
    contexts = {
        "encoder": made,
        "encoder, another victim's": jnp.roll(made, 1, axis=0),
        "encoder, mean of all": jnp.broadcast_to(made.mean(axis=0), made.shape),
        USUAL: usual_context(setting, setting.params),
        HONEST: vectors(setting.params, own.triggers),
    }

    keys = jax.random.split(setting.key(23), len(own))
    keys = jnp.stack([keys, jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)], axis=1)
    loss = partial(learning.own_loss, size, setting.params, NOISED)
    losses = jax.jit(jax.vmap(loss))
    return {
        name: np.round(losses(lora, own, one, keys), 5).tolist() for name, one in contexts.items()
    }
