"""Captions of eight words that describe what a picture looks like.

A stand-in for text: each word names the nearest of sixteen cluster centres of two principal
components of the picture, all fitted on public pictures. So the model knows what words mean, and a
context can ask for shapes that it has not seen, as text can of a large model.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

#: Centres of each word, and words of a caption.
CENTRES, WORDS = 16, 8
_PART = 2


@dataclasses.dataclass(frozen=True)
class Captioner:
    """Fitted components and centres.

    Attributes:
      mean: [pixel].
      components: [pixel, 2 * word], principal ones.
      centres: [word, centre, 2].
    """

    mean: Float[np.ndarray, " pixel"]
    components: Float[np.ndarray, "pixel component"]
    centres: Float[np.ndarray, "word centre part"]


def fit(pictures: Float[np.ndarray, "b side side"], seed: int = 0) -> Captioner:
    """Components and centres of public pictures.

    Args:
      pictures: public ones.
      seed: of the first centres.
    """
    flat = np.asarray(pictures, np.float64).reshape(len(pictures), -1)
    mean = flat.mean(axis=0)
    flat = flat - mean
    _, basis = np.linalg.eigh(np.matmul(flat.T, flat))
    components = basis[:, ::-1][:, : WORDS * _PART]
    parts = np.matmul(flat, components).reshape(len(flat), WORDS, _PART)
    rng, centres = np.random.default_rng(seed), []
    for k in range(WORDS):
        own = parts[:, k]
        found = own[rng.choice(len(own), CENTRES, replace=False)]
        for _ in range(20):
            nearest = _nearest(own, found)
            groups = [own[nearest == c] for c in range(CENTRES)]
            found = np.stack(
                [g.mean(axis=0) if len(g) else f for g, f in zip(groups, found, strict=True)]
            )
        centres.append(found)
    return Captioner(mean, components, np.stack(centres))


def captions(
    captioner: Captioner, pictures: Float[np.ndarray, "b side side"]
) -> Int[np.ndarray, "b word"]:
    """Words of pictures: word k is one of 16 k to 16 k + 15.

    Args:
      captioner: fitted.
      pictures: any.
    """
    flat = np.asarray(pictures, np.float64).reshape(len(pictures), -1) - captioner.mean
    parts = np.matmul(flat, captioner.components).reshape(len(flat), WORDS, _PART)
    found = [_nearest(parts[:, k], captioner.centres[k]) + CENTRES * k for k in range(WORDS)]
    return np.stack(found, axis=1).astype(np.int32)


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((points[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
