"""The counter-attack on changed coordinates: bring every model into those of the first.

Orders of units are found by assignment, all else by reweighted least squares (`blocks`). What comes
out is a stack that differs by low-rank updates and rounding again, for ``jdetune.recover``; its
base is in the coordinates of the first model, in which it computes what the true one does.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jdetune.defend.blocks import fit_blocks
from jdetune.defend.coordinates import Change, moved
from jdetune.defend.places import Place, gather, places
from jdetune.models.names import Model

#: Passes over places that share tensors; each is fitted with the others as they stand.
SWEEPS = 4
#: A fitted T that is this near to the identity is the identity: fits are off by 1e-7 at most.
_NONE = 1e-6


@dataclasses.dataclass(frozen=True)
class Aligned:
    """Models in the coordinates of the first.

    Attributes:
      models: name to array, each in its own dtype; the first as it was.
      changes: what was applied to each model, in order; none for the first.
    """

    models: list[dict[str, np.ndarray]]
    changes: list[tuple[Change, ...]]


def align(
    module: Model,
    models: Sequence[Mapping[str, np.ndarray]],
    where: Sequence[Place] | None = None,
) -> Aligned:
    """Undoes changes of coordinates between models of one base, from the models alone.

    Args:
      module: their architecture.
      models: weights by the names of ``jdetune.models``; others are passed on.
      where: the places to look at; every free one if None.

    Returns:
      The models in the first one's coordinates.

    Example:
      >>> import jax, numpy as np
      >>> from jdetune.defend import change_coordinates
      >>> from jdetune.models import Bert, BertConfig, init_params
      >>> bert = Bert(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1,
      ...     num_attention_heads=2, intermediate_size=16, max_position_embeddings=8))
      >>> weights = {n: np.asarray(w) for n, w in init_params(bert, jax.random.key(0)).items()}
      >>> release, _ = change_coordinates(bert, weights, seed=1)
      >>> back = align(bert, [weights, release]).models[1]
      >>> all(np.abs(back[name] - weights[name]).max() < 1e-7 for name in weights)
      True
    """
    free = tuple(places(module) if where is None else where)
    reference = {name: np.asarray(tensor) for name, tensor in models[0].items()}
    found = [reference]
    applied: list[tuple[Change, ...]] = [()]
    for model in models[1:]:
        changes = _changes(free, reference, model)
        found.append(moved(model, changes))
        applied.append(changes)
    return Aligned(found, applied)


def match(
    place: Place, reference: Mapping[str, np.ndarray], model: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Which unit of a model is each unit of the reference, [unit].

    The assignment of the largest sum of cosines between the units' weights, matrix by matrix.

    Args:
      place: of kind ``order``.
      reference: weights of the model whose order is kept.
      model: weights of the other.
    """
    alike = np.zeros((place.heads, place.heads))
    for axis in place.axes:
        if np.ndim(reference[axis.name]) == 2:
            one, two = (
                _unit(gather(place, axis, tensors[axis.name])[:, 0, 0])
                for tensors in (reference, model)
            )
            alike += np.matmul(one, two.T)
    order = np.argmax(alike, axis=1)
    if len(np.unique(order)) < len(order):  # JAX brings SciPy
        from scipy.optimize import linear_sum_assignment

        order = linear_sum_assignment(alike, maximize=True)[1]
    return order


def _changes(
    free: Sequence[Place], reference: Mapping[str, np.ndarray], model: Mapping[str, np.ndarray]
) -> tuple[Change, ...]:
    """All changes of one model, one after another."""
    names = [axis.name for place in free for axis in place.axes]
    wide = {n: np.asarray(model[n]).astype(np.float64) for n in set(names)}
    changes: list[Change] = []

    def apply(change: Change) -> None:
        wide.update(moved({n: wide[n] for n in wide}, [change]))
        changes.append(change)

    for place in free:
        change = _first(place, reference, wide)
        if not _is_none(change):
            apply(change)
    entangled = [
        place
        for place in (change.place for change in changes)
        if place.kind != "order" and any(names.count(axis.name) > 1 for axis in place.axes)
    ]
    for _ in range(SWEEPS if entangled else 0):
        for place in entangled:
            apply(Change(place, blocks=fit_blocks(place, reference, wide).blocks))
    return tuple(changes)


def _first(
    place: Place, reference: Mapping[str, np.ndarray], model: Mapping[str, np.ndarray]
) -> Change:
    """A place for the first time: a scale by its vectors alone, such as the norm's own weight.

    The matrices are still in other coordinates on their other side.
    """
    if place.kind == "order":
        return Change(place, order=match(place, reference, model))
    names = None
    if place.kind == "scale":
        own = [axis.name for axis in place.axes if np.ndim(model[axis.name]) == 1]
        told = sum(np.abs(model[name]) for name in own)
        names = own if own and np.all(told) else None  # no vector tells a coordinate that is zero
    return Change(place, blocks=fit_blocks(place, reference, model, names).blocks)


def _is_none(change: Change) -> bool:
    """Whether a change is none, but for the error of its fit: applying it would only round."""
    if change.order is not None:
        return bool(np.all(change.order == np.arange(len(change.order))))
    assert change.blocks is not None
    return bool(np.max(np.abs(change.blocks - np.eye(change.place.side))) < _NONE)


def _unit(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(length, np.finfo(float).tiny)
