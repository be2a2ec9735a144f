"""How well reconstructions show who was in the private pictures, with bootstrap intervals."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jdetune.leak import recogniser
from jdetune.types import Array


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and where 95% of its bootstrap resamples lie.

    Attributes:
      mean: of the victims.
      low: 2.5% of resamples are below.
      high: 2.5% are above.
    """

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Score:
    """What an attack achieves; one entry a victim.

    Attributes:
      top1: the right identity comes first among all.
      top5: among the first five.
      in_class: the right identity comes first among those of its class.
      cosine: of the reconstruction's vector with the identity's.
      error: squared error to the mean private picture over that of the mean public picture.
      class_chance: one over the identities of its class.
    """

    top1: Bool[np.ndarray, " victim"]
    top5: Bool[np.ndarray, " victim"]
    in_class: Bool[np.ndarray, " victim"]
    cosine: Float[np.ndarray, " victim"]
    error: Float[np.ndarray, " victim"]
    class_chance: Float[np.ndarray, " victim"]

    def summary(self) -> dict[str, Any]:
        """Intervals of all figures, as plain numbers."""
        return {
            field.name: dataclasses.asdict(interval(getattr(self, field.name)))
            for field in dataclasses.fields(self)
        }


def interval(
    values: Bool[np.ndarray, " n"] | Float[np.ndarray, " n"], draws: int = 2000
) -> Interval:
    """Mean with its 95% percentile bootstrap interval, always with the same draws.

    Args:
      values: one a victim.
      draws: resamples.

    Example:
      >>> interval(np.array([1.0, 1.0, 1.0]))
      Interval(mean=1.0, low=1.0, high=1.0)
    """
    values = np.asarray(values, np.float64)
    pick = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[pick].mean(axis=1), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def score(
    network: Any,
    pictures: Float[Array, "victim *sample side side"],
    gallery: Float[np.ndarray, "identity width"],
    truth: Int[np.ndarray, " victim"],
    classes: Int[np.ndarray, " identity"],
    private: Float[np.ndarray, "victim side side"],
    usual: Float[np.ndarray, "side side"],
) -> Score:
    """Scores reconstructions.

    Args:
      network: the recogniser.
      pictures: reconstructions; the vectors of several samples are averaged.
      gallery: vectors of the identities, of pictures that no fine-tune has seen.
      truth: number of each victim's identity.
      classes: class of every identity.
      private: mean private picture of each victim.
      usual: mean public picture.

    Raises:
      ValueError: a reconstruction is not finite.
    """
    pictures = np.asarray(pictures, np.float32)
    if not np.isfinite(pictures).all():
        raise ValueError("reconstructions are not finite")  # NaN would count as the best match
    vectors = recogniser.embed(network, pictures)
    if pictures.ndim == 4:
        vectors, pictures = vectors.mean(axis=1), pictures.mean(axis=1)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    likeness = np.matmul(vectors, gallery.T)
    own = likeness[np.arange(len(truth)), truth]
    above = likeness > own[:, None]
    same = classes[None] == classes[truth][:, None]
    squared = ((pictures - private) ** 2).sum(axis=(1, 2))
    return Score(
        top1=~above.any(axis=1),
        top5=above.sum(axis=1) < 5,
        in_class=~(above & same).any(axis=1),
        cosine=own.astype(np.float64),
        error=squared / ((usual - private) ** 2).sum(axis=(1, 2)).astype(np.float64),
        class_chance=1.0 / same.sum(axis=1),
    )
