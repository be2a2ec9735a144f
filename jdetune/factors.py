"""Updates as balanced LoRA factors."""

import jax
import jax.numpy as jnp
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
