"""Truncations to a low rank: from a Gaussian sketch, as published, or warm, from one nearby.

The first takes six products and five orthonormalizations, the second two and one.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jdetune import linalg

#: Power steps of the randomized truncation.
POWER_STEPS = 2


def truncate(
    matrix: Float[Array, "left_side right_side"],
    sketch: Float[Array, "sketched rank"],
    active: Bool[Array, " rank"],
    transposed: bool,
) -> tuple[Float[Array, "left_side rank"], Float[Array, "right_side rank"]]:
    r"""Randomized truncation :math:`Q Q^T A` with two power steps and no oversampling.

    Args:
      matrix: A.
      sketch: Gaussian columns, on the right side, or on the left one if ``transposed``.
      active: which of the leading columns are used: their number is the rank.
      transposed: whether Q spans rows (:math:`A Q Q^T`), as for matrices wider than tall.

    Returns:
      Factors, left and right, with zero columns past the rank.

    Example:
      >>> import jax.numpy as jnp
      >>> a = jnp.outer(jnp.arange(3.0), jnp.arange(2.0))
      >>> left, right = truncate(a, jnp.ones((2, 1)), jnp.array([True]), False)
      >>> bool(jnp.allclose(left @ right.T, a))
      True
    """
    if transposed:
        right, left = truncate(matrix.T, sketch, active, transposed=False)
        return left, right

    def image(columns: Array) -> Array:
        return linalg.orthonormalize_leading(linalg.matmul(matrix, columns), active)

    def coimage(columns: Array) -> Array:
        return linalg.contract("ab,ar->br", matrix, columns)

    basis = image(sketch)
    for _ in range(POWER_STEPS):
        basis = image(linalg.orthonormalize_leading(coimage(basis), active))
    return basis, coimage(basis)


def refine(
    matrix: Float[Array, "left_side right_side"],
    start: Float[Array, "sketched rank"],
    active: Bool[Array, " rank"],
    transposed: bool,
) -> tuple[Float[Array, "left_side rank"], Float[Array, "right_side rank"]]:
    r"""Warm truncation :math:`Q Q^T A` with :math:`Q = \mathrm{orth}(A P)`: one subspace step.

    P = :math:`A_0^T Q_0` is from the truncation of a nearby matrix. If its range is off the leading
    right singular vectors of A by an angle :math:`\delta`, the result is off the truncated SVD by
    about :math:`2 \delta \sigma_{r+1}`. A leading direction orthogonal to P it cannot see: only a
    new sketch finds that.

    Source: one step of subspace iteration; Halko, Martinsson, Tropp (2011), Algorithm 4.4.

    Args:
      matrix: A.
      start: P, the right factor of the nearby matrix, or the left one if ``transposed``.
      active: as for ``truncate``.
      transposed: as for ``truncate``.

    Returns:
      Factors, left and right, with zero columns past the rank.
    """
    if transposed:
        right, left = refine(matrix.T, start, active, transposed=False)
        return left, right
    # Columns of P have the size of singular values, those of A P of their squares: whitening, which
    # GPUs orthonormalize by, would square them once more.
    size = jnp.max(jnp.abs(start), axis=0)
    image = linalg.matmul(matrix, start / jnp.where(size > 0, size, 1))
    basis = linalg.orthonormalize_leading(image, active)
    return basis, linalg.matmul(basis.T, matrix).T
