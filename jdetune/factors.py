"""Updates as balanced LoRA factors."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jdetune import linalg


def balanced_factors(
    left: Float[Array, "model row rank"],
    core: Float[Array, "model rank rank"],
    right: Float[Array, "model col rank"],
    ranks: Int[Array, " model"],
) -> tuple[Float[Array, "model row rank"], Float[Array, "model rank col"]]:
    r"""Factors :math:`B = U\sqrt{S}`, :math:`A = \sqrt{S}V^T` of ``left @ core @ right^T``.

    The entry of largest magnitude in each column of B is positive, so the factors are a function
    of the update alone (for distinct singular values). Columns past a model's rank are zero.

    Args:
      left: any basis of the column spaces.
      core: the updates in these bases.
      right: any basis of the row spaces.
      ranks: number of columns to keep.

    Returns:
      B and A in the dtype of the arguments.
    """

    def one(left: Array, core: Array, right: Array, rank: Array) -> tuple[Array, Array]:
        basis_left, basis_right = linalg.orthonormalize(left), linalg.orthonormalize(right)
        inner = linalg.matmul(linalg.matmul(basis_left.T, left), core)
        inner = linalg.matmul(inner, linalg.matmul(right.T, basis_right))
        u, values, v = linalg.svd_square(inner)
        root = jnp.sqrt(jnp.where(jnp.arange(values.shape[0], dtype=jnp.int32) < rank, values, 0))
        b = linalg.matmul(basis_left, u) * root
        a = linalg.matmul(basis_right, v) * root
        peak = jnp.take_along_axis(b, jnp.argmax(jnp.abs(b), axis=0)[None], axis=0)
        sign = jnp.where(peak < 0, -1, 1).astype(b.dtype)
        return b * sign, (a * sign).T

    return jax.vmap(one)(left, core, right, ranks)


def balanced_products(
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
    ranks: Int[Array, " model"],
) -> tuple[Float[Array, "model row rank"], Float[Array, "model rank col"]]:
    r"""As ``balanced_factors`` of ``left @ right``, through r x r Gram matrices: for long factors.

    With Gram matrices :math:`G = B^T B`, :math:`H = A A^T` and
    :math:`G^{1/2} H G^{1/2} = Q S^2 Q^T`, the factors are :math:`B\,G^{-1/2} Q S^{1/2}` and
    :math:`S^{-1/2} Q^T G^{1/2} A`. Good for singular values
    down to 1e-7 of the largest, in float64.

    Args:
      left: B, zero past each rank.
      right: A, zero past each rank.
      ranks: rank of each update.

    Returns:
      B and A in float32.
    """

    def one(left: Array, right: Array, rank: Array) -> tuple[Array, Array]:
        power, axes = linalg.eigh_descending(linalg.matmul(left.T, left))
        floor = jnp.maximum(power[0] * jnp.finfo(power.dtype).eps, jnp.finfo(power.dtype).tiny)
        size = jnp.sqrt(jnp.maximum(power, floor))
        root = linalg.matmul(axes * size, axes.T)
        inverse = linalg.matmul(axes / size, axes.T)
        inner = linalg.matmul(linalg.matmul(root, linalg.matmul(right, right.T)), root)
        square, turn = linalg.eigh_descending(inner)
        keep = jnp.arange(square.shape[0], dtype=jnp.int32) < rank
        values = jnp.sqrt(jnp.sqrt(jnp.where(keep, jnp.maximum(square, 0), 0)))
        safe = jnp.where(values > 0, values, 1)
        b = linalg.matmul(left, linalg.matmul(inverse, turn) * values)
        a = linalg.matmul(jnp.where(values > 0, 1 / safe, 0)[:, None] * turn.T, root)
        a = linalg.matmul(a, right)
        peak = jnp.take_along_axis(b, jnp.argmax(jnp.abs(b), axis=0)[None], axis=0)
        sign = jnp.where(peak < 0, -1, 1).astype(b.dtype)
        return (b * sign).astype(jnp.float32), (a * sign.T).astype(jnp.float32)

    return linalg.map_batched(lambda operands: one(*operands), (left, right, ranks), 1)


def keep_energy(
    left: np.ndarray, right: np.ndarray, share: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Balanced factors cut to the fewest columns that hold a share of each update's energy.

    Args:
      left: B of each update, [model, row, rank].
      right: A of each update, [model, rank, col].
      share: of the sum of squared singular values, below 1.

    Returns:
      The ranks, and B and A with zeros past them.
    """
    values = np.sum(np.square(left, dtype=np.float64), axis=1)  # singular values, largest first
    energy = np.cumsum(values**2, axis=1)
    below = energy < share * energy[:, -1:]
    ranks = np.where(energy[:, -1] > 0, below.sum(1) + 1, 0).astype(np.int32)
    keep = np.arange(left.shape[2]) < ranks[:, None]
    return ranks, np.where(keep[:, None], left, 0), np.where(keep[:, :, None], right, 0)
