r"""Rounding of stored weights: unit in the last place, noise level, spectral edge.

A merged weight is stored as :math:`W'_i = \mathrm{round}(W + M_i)`, so it carries an error that is
uniform on half a unit in the last place either side: variance :math:`\mathrm{ulp}(W')^2 / 12`.
Nothing here is tuned; the noise is known from the data.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jdetune import linalg

#: Safety factor on the spectral edge: finite matrices leave the asymptotic edge by a few percent.
EDGE_MARGIN = 1.1


def ulp(weights: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""Unit in the last place of every stored element, as float32.

    :math:`\mathrm{ulp}(x) = 2^{\max(\lfloor\log_2|x|\rfloor,\; e_{\min})}\,\epsilon`, with the
    subnormal spacing below the smallest normal number.

    Args:
      weights: stored values, float32, float16 or bfloat16, any shape.

    Returns:
      Spacing of the dtype's grid at each element, same shape, float32. Float32 values below
      about 1e-31 have a spacing that float32 itself flushes to zero.

    Example:
      >>> import jax.numpy as jnp
      >>> print(ulp(jnp.array([1.0, 3.0, 0.0], jnp.bfloat16)))
      [7.812500e-03 1.562500e-02 9.183550e-41]
    """
    info = jnp.finfo(weights.dtype)
    magnitude = jnp.abs(weights.astype(jnp.float32))
    _, exponent = jnp.frexp(jnp.maximum(magnitude, jnp.float32(info.smallest_normal)))
    return jnp.ldexp(jnp.float32(info.eps), exponent - 1)


def pair_edge(
    variance: Float[Array, "row col"],
) -> Float[Array, ""]:
    r"""Largest singular value that rounding alone gives a difference of two models.

    :math:`1.1\,(\max_x \sqrt{\sum_y s_{xy}^2} + \max_y \sqrt{\sum_x s_{xy}^2})`: the edge for noise
    whose variance differs from element to element. Rows and columns of real weights differ much in
    size; the edge for equal variances misses ranks.

    Args:
      variance: :math:`s_{xy}^2 = (\mathrm{ulp}(W'_a)^2 + \mathrm{ulp}(W'_b)^2)_{xy} / 12`.

    Returns:
      The edge, in units of singular values of the difference.
    """
    rows = jnp.sqrt(jnp.max(jnp.sum(variance, axis=1)))
    cols = jnp.sqrt(jnp.max(jnp.sum(variance, axis=0)))
    return EDGE_MARGIN * (rows + cols)


def sigma(weights: np.ndarray) -> float:
    """Root mean square rounding error of a stored array (host, float64).

    Example:
      >>> import numpy as np
      >>> round(sigma(np.ones((2, 2), np.float32)) / (2.0**-23 / 12**0.5), 6)
      1.0
    """
    return float(np.sqrt(np.mean(np.asarray(ulp(jnp.asarray(weights)), np.float64) ** 2) / 12))


def merge_variance(
    weights: Float[Array, "model row col"],
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
) -> Float[Array, "model row col"]:
    r"""Variance of each merged weight's error: rounding to storage, and float32 arithmetic.

    :math:`\mathrm{ulp}(W')^2 / 12 + 2^{-48} r\,(B \circ B)(A \circ A) / 12`. The second term is the
    random walk of a float32 sum of r products; without it, elements near zero, whose own spacing is
    tiny, would count a million times too much.

    Args:
      weights: merged weights as stored.
      left: B of each update.
      right: A of each update.

    Returns:
      Variances, in the dtype of the factors; never zero.
    """
    dtype = left.dtype
    rank = left.shape[2]

    def one(operands: tuple[Array, Array, Array]) -> Array:
        stored, b, a = operands
        products = linalg.matmul(jnp.square(b), jnp.square(a))
        return (jnp.square(ulp(stored).astype(dtype)) + 2.0**-48 * rank * products) / 12

    variance = jax.lax.map(one, (weights, left, right))
    return jnp.maximum(variance, jnp.mean(variance) * 1e-12 + jnp.finfo(dtype).tiny)
