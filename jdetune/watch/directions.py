"""Directions that a fine-tune added to the residual stream: left singular vectors of its updates.

After "Watch the Weights" (arXiv 2508.00161): of the two matrices of every block that write to the
residual stream, the leading singular vectors on the side that is written. Of factors B A they cost
the rank squared; the product is never made.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jdetune import linalg
from jdetune.errors import InputError
from jdetune.factors import balanced_factors
from jdetune.result import Recoveries
from jdetune.types import Array
from jdetune.watch.names import MATRICES, writer

#: Where directions are looked for. "written": in what the matrix itself puts out.
WHERE = ("residual", "sum", "written")
#: Singular values below this share of the largest are rounding, not directions.
_LEAST = 1e-6
#: One matrix's update: factors (B, A), as `jdetune.models` has them (Lora), or dense.
Update: TypeAlias = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Directions:
    """Unit vectors of the residual stream, by layer; slots that are not filled have value 0.

    Attributes:
      vectors: [layer, slot, width], float32.
      values: [layer, slot], their singular values, in units of the weights.
      places: where each layer's activations are: kind and number of `jdetune.models.hooks`.
      slots: matrix that each slot is from, empty if it is the place's own, and its rank there.
    """

    vectors: Float[Array, "*m layer slot width"]
    values: Float[Array, "*m layer slot"]
    places: tuple[tuple[str, int], ...] = dataclasses.field(metadata={"static": True})
    slots: tuple[tuple[str, int], ...] = dataclasses.field(metadata={"static": True})

    @property
    def valid(self) -> Bool[Array, "*m layer slot"]:
        """Slots that hold a direction."""
        return self.values > 0

    @property
    def count(self) -> int:
        """Number of directions."""
        return int(np.sum(np.asarray(self.valid)))

    def label(self, layer: int, slot: int) -> str:
        """A direction in words: its matrix, the number of its block, its rank from 0.

        Args:
          layer: place on the layer axis.
          slot: place on the slot axis.
        """
        kind, number = self.places[layer]
        matrix, rank = self.slots[slot]
        block = number - 1 if kind == "residual" else number
        return f"{matrix or kind} {block} #{rank}"


def directions(
    update: Mapping[str, Update] | Recoveries,
    top_k: int = 20,
    *,
    model: int | None = None,
    where: str = "residual",
    drop_last: int = 0,
    transposed: bool | None = None,
) -> Directions:
    """Leading left singular vectors of the matrices that write to the residual stream.

    Args:
      update: matrix name to its update: factors (B [row, rank], A [rank, col]), a
        ``jdetune.models.Lora``, or the dense difference [row, col]; or what `jdetune.recover`
        returned. Matrices that write elsewhere are passed over. Dense *weights* instead of updates
        give the base-free variant.
      top_k: directions of each matrix at most; the paper takes 20.
      model: which model of a recovery.
      where: "residual" after each block (the paper), "sum" before the last LayerNorm of a BERT's
        block, "written" in the output of each matrix alone.
      drop_last: leave out so many last layers; the paper's code leaves out 3.
      transposed: whether matrices are stored [in, out], so that the right vectors are taken; by
        their names if None (Flax kernels and GPT-2's Conv1D are).

    Raises:
      InputError: no matrix writes to the residual stream, or widths differ.

    Example:
      >>> factors = {"model.layers.0.mlp.down_proj.weight": (np.eye(4)[:, 1:2], np.ones((1, 6)))}
      >>> found = directions(factors)
      >>> np.round(np.asarray(found.vectors[0, 0]), 3).tolist(), found.label(0, 0)
      ([0.0, 1.0, 0.0, 0.0], 'mlp 0 #0')
    """
    if top_k < 1 or drop_last < 0 or where not in WHERE:
        raise ValueError(f"top_k is 1 or more, drop_last 0 or more, where one of {WHERE}")
    found = _found(update, model, transposed)
    layers = sorted({layer for layer, _ in found})
    layers = layers[: len(layers) - drop_last]
    if not layers:
        raise InputError(
            "No matrix of the update writes to the residual stream (attention output, MLP down). "
            "Where values or inner matrices changed, watch.carried (--carried) makes directions."
        )
    kept = {key: pair for key, pair in found.items() if key[0] in layers}
    return _arranged(_singular(kept, top_k), layers, where)


def difference(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Dense differences, in float32, of the matrices that write to the residual stream.

    Args:
      after: weights of the fine-tuned model by name.
      before: of its parent.
    """
    return {
        name: np.asarray(after[name], np.float32) - np.asarray(before[name], np.float32)
        for name in after
        if name in before and np.ndim(after[name]) == 2 and writer(name) is not None
    }


def factors_of(value: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Factors (B, A) of one update, in float64.

    Raises:
      InputError: it is no product.
    """
    parts = _parts(value, None)
    if parts is None or len(parts) != 2:
        raise InputError(f"{name}: factors (B, A) are expected.")
    return parts[0], parts[1]


def _found(
    update: Mapping[str, Update] | Recoveries, model: int | None, transposed: bool | None
) -> dict[tuple[int, str], tuple[np.ndarray, ...]]:
    """(layer, matrix) to factors, or to one dense matrix, with the written side as rows."""
    found: dict[tuple[int, str], tuple[np.ndarray, ...]] = {}
    if isinstance(update, Recoveries) and model is None:
        raise ValueError("say which model of the recovery: model=0 is the first")
    for name in update:
        place = writer(name)
        if place is None:
            continue
        parts = _parts(update[name], model)
        if parts is None:
            continue
        if place.transposed if transposed is None else transposed:
            parts = tuple(part.T for part in reversed(parts))
        key = (place.layer, place.matrix)
        if key in found:
            raise InputError(f"{name}: a second {place.matrix} matrix of block {place.layer}.")
        found[key] = parts
    widths = {len(parts[0]) for parts in found.values()}
    if len(widths) > 1:
        raise InputError(
            f"Matrices write vectors of different widths, {sorted(widths)}: say transposed=True "
            "where weights are stored [in, out]."
        )
    return found


def _parts(value: Any, model: int | None) -> tuple[np.ndarray, ...] | None:
    """Factors or a dense matrix; None for a layer that was not recovered."""
    if hasattr(value, "adapters"):
        if int(np.asarray(value.status)):
            return None
        parts = (value.adapters.left[model], value.adapters.right[model])
    elif hasattr(value, "scaling"):
        parts = (np.asarray(value.b, np.float64) * value.scaling, value.a)
    else:
        parts = tuple(value) if isinstance(value, tuple) else (value,)
    return tuple(np.asarray(part, np.float64) for part in parts)


def _singular(
    found: Mapping[tuple[int, str], tuple[np.ndarray, ...]], top_k: int
) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]:
    """(layer, matrix) to vectors [k, width] and values [k]; equal shapes in one program."""
    groups: dict[tuple, list[tuple[int, str]]] = {}
    for key, parts in found.items():
        groups.setdefault(tuple(part.shape for part in parts), []).append(key)
    result = {}
    dtype = linalg.resolve_dtype("auto")
    with linalg.scope(dtype):
        for shapes, keys in groups.items():
            stacks = [
                jnp.asarray(np.stack([found[key][i] for key in keys]), dtype)
                for i in range(len(shapes))
            ]
            if len(shapes) == 2:
                vectors, values = factor_vectors(*stacks, top_k=top_k)
            else:
                vectors, values = dense_vectors(*stacks, top_k=top_k)
            for key, u, s in zip(keys, np.asarray(vectors), np.asarray(values), strict=True):
                result[key] = (u, s)
    return result


@partial(jax.jit, static_argnames="top_k")
def factor_vectors(
    left: Float[jax.Array, "n row rank"], right: Float[jax.Array, "n rank col"], top_k: int
) -> tuple[Float[jax.Array, "n k row"], Float[jax.Array, "n k"]]:
    """Left singular vectors and values of ``left @ right``, largest first; 0 past the rank."""
    n, _, rank = left.shape
    eye = jnp.broadcast_to(jnp.eye(rank, dtype=left.dtype), (n, rank, rank))
    every = jnp.full(n, rank, jnp.int32)
    balanced, _ = balanced_factors(left, eye, jnp.swapaxes(right, 1, 2), every)
    balanced = jnp.swapaxes(balanced, 1, 2)[:, :top_k]
    values = jnp.sum(balanced * balanced, axis=-1)  # columns carry the root of their value
    vectors = balanced / jnp.where(values > 0, jnp.sqrt(values), 1)[..., None]
    return _cut(vectors, values)


@partial(jax.jit, static_argnames="top_k")
def dense_vectors(
    matrices: Float[jax.Array, "n row col"], top_k: int
) -> tuple[Float[jax.Array, "n k row"], Float[jax.Array, "n k"]]:
    """As `factor_vectors`, of dense matrices, from their Gram matrix on the written side."""
    gram = linalg.contract("nij,nkj->nik", matrices, matrices)
    squares, vectors = linalg.eigh_descending(gram)
    vectors = jnp.swapaxes(vectors, 1, 2)[:, : min(top_k, matrices.shape[2])]
    values = jnp.sqrt(jnp.maximum(squares[:, : vectors.shape[1]], 0))
    peak = jnp.take_along_axis(vectors, jnp.argmax(jnp.abs(vectors), axis=-1)[..., None], axis=-1)
    return _cut(jnp.where(peak < 0, -vectors, vectors), values)


def _cut(vectors: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Zeros where there is only rounding."""
    kept = values > _LEAST * values[:, :1]
    return jnp.where(kept[..., None], vectors, 0), jnp.where(kept, values, 0)


def _arranged(
    singular: Mapping[tuple[int, str], tuple[np.ndarray, np.ndarray]],
    layers: list[int],
    where: str,
) -> Directions:
    """The directions on a layer and a slot axis."""
    width = next(iter(singular.values()))[0].shape[1]
    most = {
        matrix: max((int(np.sum(s > 0)) for (_, m), (_, s) in singular.items() if m == matrix),
                    default=0)
        for matrix in MATRICES
    }  # fmt: skip
    if where == "written":
        rows = [(layer, (matrix,)) for layer in layers for matrix in MATRICES if most[matrix]]
        rows = [(layer, own) for layer, own in rows if (layer, own[0]) in singular]
        places = tuple((own[0], layer) for layer, own in rows)
        slots = tuple(("", rank) for rank in range(max(most.values())))
    else:
        rows = [(layer, MATRICES) for layer in layers]
        places = tuple((where, layer + (where == "residual")) for layer in layers)
        slots = tuple((matrix, rank) for matrix in MATRICES for rank in range(most[matrix]))
    vectors = np.zeros((len(rows), len(slots), width), np.float32)
    values = np.zeros(vectors.shape[:2], np.float32)
    for row, (layer, matrices) in enumerate(rows):
        for matrix in matrices:
            u, s = singular.get((layer, matrix), (vectors[row, :0], values[row, :0]))
            count = int(np.sum(s > 0))
            if not count:
                continue
            first = slots.index(("" if where == "written" else matrix, 0))
            vectors[row, first : first + count] = u[:count]
            values[row, first : first + count] = s[:count]
    if not np.any(values):
        raise InputError("The update is zero in every matrix that writes to the residual stream.")
    return Directions(jnp.asarray(vectors), jnp.asarray(values), places, slots)
