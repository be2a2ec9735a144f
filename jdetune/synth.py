"""Synthetic families of merged models, used by tests, benchmarks and examples alike."""

import dataclasses

import ml_dtypes
import numpy as np
from jaxtyping import Float

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Family:
    """A base and models merged from it.

    Attributes:
      base: the base, in the storage dtype.
      merged: models as stored, same dtype.
      left: B of each model, [row, rank] float32.
      right: A of each model, [rank, col] float32.
    """

    base: Float[np.ndarray, "row col"]
    merged: Float[np.ndarray, "model row col"]
    left: list[np.ndarray]
    right: list[np.ndarray]


def merge(
    base: Float[np.ndarray, "row col"],
    left: Float[np.ndarray, "row rank"],
    right: Float[np.ndarray, "rank col"],
    dtype: str | None = None,
) -> Float[np.ndarray, "row col"]:
    """Merges as PEFT does by default: the sum in float32, rounded once to the storage dtype.

    Example:
      >>> import numpy as np
      >>> w, b, a = (np.ones(s, np.float32) for s in [(2, 2), (2, 1), (1, 2)])
      >>> merge(w, b, a).tolist()
      [[2.0, 2.0], [2.0, 2.0]]
    """
    update = left.astype(np.float32) @ right.astype(np.float32)
    return (base.astype(np.float32) + update).astype(DTYPES[dtype] if dtype else base.dtype)


def family(
    n_models: int,
    row: int,
    col: int,
    rank: int | list[int],
    seed: int = 0,
    dtype: str = "float32",
    base_std: float = 0.02,
    update_rms: float = 1e-3,
    decay: float = 3.0,
) -> Family:
    r"""A random base and random updates whose singular values fall as :math:`e^{-decay\,k/r}`.

    Args:
      n_models: number of models.
      row: rows of the weight.
      col: columns of the weight.
      rank: rank of every update, or one a model.
      seed: of NumPy's generator.
      dtype: storage dtype of base and models.
      base_std: standard deviation of the base's elements.
      update_rms: root mean square of each update's elements.
      decay: exponent of the spectrum; 0 for a flat one.

    Returns:
      The family.
    """
    rng = np.random.default_rng(seed)
    ranks = [rank] * n_models if isinstance(rank, int) else list(rank)
    base = (base_std * rng.standard_normal((row, col))).astype(np.float32).astype(DTYPES[dtype])
    left, right, merged = [], [], []
    for r in ranks:
        u = np.linalg.qr(rng.standard_normal((row, r)))[0] if r else np.zeros((row, 0))
        v = np.linalg.qr(rng.standard_normal((col, r)))[0] if r else np.zeros((col, 0))
        values = np.exp(-decay * np.arange(r) / max(r, 1))
        values *= update_rms * np.sqrt(row * col) / max(np.linalg.norm(values), 1e-30)
        left.append((u * np.sqrt(values)).astype(np.float32))
        right.append((np.sqrt(values)[:, None] * v.T).astype(np.float32))
        merged.append(merge(base, left[-1], right[-1], dtype))
    return Family(base, np.stack(merged), left, right)
