"""The world of an experiment: public glyphs, a base trained on them, a judge, victims.

Held-out identities are never seen by the base, the judge or the attacker; of their views, victims
fine-tune on half, and the gallery that reconstructions are compared with is made of the rest. The
attacker's public identities are not those that the base was trained on either: updates of a base
that knows the picture already are of another kind than the victims'.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from benchmarks.leak import glyphs as data
from jdetune.checkpoint import open_checkpoint, read_tensor, save_safetensors
from jdetune.leak import captions, recogniser, tuning
from jdetune.leak.denoiser import Adapter, Size
from jdetune.leak.tuning import Private, Public, Recipe, Training
from jdetune.models import Params
from jdetune.models.layers import Lora

#: Views that a fine-tune is given, and places for them.
PRIVATE_VIEWS, PLACES = 4, 6


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large an experiment is.

    Attributes:
      held_out: identities of victims; one victim each.
      taught: identities that the base is trained on.
      bank: public fine-tunes that the attacker makes.
      size: of the model.
      training: of the base.
      judge: of the recogniser.
      recipe: of fine-tunes.
      at_once: fine-tunes side by side.
    """

    held_out: int = 128
    taught: int = 400
    bank: int = 1024
    size: Size = Size()
    training: Training = Training()
    judge: recogniser.Judge = recogniser.Judge()
    recipe: Recipe = Recipe()
    at_once: int = 64


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one seed gives.

    Attributes:
      scale: of the experiment.
      seed: of everything random.
      params: the base.
      network: the recogniser.
      public: captioned public pictures.
      known: public identities of the attacker.
      held: held-out identities.
      victims: what victims train on.
      seen: [victim, view], numbers of those views.
      gallery: [victim, width], vectors of the views that they do not train on.
      usual: mean public picture.
      cache: folder for fine-tunes, or None.
    """

    scale: Scale
    seed: int
    params: Params
    network: Any
    public: Public
    known: data.Glyphs
    held: data.Glyphs
    victims: Private
    seen: np.ndarray
    gallery: np.ndarray
    usual: np.ndarray
    cache: Path | None = None

    def key(self, number: int) -> jax.Array:
        """A random key for one use."""
        return jax.random.fold_in(jax.random.key(self.seed), number)

    @property
    def targets(self) -> np.ndarray:
        """Mean private picture of every victim."""
        return mean_pictures(self.victims)

    def unseen(self) -> np.ndarray:
        """Views that victims do not train on, [victim, view, side, side]."""
        return _others(self.held.images, self.seen)


def make(scale: Scale, seed: int, cache: Path | None = None) -> Setting:
    """Trains base and judge, and draws the victims' data.

    Args:
      scale: of the experiment.
      seed: of everything random.
      cache: folder for trained weights; those of a former run are used.
    """
    every, key = data.glyphs(), jax.random.key(seed)
    order = np.random.default_rng((seed, 1)).permutation(len(every))
    images, classes = every.images[order], every.classes[order]
    characters = "".join(every.characters[i] for i in order)
    mixed = data.Glyphs(images, classes, characters)
    until = scale.held_out + scale.taught
    held, taught, known = mixed[: scale.held_out], mixed[scale.held_out : until], mixed[until:]
    flat = taught.images.reshape(-1, data.SIDE, data.SIDE)
    words = captions.captions(captions.fit(flat, seed), flat)
    public = Public(jnp.asarray(flat), jnp.asarray(words))
    params = _kept(
        cache
        and cache / f"base-{_hash(scale.size, scale.training, scale.taught)}-{seed}.safetensors",
        lambda: tuning.pretrain(scale.training, scale.size, public, jax.random.fold_in(key, 1)),
    )
    shown = jnp.asarray(mixed[scale.held_out :].images)
    network = _kept(
        cache and cache / f"judge-{_hash(scale.held_out, scale.judge)}-{seed}.safetensors",
        lambda: recogniser.train(scale.judge, shown, jax.random.fold_in(key, 2)),
    )
    rng = np.random.default_rng((seed, 2))
    victims, seen = private_sets(scale, held, np.arange(len(held)), rng)
    gallery = recogniser.gallery(network, _others(held.images, seen))
    usual = flat.mean(axis=0)
    return Setting(
        scale, seed, params, network, public, known, held, victims, seen, gallery, usual, cache
    )


def private_sets(
    scale: Scale,
    source: data.Glyphs,
    identities: np.ndarray,
    rng: np.random.Generator,
    counts: np.ndarray | None = None,
) -> tuple[Private, np.ndarray]:
    """Some of each identity's views, half if not said, and a random trigger; also which views."""
    views = np.stack([rng.permutation(data.VIEWS)[:PLACES] for _ in identities])
    pictures = source.images[identities[:, None], views]
    shape = (len(identities), scale.size.context)
    triggers = rng.integers(*scale.training.rare, shape).astype(np.int32)
    if counts is None:
        counts = np.full(len(identities), PRIVATE_VIEWS)
    private = Private(
        jnp.asarray(pictures), jnp.asarray(counts.astype(np.int32)), jnp.asarray(triggers)
    )
    return private, views[:, :PRIVATE_VIEWS]


def mean_pictures(private: Private) -> np.ndarray:
    """Mean private picture of every fine-tune."""
    used = np.arange(private.pictures.shape[1]) < np.asarray(private.counts)[:, None]
    total = (np.asarray(private.pictures) * used[..., None, None]).sum(axis=1)
    return total / np.asarray(private.counts)[:, None, None]


def whole(private: Private) -> Private:
    """The same without empty places, for DP-SGD; all have equally many pictures."""
    count = int(np.asarray(private.counts)[0])
    return Private(private.pictures[:, :count], private.counts, private.triggers)


@dataclasses.dataclass(frozen=True)
class Made:
    """The attacker's fine-tunes.

    Attributes:
      lora: factors, [tune, ...] or [kept, tune, ...].
      private: what they were trained on.
      identities: [tune], number among the public identities.
    """

    lora: Adapter
    private: Private
    identities: np.ndarray

    @property
    def targets(self) -> np.ndarray:
        """Mean picture that each was trained on."""
        return mean_pictures(self.private)


def make_bank(
    setting: Setting,
    recipe: Recipe,
    number: int = 0,
    keep: tuple[int, ...] | None = None,
) -> Made:
    """Public fine-tunes by a recipe; identities come round in turn."""
    scale = setting.scale
    rng = np.random.default_rng((setting.seed, 3, number))
    identities = np.arange(scale.bank) % len(setting.known)
    private, _ = private_sets(scale, setting.known, identities, rng)
    private = private if recipe.noise is None else whole(private)
    lora = tune(setting, recipe, private, 100 + number, keep)
    return Made(lora, private, identities)


def tune(
    setting: Setting,
    recipe: Recipe,
    private: Private,
    number: int,
    keep: tuple[int, ...] | None = None,
) -> Adapter:
    """Fine-tunes of the setting's base; those of a former run are used."""
    scale, cache = setting.scale, setting.cache
    own = _hash(scale.size, scale.training, scale.taught, recipe, keep, scale.at_once, len(private))

    def train() -> dict[str, Any]:
        lora = tuning.fine_tune(
            recipe, scale.size, setting.params, setting.public, private, setting.key(number), keep,
            scale.at_once,
        )  # fmt: skip
        return {path: {"a": pair.a, "b": pair.b} for path, pair in lora.items()}

    found = _kept(cache and cache / f"tunes-{own}-{number}-{setting.seed}.safetensors", train)
    return {path: Lora(pair["a"], pair["b"]) for path, pair in found.items()}


def _others(images: np.ndarray, seen: np.ndarray) -> np.ndarray:
    rest = np.stack([np.setdiff1d(np.arange(images.shape[1]), one) for one in seen])
    return images[np.arange(len(images))[:, None], rest]


def _hash(*of: Any) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()[:12]


def _kept(path: Path | None, make: Callable[[], Any]) -> Any:
    """Weights from a file, or made and written to it."""
    if path is None:
        return make()
    if not path.exists():
        flat = traverse_util.flatten_dict(make(), sep="/")
        save_safetensors(path, {name: np.asarray(array) for name, array in flat.items()})
    checkpoint = open_checkpoint(path)
    flat = {name: jnp.asarray(read_tensor(checkpoint, name)) for name in checkpoint.tensors}
    return traverse_util.unflatten_dict(flat, sep="/")
