r"""Defences that change the numbers of a release: noise, precision, rank, a common direction.

Each takes the merged weights of one matrix, :math:`[*model, row, col]`, and gives releases of that
shape and dtype, the sum rounded once. All but `lower_precision` cost what they add.
"""

from typing import Any, Literal

import ml_dtypes
import numpy as np
from jaxtyping import Float

#: What `lower_precision` rounds to.
Grid = Literal["bfloat16", "float16", "int8"]
_FLOATS: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_INT8 = 127


def dense_noise(
    weights: Float[np.ndarray, "*model row col"], rms: float, seed: int
) -> Float[np.ndarray, "*model row col"]:
    """Adds independent Gaussian noise to every element: a residual of full rank.

    Args:
      weights: merged weights.
      rms: standard deviation of the noise, in units of the weights.
      seed: of NumPy's generator.

    Example:
      >>> noisy = dense_noise(np.zeros((3, 100, 100), np.float32), rms=0.5, seed=0)
      >>> round(float(np.std(noisy)), 2)
      0.5
    """
    rng = np.random.default_rng(seed)
    return _added(weights, rms * rng.standard_normal(weights.shape))


def rank_residual(
    weights: Float[np.ndarray, "*model row col"], rank: int, rms: float, seed: int
) -> Float[np.ndarray, "*model row col"]:
    """Adds an independent random update of given rank to every model.

    With ranks r of the updates, three models' ranks no longer fit the smaller side of the matrix
    once 3 (r + rank) exceeds it.

    Args:
      weights: merged weights.
      rank: of what is added.
      rms: root mean square of its elements.
      seed: of NumPy's generator.

    Example:
      >>> added = rank_residual(np.zeros((2, 30, 20), np.float32), rank=4, rms=0.1, seed=0)
      >>> [int(np.linalg.matrix_rank(one, tol=1e-3)) for one in added]
      [4, 4]
    """
    rng = np.random.default_rng(seed)
    *models, row, col = weights.shape
    left = rng.standard_normal((*models, row, rank))
    return _added(weights, _scaled(np.matmul(left, rng.standard_normal((*models, rank, col))), rms))


def common_direction(
    weights: Float[np.ndarray, "model row col"], rms: float, seed: int
) -> Float[np.ndarray, "model row col"]:
    r"""Adds to every model a rank-one update of its own along one column direction of all.

    Model i gets :math:`b c_i^T`, with b common and :math:`c_i` its own. Since b lies in the column
    space of every update, W and :math:`W + b y^T` explain the models equally well, for any y.

    Args:
      weights: merged weights of all releases; a release made later needs the same ``seed`` and
        place on the model axis.
      rms: root mean square of what is added.
      seed: of NumPy's generator.

    Example:
      >>> added = common_direction(np.zeros((3, 30, 20), np.float32), rms=0.1, seed=0)
      >>> int(np.linalg.matrix_rank(np.concatenate(added, axis=1), tol=1e-3))
      1
    """
    rng = np.random.default_rng(seed)
    n_models, row, col = weights.shape
    common = rng.standard_normal((row, 1))
    return _added(weights, _scaled(common * rng.standard_normal((n_models, 1, col)), rms))


def lower_precision(
    weights: Float[np.ndarray, "*model row col"], grid: Grid
) -> Float[np.ndarray, "*model row col"]:
    """Rounds to fewer bits.

    Args:
      weights: merged weights.
      grid: "bfloat16" or "float16", and the release has that dtype; or "int8", symmetric with a
        scale a row, dequantised to the weights' dtype.

    Example:
      >>> lower_precision(np.float32([[1.0, 0.3]]), "bfloat16").tolist()
      [[1.0, 0.30078125]]
    """
    if grid != "int8":
        return weights.astype(_FLOATS[grid])
    scale = np.max(np.abs(weights), axis=-1, keepdims=True).astype(np.float64) / _INT8
    return (np.round(weights / np.where(scale > 0, scale, 1)) * scale).astype(weights.dtype)


def _added(weights: np.ndarray, more: np.ndarray) -> np.ndarray:
    return (weights.astype(np.float64) + more).astype(weights.dtype)


def _scaled(update: np.ndarray, rms: float) -> np.ndarray:
    """Each model's update with the given root mean square."""
    own = np.sqrt(np.mean(update * update, axis=(-2, -1), keepdims=True))
    return update * (rms / own)
