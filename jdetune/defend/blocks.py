r"""The change of coordinates between two fine-tunes that differ by low rank, block by block.

Of tensors that take T, :math:`X_0 - T X_i = D` is of low rank (the two updates) and rounding; of
those that take its inverse transpose, :math:`Z_i - T^T Z_0` is. Both are linear in T. Low rank is
asked for by reweighted least squares: the columns are weighed by
:math:`\Omega = (D^T D + \epsilon^2)^{-1}` of the last step, so that directions in which the updates
differ count for little and all others for much, and :math:`\epsilon`, the median singular value of
D, falls to the rounding error. With :math:`\Omega` fixed every block solves

.. math::
   T\,(X_i \Omega X_i^T) + (Z_0 \Omega' Z_0^T)\,T = X_0 \Omega X_i^T + Z_0 \Omega' Z_i^T .

Source: the reweighting is that of Mohan and Fazel, "Iterative reweighted algorithms for matrix rank
minimization", JMLR 2012; the use is this library's.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jdetune.defend.places import Place, gather

#: Steps at most, and the relative change of T at which they end.
ROUNDS = 60
TOLERANCE = 1e-11
#: Residuals below this share of the tensor are float64's own.
_LEAST = 1e-13


class Fit(NamedTuple):
    """A fitted change.

    Attributes:
      blocks: T, float64 [block, side, side]; brings the model into the reference's coordinates.
      rounds: steps that were made.
      moved: relative change of T in the last of them.
    """

    blocks: np.ndarray
    rounds: int
    moved: float


class _View(NamedTuple):
    """A tensor of both models as blocks [block, repeat, side, other]."""

    reference: np.ndarray
    model: np.ndarray
    dual: bool


def fit_blocks(
    place: Place,
    reference: Mapping[str, np.ndarray],
    model: Mapping[str, np.ndarray],
    names: Sequence[str] | None = None,
    rounds: int = ROUNDS,
) -> Fit:
    """T of a place of kind ``mix``, ``turn`` or ``scale``.

    Args:
      place: where.
      reference: weights of the model whose coordinates are kept.
      model: weights of the other.
      names: tensors to look at; all of the place if None.
      rounds: steps at most.

    Returns:
      The change that brings the model's tensors into the reference's coordinates.
    """
    views = [
        _View(*(gather(place, axis, some[axis.name]) for some in (reference, model)), axis.dual)
        for axis in place.axes
        if names is None or axis.name in names
    ]
    weights = [_plain(view.reference) for view in views]
    blocks = _solve(views, weights)
    change, count = np.inf, 0
    while count < rounds and change > TOLERANCE:
        weights = [_reweighted(view, blocks) for view in views]
        before, blocks = blocks, _solve(views, weights)
        change = float(np.linalg.norm(blocks - before) / np.linalg.norm(blocks))
        count += 1
    return Fit(blocks, count, change)


def residual(view: _View, blocks: np.ndarray) -> np.ndarray:
    """What of the reference the model does not explain, [row, other]."""
    if view.dual:
        blocks = np.swapaxes(np.linalg.inv(blocks), 1, 2)
    apart = view.reference - np.matmul(blocks[:, None], view.model)
    return apart.reshape(-1, apart.shape[-1])


def _plain(reference: np.ndarray) -> np.ndarray:
    """Weights before anything is known: every tensor counts alike."""
    return np.eye(reference.shape[-1]) / max(np.mean(reference * reference), np.finfo(float).tiny)


def _reweighted(view: _View, blocks: np.ndarray) -> np.ndarray:
    apart = residual(view, blocks)
    square, vectors = np.linalg.eigh(np.matmul(apart.T, apart))
    # a wide residual has no more singular values than rows; eigh puts the largest last
    square = np.maximum(square, 0.0)
    middle = np.median(square[-len(apart) :])
    least = (_LEAST * np.linalg.norm(view.reference)) ** 2
    return np.matmul(vectors / (square + middle + least), vectors.T)


def _solve(views: Sequence[_View], weights: Sequence[np.ndarray]) -> np.ndarray:
    """The Sylvester equation of every block, by the eigenvectors of its two Gramians."""
    blocks, side = views[0].model.shape[0], views[0].model.shape[2]
    own, dual, right = (np.zeros((blocks, side, side)) for _ in range(3))
    for view, weight in zip(views, weights, strict=True):
        if view.dual:
            dual += _product(view.reference, weight, view.reference)
            right += _product(view.reference, weight, view.model)
        else:
            own += _product(view.model, weight, view.model)
            right += _product(view.reference, weight, view.model)
    a, u = np.linalg.eigh(own)
    b, v = np.linalg.eigh(dual)
    total = np.maximum(b, 0)[:, :, None] + np.maximum(a, 0)[:, None, :]
    turned = np.matmul(np.swapaxes(v, 1, 2), np.matmul(right, u))
    least = np.finfo(float).eps * np.max(total, axis=(1, 2), keepdims=True)
    solved = turned / np.maximum(total, np.maximum(least, np.finfo(float).tiny))
    return np.matmul(v, np.matmul(solved, np.swapaxes(u, 1, 2)))


def _product(first: np.ndarray, weight: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Sum over repeats of ``first weight second^T``, [block, side, side]."""
    return np.sum(np.matmul(np.matmul(first, weight), np.swapaxes(second, 2, 3)), axis=1)
