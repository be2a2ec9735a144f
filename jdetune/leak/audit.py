"""A publisher's report on one adapter: what the attacks see in it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jdetune.checkpoint import read_adapter
from jdetune.errors import InputError
from jdetune.leak import byproducts, recogniser, ridge
from jdetune.leak.bank import Bank
from jdetune.leak.denoiser import WORDS, Adapter
from jdetune.leak.learning import draw
from jdetune.leak.updates import products
from jdetune.models.layers import Lora


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one attack drew.

    Attributes:
      picture: [side, side], -1 to 1.
      likeness: cosine with the true pictures' vector; None if those were not given.
      rank: place of the truth among it and the gallery, 1 is first; None likewise.
    """

    picture: Float[np.ndarray, "side side"]
    likeness: float | None
    rank: int | None


@dataclasses.dataclass(frozen=True)
class Audit:
    """A report.

    Attributes:
      attacks: name to what it drew.
      agreement: cosine between the vectors of both attacks' pictures; unrelated ones are near 0.
      count: estimated number of training pictures; None if the bank knows one number only.
      class_name: estimated class.
      candidates: identities that ranks are among.
    """

    attacks: dict[str, Seen]
    agreement: float
    count: int | None
    class_name: str
    candidates: int

    @property
    def identified(self) -> bool | None:
        """Whether an attack puts the truth first; None if the truth was not given."""
        ranks = [seen.rank for seen in self.attacks.values()]
        return None if None in ranks else 1 in ranks

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, without the pictures."""
        attacks = {
            name: {"likeness": seen.likeness, "rank": seen.rank}
            for name, seen in self.attacks.items()
        }
        return {
            "attacks": attacks,
            "identified": self.identified,
            "agreement": self.agreement,
            "count": self.count,
            "class": self.class_name,
            "candidates": self.candidates,
        }


def load_for(bank: Bank, path: str | Path) -> dict[str, Lora]:
    """Reads a PEFT adapter of the bank's base.

    Args:
      bank: that it is compared with.
      path: the folder.

    Raises:
      InputError: it adapts other layers, or shapes differ.
    """
    updates = read_adapter(path).updates
    found = {
        name.removesuffix(".weight"): Lora(
            jnp.asarray(one.right), jnp.asarray(one.left), one.scaling
        )
        for name, one in updates.items()
    }
    if set(found) != set(bank.lora):
        raise InputError(
            f"{path}: it adapts {', '.join(sorted(found)[:3])}..., the bank's fine-tunes "
            f"{', '.join(sorted(bank.lora)[:3])}.... Make a bank of this base and these layers."
        )
    for layer, pair in bank.lora.items():
        shapes = found[layer].b.shape[0], found[layer].a.shape[1]
        if shapes != (pair.b.shape[1], pair.a.shape[2]):
            raise InputError(
                f"{path}: {layer} is {shapes[0]}x{shapes[1]}, the bank's base has "
                f"{pair.b.shape[1]}x{pair.a.shape[2]}. Make a bank of this base."
            )
    return {layer: found[layer] for layer in bank.lora}


def load_pictures(bank: Bank, path: str | Path) -> np.ndarray:
    """Reads the training pictures, an .npy array [picture, side, side] in -1 to 1.

    Args:
      bank: whose base they are for.
      path: the file.

    Raises:
      InputError: it is no such array.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: is no .npy file ({error}). Save it with numpy.save.") from error
    side = bank.size.side
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
        raise InputError(f"{path}: holds no numbers. Save the pictures as one float array.")
    if found.ndim == 2:
        found = found[None]
    if found.ndim != 3 or found.shape[1:] != (side, side) or not len(found):
        raise InputError(f"{path}: shape {found.shape}, not [picture, {side}, {side}].")
    if not np.isfinite(found).all() or np.abs(found).max() > 1:
        raise InputError(f"{path}: values outside of -1 to 1. Scale the pictures.")
    return found.astype(np.float32)


def audit(
    bank: Bank,
    adapter: Adapter,
    pictures: Float[np.ndarray, "picture side side"] | None = None,
    samples: int = 8,
    seed: int = 0,
) -> Audit:
    """Attacks one adapter.

    Args:
      bank: public fine-tunes of its base.
      adapter: its factors, without a leading axis.
      pictures: what it was trained on, if the attacks are to be judged.
      samples: pictures that its model draws without a prompt.
      seed: of those.

    Returns:
      The report.
    """
    one = {layer: Lora(p.a[None], p.b[None], p.scaling) for layer, p in adapter.items()}
    every, own = np.asarray(products(bank.lora)), np.asarray(products(one))
    flat = bank.targets.reshape(len(bank.targets), -1)
    guess = ridge.predict(ridge.fit(every, flat), own)[0].reshape(bank.targets.shape[1:])
    silent = jnp.broadcast_to(
        bank.params[WORDS][bank.size.empty], (1, bank.size.context, bank.size.width)
    )
    drawn = np.asarray(draw(bank.size, bank.params, one, silent, samples, jax.random.key(seed)))[0]
    shown = {"regression": guess[None].astype(np.float32), "without a prompt": drawn}
    vectors = {name: _direction(bank, some) for name, some in shown.items()}
    truth = None if pictures is None else _direction(bank, pictures)
    names = [str(name) for name in bank.about.get("classes", ())]
    fitted = byproducts.fit_classes(
        every, bank.classes, max(len(names), int(bank.classes.max()) + 1)
    )
    number = int(byproducts.classify(fitted, own)[0])
    return Audit(
        attacks={
            name: _seen(some.mean(axis=0), vectors[name], truth, bank.gallery)
            for name, some in shown.items()
        },
        agreement=float(np.sum(vectors["regression"] * vectors["without a prompt"])),
        count=_count(bank, every, own, adapter),
        class_name=names[number] if number < len(names) else str(number),
        candidates=len(bank.gallery) + 1,
    )


def _direction(bank: Bank, pictures: np.ndarray) -> np.ndarray:
    vector = recogniser.embed(bank.network, pictures).mean(axis=0)
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def _seen(
    picture: np.ndarray, vector: np.ndarray, truth: np.ndarray | None, gallery: np.ndarray
) -> Seen:
    if truth is None:
        return Seen(picture, None, None)
    likeness = float(np.sum(vector * truth))
    others = np.sum(gallery * vector, axis=1)
    return Seen(picture, likeness, 1 + int(np.sum(others >= likeness)))


def _count(bank: Bank, every: np.ndarray, own: np.ndarray, adapter: Adapter) -> int | None:
    if len(np.unique(bank.counts)) < 2:
        return None
    known = next(iter(bank.lora.values())).a.shape[-2]
    rank = min(known, next(iter(adapter.values())).a.shape[0])
    spectra = byproducts.Spectra(byproducts.spectra(every, rank), bank.counts)
    return int(byproducts.vote(spectra, byproducts.spectra(own, rank))[0])
