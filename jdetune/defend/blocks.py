r"""The change of coordinates between two fine-tunes that differ by low rank, block by block.

Of tensors that take T, :math:`X_0 - T X_i = D` is of low rank (the two updates) and rounding; of
those that take its inverse transpose, :math:`Z_i - T^T Z_0` is. Both are linear in T. Low rank is
asked for by reweighted least squares: the columns are weighed by
:math:`\Omega = (D^T D + \epsilon^2)^{-1}` of the last step, so that directions in which the updates
differ count for little and all others for much, and :math:`\epsilon`, the median singular value of
D and no less than the rounding error, falls with D. With :math:`\Omega` fixed every block solves

.. math::
   T\,(X_i \Omega X_i^T) + (Z_0 \Omega' Z_0^T)\,T = X_0 \Omega X_i^T + Z_0 \Omega' Z_i^T .

Steps are extrapolated by Anderson's rule.

Source: the reweighting is that of Mohan and Fazel, "Iterative reweighted algorithms for matrix rank
minimization", JMLR 2012; the use is this library's.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jdetune.defend.places import Place, gather

#: Steps at most, and the relative change of T at which they end: float32's own is 6e-8. Coarser
#: rounding leaves T less certain, and the second is the change as a share of it.
ROUNDS = 60
TOLERANCE, OF_ROUNDING = 2e-9, 1e-3
#: Steps that the next one is extrapolated from; without, three times as many are needed.
_PAST = 3
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
    """A tensor of both models as blocks [block, repeat, side, other].

    Attributes:
      reference: of the model whose coordinates are kept.
      model: of the other.
      dual: takes the inverse transpose of T.
      rounding: norm of the rounding errors of both over the norm of the reference.
    """

    reference: np.ndarray
    model: np.ndarray
    dual: bool
    rounding: float


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
        _View(
            gather(place, axis, reference[axis.name]),
            gather(place, axis, model[axis.name]),
            axis.dual,
            _rounding(reference[axis.name]),
        )
        for axis in place.axes
        if names is None or axis.name in names
    ]
    ours, theirs = (_balance(views, index) for index in (0, 1))
    views = [_in(view, ours, theirs) for view in views]
    weights = [_plain(view.reference) for view in views]
    blocks = _solve(views, weights)
    change, count, past = np.inf, 0, []
    enough = max(TOLERANCE, OF_ROUNDING * max(view.rounding for view in views))
    while count < rounds and change > enough:
        count += 1
        after = _solve(views, [_reweighted(view, blocks) for view in views])
        change = float(np.linalg.norm(after - blocks) / np.linalg.norm(after))
        past = [*past[-_PAST:], (after, after - blocks)]
        blocks = _ahead(past)
    blocks = np.matmul(np.linalg.inv(ours), np.matmul(blocks, theirs))
    return Fit(blocks, count, change)


def _balance(views: Sequence[_View], index: int) -> np.ndarray:
    r"""Coordinates S in which what makes z and what reads it weigh alike, [block, side, side].

    :math:`S G S = S^{-1} H S^{-1}` for the Gramians G and H of the two: however a model was
    stretched, T is close to a rotation then.
    """
    sides = [np.zeros(1), np.zeros(1)]
    for view in views:
        part = view[index]
        gram = np.sum(np.matmul(part, np.swapaxes(part, 2, 3)), axis=1)
        sides[view.dual] = sides[view.dual] + gram
    direct, dual = (_power(side, 1.0) if side.ndim == 3 else None for side in sides)
    if dual is None:
        assert direct is not None
        return _power(direct, -0.5)
    if direct is None:
        return _power(dual, 0.5)
    root, back = _power(direct, 0.5), _power(direct, -0.5)
    middle = _power(np.matmul(root, np.matmul(dual, root)), 0.5)
    return _power(np.matmul(back, np.matmul(middle, back)), 0.5)


def _power(symmetric: np.ndarray, power: float) -> np.ndarray:
    """Power of positive definite matrices; what is numerically zero counts as very small."""
    values, vectors = np.linalg.eigh(symmetric)
    values = np.maximum(values, 1e-12 * np.max(values, axis=-1, keepdims=True))
    values = np.maximum(values, np.finfo(np.float64).tiny)
    return np.matmul(vectors * values[..., None, :] ** power, np.swapaxes(vectors, -1, -2))


def _in(view: _View, ours: np.ndarray, theirs: np.ndarray) -> _View:
    """A view in balanced coordinates of each model."""
    if view.dual:
        ours, theirs = np.linalg.inv(ours), np.linalg.inv(theirs)  # symmetric
    return view._replace(
        reference=np.matmul(ours[:, None], view.reference),
        model=np.matmul(theirs[:, None], view.model),
    )


def _rounding(stored: np.ndarray) -> float:
    """What rounding leaves between two tensors of a dtype, as a share of their norm.

    A bias has one singular value, which is its own median: without this floor one that no update
    touched would be fitted at any price, and nothing else would count.
    """
    spacing = float(ml_dtypes.finfo(np.asarray(stored).dtype).eps) / np.sqrt(2)  # between 1/2 and 1
    return max(_LEAST, spacing * np.sqrt(2 / 12))


def residual(view: _View, blocks: np.ndarray) -> np.ndarray:
    """What of the reference the model does not explain, [row, other]."""
    if view.dual:
        blocks = np.swapaxes(np.linalg.inv(blocks), 1, 2)
    apart = view.reference - np.matmul(blocks[:, None], view.model)
    return apart.reshape(-1, apart.shape[-1])


def _ahead(past: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Anderson's extrapolation: the mix of the last steps that should have moved least."""
    (after, step), *earlier = past[::-1]
    if not earlier:
        return after
    moves = np.stack([(step - other).ravel() for _, other in earlier], axis=1)
    mix = np.linalg.lstsq(moves, step.ravel(), rcond=1e-10)[0]
    apart = zip(mix, earlier, strict=True)
    return after - sum(share * (after - other) for share, (other, _) in apart)


def _plain(reference: np.ndarray) -> np.ndarray:
    """Weights before anything is known: every tensor counts alike."""
    return np.eye(reference.shape[-1]) / max(np.mean(reference * reference), np.finfo(float).tiny)


def _reweighted(view: _View, blocks: np.ndarray) -> np.ndarray:
    apart = residual(view, blocks)
    square, vectors = np.linalg.eigh(np.matmul(apart.T, apart))
    # a wide residual has no more singular values than rows; eigh puts the largest last
    square = np.maximum(square, 0.0)
    middle = np.median(square[-len(apart) :])
    least = (view.rounding * np.linalg.norm(view.reference)) ** 2 / min(apart.shape)
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
