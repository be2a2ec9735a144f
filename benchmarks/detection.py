"""Which directions of an update stand out of the rounding: singular values and the floor."""

import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Layer
from benchmarks.families import Factors
from jdetune import linalg
from jdetune.solvers.pairs import noise_scales
from jdetune.stack import narrowest


def singular_values(
    update: Factors, scales: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Singular values of a true update, largest first, without forming it.

    Args:
      update: the update.
      scales: row and column factors to divide it by first; none if None.
    """
    left, right = update.left.astype(np.float64), update.right.T.astype(np.float64)
    if scales is not None:
        left, right = left / scales[0][:, None], right / scales[1][:, None]
    small = np.linalg.qr(left)[1] @ np.linalg.qr(right)[1].T
    return np.linalg.svd(small, compute_uv=False) * abs(update.scaling)


def whitening(merged: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column factors of the rounding error that the solver divides differences by."""
    dtype = jnp.dtype("float64")
    with linalg.scope(dtype):
        row, col = noise_scales(narrowest(merged), dtype)
        return np.asarray(row), np.asarray(col)


def above_floor(layer: Layer, floor: float) -> list[int]:
    """How many singular values of each true update lie above the detection floor."""
    return [int(np.sum(singular_values(one) > floor)) for one in layer.updates]


def stored_above_floor(layer: Layer, floor: float) -> list[int]:
    """The same of what is left of the updates in the stored models, once rounding has been at it.

    Where updates are small against the grid the base lies on, most elements do not move at all.
    """
    base = layer.base.astype(np.float64)
    moved = [one.astype(np.float64) - base for one in layer.merged]
    return [int(np.sum(np.linalg.svd(one, compute_uv=False) > floor)) for one in moved]


def margins(layer: Layer, floor: float, whitened: bool = False) -> list[float]:
    """Smallest singular value of each true update over the floor: above 1 it can be seen.

    Args:
      layer: the layer.
      floor: ``stats["detection_floor"]``; NaN where the solver gave none.
      whitened: in the units that the solver measures in, in place of the weights' own.
    """
    scales = whitening(layer.merged) if whitened else None
    return [float(singular_values(one, scales)[-1] / floor) for one in layer.updates]
