r"""Changes of coordinates that leave what a model computes as it is.

In every free place z becomes :math:`T z`: what makes z is multiplied by T along that axis, what
reads it by :math:`T^{-T}`. Two releases with different T cannot be subtracted from each other.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jdetune.defend.places import Axis, Kind, Place, gather, places, scatter
from jdetune.errors import InputError
from jdetune.models.names import Model
from jdetune.models.params import layout
from jdetune.models.run import run

KINDS: tuple[Kind, ...] = ("order", "mix", "turn", "scale")


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of coordinates in one place.

    Attributes:
      place: where.
      order: old number of each new coordinate, [unit]; of kind ``order`` only.
      blocks: T, block by block, float64 [block, side, side]; of the other kinds.
    """

    place: Place
    order: np.ndarray | None = None
    blocks: np.ndarray | None = None


def draw(place: Place, rng: np.random.Generator, spread: float = 1.0) -> Change:
    r"""A random change that is free at a place.

    Args:
      place: where.
      rng: NumPy's generator.
      spread: factors are between 1/spread and spread, evenly in their logarithm: of a ``mix`` its
        singular values. 1 leaves lengths alone: rotations, and no change of kind ``scale``.
    """
    if place.kind == "order":
        return Change(place, order=rng.permutation(place.heads))
    reach = np.log(spread)
    count, side = place.blocks, place.side
    if place.kind == "mix":
        left, right = (_rotations(rng, count, side) for _ in range(2))
        values = np.exp(rng.uniform(-reach, reach, (count, 1, side)))
        return Change(place, blocks=np.matmul(left * values, right))
    size = np.exp(rng.uniform(-reach, reach, count))
    if place.kind == "scale":
        return Change(place, blocks=size[:, None, None])
    angle = rng.uniform(0, 2 * np.pi, count)
    cos, sin = size * np.cos(angle), size * np.sin(angle)
    return Change(place, blocks=np.stack([cos, -sin, sin, cos], -1).reshape(count, 2, 2))


def inverse(change: Change) -> Change:
    """The change that undoes a change."""
    if change.order is not None:
        return Change(change.place, order=np.argsort(change.order))
    assert change.blocks is not None
    return Change(change.place, blocks=np.linalg.inv(change.blocks))


def moved(tensors: Mapping[str, np.ndarray], changes: Sequence[Change]) -> dict[str, np.ndarray]:
    """Weights in other coordinates, computed in float64 and rounded once to their own dtypes.

    Args:
      tensors: name to array; more than the changes touch.
      changes: applied in their order.

    Raises:
      InputError: a tensor that a change touches is missing.
    """
    names = {axis.name for change in changes for axis in change.place.axes}
    if not names <= set(tensors):
        raise InputError(f"{min(names - set(tensors))}: missing, but a change of coordinates.")
    wide = {name: np.asarray(tensors[name]).astype(np.float64) for name in names}
    for change in changes:
        for axis in change.place.axes:
            wide[axis.name] = _along(wide[axis.name], axis, change)
    found = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    return found | {name: wide[name].astype(found[name].dtype) for name in wide}


def change_coordinates(
    module: Model,
    tensors: Mapping[str, np.ndarray],
    seed: int,
    kinds: Sequence[Kind] = KINDS,
    spread: float = 1.0,
) -> tuple[dict[str, np.ndarray], tuple[Change, ...]]:
    """A release of a model in coordinates of its own: it computes what the model computes.

    Args:
      module: the architecture, from ``jdetune.models.build`` or ``load``.
      tensors: its weights by the names of ``jdetune.models``; others are passed on.
      seed: of NumPy's generator; another one for every release.
      kinds: which changes to make.
      spread: of the lengths, see `draw`; 1 keeps them, so ``scale`` does nothing.

    Returns:
      The release, and what was changed.

    Raises:
      InputError: a tensor of the architecture is missing.

    Example:
      >>> import jax, numpy as np
      >>> from jdetune.models import Bert, BertConfig, init_params
      >>> bert = Bert(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1,
      ...     num_attention_heads=2, intermediate_size=16, max_position_embeddings=8))
      >>> weights = {n: np.asarray(w) for n, w in init_params(bert, jax.random.key(0)).items()}
      >>> release, changes = change_coordinates(bert, weights, seed=1)
      >>> name = "encoder.layer.0.attention.self.value.weight"
      >>> bool(np.abs(release[name] - weights[name]).max() > 0.01)
      True
      >>> output_change(bert, weights, release, np.int32([[3, 5, 7]])) < 1e-5
      True
    """
    rng = np.random.default_rng(seed)
    free = [place for place in places(module) if place.kind in kinds]
    changes = tuple(draw(place, rng, spread) for place in free)
    return moved(tensors, changes), changes


def output_change(
    module: Model,
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
    *inputs: np.ndarray,
) -> float:
    """How far outputs moved: rms of their difference over rms of the outputs.

    Args:
      module: the architecture of both.
      before: weights of one.
      after: weights of the other.
      *inputs: what the module is called with: ids and mask, or pixels.

    Returns:
      The ratio, of the logits if there are any, else of the last hidden states.
    """
    found = []
    for tensors in (before, after):
        own = {name: np.asarray(tensors[name], np.float32) for name in layout(module)}
        found.append(np.asarray(_outputs(module, own, *inputs), np.float64))
    apart = np.linalg.norm(found[1] - found[0])
    return float(apart / np.linalg.norm(found[0]))


@partial(jax.jit, static_argnums=0)
def _outputs(module: Model, params: Any, *inputs: Any) -> jax.Array:
    out = run(module, params, *inputs)
    return out.hidden if out.logits is None else out.logits


def _along(tensor: np.ndarray, axis: Axis, change: Change) -> np.ndarray:
    """A tensor whose axis is written in the new coordinates."""
    if change.order is not None:
        return np.take(tensor, change.order, axis=axis.axis)
    assert change.blocks is not None
    blocks = change.blocks
    if axis.dual:
        blocks = np.swapaxes(np.linalg.inv(blocks), 1, 2)
    parts = np.matmul(blocks[:, None], gather(change.place, axis, tensor))
    return scatter(change.place, axis, parts, tensor.shape)


def _rotations(rng: np.random.Generator, count: int, side: int) -> np.ndarray:
    """Random orthogonal matrices, [count, side, side]."""
    q, r = np.linalg.qr(rng.standard_normal((count, side, side)))
    return q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]
