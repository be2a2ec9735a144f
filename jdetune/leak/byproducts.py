"""What else an adapter tells: how many pictures it was trained on, and of what class.

The number is read as in "Dataset Size Recovery from LoRA Weights" (arXiv 2406.19395): the singular
values of every layer vote with their nearest neighbour in the bank.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from jdetune.leak import ridge


@dataclasses.dataclass(frozen=True)
class Spectra:
    """Logarithms of the singular values of a bank's updates, with what is known of each.

    Attributes:
      values: [tune, layer, rank].
      counts: [tune], pictures that each was trained on.
    """

    values: Float[np.ndarray, "tune layer rank"]
    counts: Int[np.ndarray, " tune"]


def spectra(
    products: Float[np.ndarray, "tune layer row col"], rank: int
) -> Float[np.ndarray, "tune layer rank"]:
    """Logarithms of the leading singular values.

    Args:
      products: from `updates.products`.
      rank: how many.
    """
    values = np.linalg.svd(np.asarray(products, np.float64), compute_uv=False)[..., :rank]
    return np.log(np.maximum(values, 1e-12)).astype(np.float32)


def vote(known: Spectra, unseen: Float[np.ndarray, "tune layer rank"]) -> Int[np.ndarray, " tune"]:
    """Counts by nearest neighbours, one a layer; the commonest wins, of several the smallest.

    Args:
      known: of the bank.
      unseen: of other adapters.
    """
    found = []
    for one in unseen:
        nearest = ((known.values - one) ** 2).sum(axis=2).argmin(axis=0)
        values, votes = np.unique(known.counts[nearest], return_counts=True)
        found.append(values[votes.argmax()])
    return np.array(found)


def fit_classes(
    products: Float[np.ndarray, "tune layer row col"], classes: Int[np.ndarray, " tune"], count: int
) -> ridge.Ridge:
    """A classifier of the private pictures' class: kernel ridge on one column a class.

    Args:
      products: of the bank.
      classes: of its pictures.
      count: of classes.
    """
    return ridge.fit(products, np.eye(count, dtype=np.float64)[classes])


def classify(
    fitted: ridge.Ridge, products: Float[np.ndarray, "tune layer row col"]
) -> Int[np.ndarray, " tune"]:
    """Classes of unseen adapters.

    Args:
      fitted: from `fit_classes`.
      products: theirs.
    """
    return ridge.predict(fitted, products).argmax(axis=1)
