r"""The counter-attack on a common direction: recover what is across it, and say what is lost.

If b lies in the column space of every update, it lies in that of every difference
:math:`W'_i - W'_j`; nothing else does. Of :math:`(I - b b^T) W'_i` the base is identifiable again.
Along b nothing tells the base from the updates, and the mean of the models stands in for it.
"""

import dataclasses
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float

#: Singular values above this many times the rounding's largest are directions.
_CLEAR = 2.0
#: Mean squared cosine with the differences' column spaces from which a direction is in all of them.
#: A direction of one update is in 2/n of them, and in the others as far as chance brings it.
_COMMON = 0.99


@dataclasses.dataclass(frozen=True)
class Across:
    """A stack without the directions that all differences share.

    Attributes:
      stack: [model, row, col], as the models, for ``jdetune.recover``.
      directions: orthonormal columns, [row, k]; k is 0 where nothing is shared.
      rest: mean of the models along the directions, [row, col] float64: to be added to the base.
    """

    stack: np.ndarray
    directions: np.ndarray
    rest: np.ndarray


def without_common(stack: Float[np.ndarray, "model row col"], rms: float | None = None) -> Across:
    """Takes out the column directions that all differences of two models share.

    Args:
      stack: merged weights of three models or more.
      rms: of what the models differ by beyond low rank; their dtype's rounding if None.

    Returns:
      What is left, and what to add to the base that is recovered from it.

    Example:
      >>> from jdetune import synth
      >>> from jdetune.defend import common_direction
      >>> merged = common_direction(synth.family(3, 64, 48, 4).merged, rms=1e-3, seed=0)
      >>> without_common(merged).directions.shape
      (64, 1)
    """
    n_models, row, _ = stack.shape
    wide, pairs = stack.astype(np.float64), list(combinations(range(n_models), 2))
    shared = np.zeros((row, row))
    for i, j in pairs:
        u, values, _ = np.linalg.svd(wide[i] - wide[j], full_matrices=False)
        if rms is None:
            edge = _edge(stack[i], stack[j])
        else:
            edge = np.sqrt(2.0) * rms * white_edge(stack.shape[1:])
        u = u[:, values > _CLEAR * edge]
        shared += np.matmul(u, u.T) / len(pairs)
    found, vectors = np.linalg.eigh(shared)
    directions = vectors[:, found > _COMMON]
    along = np.matmul(directions, np.matmul(directions.T, wide))
    return Across((wide - along).astype(stack.dtype), directions, np.mean(along, axis=0))


def white_edge(shape: Sequence[int]) -> float:
    """Largest singular value of white noise of unit variance, [row, col]."""
    return float(np.sum(np.sqrt(shape)))


def _edge(one: np.ndarray, two: np.ndarray) -> float:
    """Largest singular value of two models' rounding errors; see ``jdetune.noise.pair_edge``."""
    variance = sum(np.square(np.spacing(np.abs(x)).astype(np.float64)) / 12 for x in (one, two))
    rows = np.sqrt(np.max(np.sum(variance, axis=1)))
    return float(rows + np.sqrt(np.max(np.sum(variance, axis=0))))
