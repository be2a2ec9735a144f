"""NaN and infinity in single models: where they are, and the update that the rest still shows."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jdetune import linalg
from jdetune.factors import balanced_factors
from jdetune.foreign import RELATED_SHARE
from jdetune.noise import Merged, as_merged
from jdetune.solvers.pairs import PairFactors, Scales, factor_pairs
from jdetune.stack import storage_dtypes
from jdetune.types import Array

#: A row or column is lost if more than this share of it is not finite.
LOST_SHARE = 0.5
#: What the update leaves over is within this many times the rounding error.
TAIL_LIMIT = {"float64": 4.0, "float32": 20.0}
#: First sketch width, its growth, and the room that it needs above the rank.
FIRST_WIDTH, GROWTH, HEADROOM = 48, 4, 8


class Damage(NamedTuple):
    """Where a matrix is not finite.

    Attributes:
      rows: lost rows.
      cols: columns lost in the other rows.
      scattered: elements outside lost rows and columns.
    """

    rows: Bool[np.ndarray, " row"]
    cols: Bool[np.ndarray, " col"]
    scattered: Bool[np.ndarray, "row col"]

    def __str__(self) -> str:
        """Rows, columns and elements in words."""
        if self.rows.all():
            return "every row"
        parts = [_count("row", self.rows), _count("column", self.cols)]
        if self.scattered.any():
            parts.append(_count("element", self.scattered))
        return " and ".join(filter(None, parts))


def finite_models(stack: Float[Array, "model row col"]) -> Bool[np.ndarray, " model"]:
    """Which models hold neither NaN nor infinity.

    Example:
      >>> finite_models(np.array([[[1.0]], [[np.inf]]], np.float32)).tolist()
      [True, False]
    """
    return np.array([_is_finite(np.asarray(model, np.float32)) for model in stack])


def _is_finite(model: Float[np.ndarray, "row col"]) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):  # the sum of squares takes half the time
        return bool(np.isfinite(np.vdot(model, model)) or np.isfinite(model).all())


def find_damage(model: Float[Array, "row col"]) -> Damage:
    """Lost rows, then lost columns, then single elements.

    Example:
      >>> weights = np.ones((3, 4), np.float32)
      >>> weights[1], weights[0, 2] = np.nan, np.inf
      >>> str(find_damage(weights))
      'row 1 and element (0, 2)'
    """
    bad = ~np.isfinite(np.asarray(model, np.float32))
    rows = bad.mean(axis=1) > LOST_SHARE
    rest = bad[~rows]
    cols = rest.mean(axis=0) > LOST_SHARE if len(rest) else np.zeros(bad.shape[1], bool)
    return Damage(rows, cols, bad & ~rows[:, None] & ~cols)


def own_update(
    model: Float[np.ndarray, "row col"], base: Float[np.ndarray, "row col"], dtype: jnp.dtype
) -> tuple[Float[np.ndarray, "row rank"], Float[np.ndarray, "rank col"]] | None:
    """Update of a model that is not finite everywhere, given the base.

    Lost rows and columns of the update are zero; single elements are what its other rows and
    columns say.

    Args:
      model: merged weights as stored.
      base: the recovered base, in the same dtype.
      dtype: dtype of the algebra.

    Returns:
      B and A as float32, or None if what is left is no low-rank update of the base.
    """
    found = find_damage(model)
    if found.rows.all():
        return None
    finite = np.isfinite(model.astype(np.float32))
    # of what is there: the base may lie on a coarser grid, what fills the holes is on none
    (storage,) = storage_dtypes(np.where(finite, model, 0).astype(model.dtype)[None])
    filled = np.where(finite, model, base)
    if found.scattered.any():
        by_row = found.scattered.any(axis=1).sum() <= found.scattered.any(axis=0).sum()
        if by_row:
            filled = _fill(filled, base, found.scattered, found.cols, storage, dtype)
        else:
            turned = (filled.T, base.T, found.scattered.T)
            filled = _fill(*turned, found.rows, storage, dtype).T
    return _factors(filled, base, storage, dtype)


def _fill(
    filled: np.ndarray,
    base: np.ndarray,
    missing: np.ndarray,
    lost: np.ndarray,
    storage: str,
    dtype: jnp.dtype,
) -> np.ndarray:
    """Completes rows from the row space of those that miss nothing, by least squares."""
    broken = np.any(missing, axis=1)
    known = _factors(np.where(broken[:, None], base, filled), base, storage, dtype)
    if known is None:
        return filled
    space, filled = known[1].T.astype(np.float64), filled.copy()
    for row in np.flatnonzero(broken):
        unknown = missing[row]
        seen = ~(unknown | lost)
        change = filled[row].astype(np.float64) - base[row].astype(np.float64)
        weights = np.linalg.lstsq(space[seen], change[seen], rcond=None)[0]
        value = base[row, unknown].astype(np.float64) + np.matmul(space[unknown], weights)
        filled[row, unknown] = value.astype(base.dtype)
    return filled


@functools.partial(jax.jit, static_argnames=("width", "dtype"))
def _factor(weights: Merged, width: int, dtype: jnp.dtype) -> tuple[PairFactors, Scales]:
    return factor_pairs(weights, width, dtype, batch_size=1)


def _factors(
    model: np.ndarray, base: np.ndarray, storage: str, dtype: jnp.dtype
) -> tuple[np.ndarray, np.ndarray] | None:
    """Balanced factors of a model's difference from the base; None if it is not low rank."""
    trio = np.stack([base, model, base])  # factor_pairs wants three; pair 0 is base minus model
    weights = as_merged(jnp.asarray(trio), [storage] * 3)
    smaller = min(model.shape)
    width = min(FIRST_WIDTH, smaller)
    with linalg.scope(dtype):
        while True:
            pairs, scales = _factor(weights, width, dtype)
            rank = int(pairs.ranks[0])
            if width == smaller or rank + HEADROOM <= width or rank > RELATED_SHARE * smaller:
                break
            width = min(GROWTH * width, smaller)
        if rank > RELATED_SHARE * smaller or pairs.tail_ratio[0] >= TAIL_LIMIT[str(dtype)]:
            return None
        kept = max(rank, 1)
        left = -pairs.left[0, :, :kept] * scales.row[:, None]
        right = pairs.right[0, :, :kept] * scales.col[:, None]
        core = jnp.diag(pairs.values[0, :kept])
        ranks = jnp.asarray([rank], jnp.int32)
        b, a = jax.jit(balanced_factors)(left[None], core[None], right[None], ranks)
        return np.asarray(b[0, :, :rank], np.float32), np.asarray(a[0, :rank], np.float32)


def _count(what: str, where: np.ndarray) -> str:
    """``row 3``, ``rows 3, 4``, ``elements (0, 2), (1, 5) and 7 more``; empty if there is none."""
    found = np.argwhere(where)
    if len(found) == 0:
        return ""
    said = [str(tuple(map(int, at))) if len(at) > 1 else str(int(at[0])) for at in found[:4]]
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return f"{what}{'s' if len(found) > 1 else ''} {', '.join(said)}{more}"
