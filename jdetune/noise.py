r"""Rounding of stored weights: unit in the last place, noise level, spectral edge.

A merged weight is stored as :math:`W'_i = \mathrm{round}(W + M_i)`, so it carries an error that is
uniform on half a unit in the last place either side: variance :math:`\mathrm{ulp}(W')^2 / 12`.
Nothing here is tuned; the noise is known from the data.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jdetune import linalg
from jdetune.blocks import Each, by_rows
from jdetune.types import Array as AnyArray

#: Safety factor on the spectral edge: finite matrices leave the asymptotic edge by a few percent.
EDGE_MARGIN = 1.1


#: Roundings of the update itself before it is added, by the merge's rule (R0 and R1: none).
ROUNDINGS = {"R0": 0, "R1": 0, "R2": 1, "R3": 2}
#: A fit never weighs an element above this many times what is usual in its row and column: a few
#: elements near zero would else decide everything, and conjugate gradients would not converge.
FIT_FLOOR = 1e-3


class Merged(NamedTuple):
    """Merged weights of one layer, with the grid that each model was rounded to.

    Attributes:
      values: weights as stored.
      eps: spacing of each model's storage dtype just above one.
      smallest: smallest normal number of each model's storage dtype.
    """

    values: Float[AnyArray, "model row col"]
    eps: Float[AnyArray, " model"]
    smallest: Float[AnyArray, " model"]


#: Merged weights whose own dtype is the grid, or with the grid of every model.
Weights: TypeAlias = Float[AnyArray, "model row col"] | Merged


def as_merged(weights: Weights, storage: Sequence[str] | None = None) -> Merged:
    """Merged weights with their grids: those of ``storage``, a dtype's name a model, or their own.

    Example:
      >>> import numpy as np
      >>> as_merged(np.ones((2, 1, 1), np.float32), ["bfloat16", "float32"]).eps.tolist()
      [0.0078125, 1.1920928955078125e-07]
    """
    if isinstance(weights, Merged):
        return weights
    names = [str(weights.dtype)] * weights.shape[0] if storage is None else list(storage)
    infos = [jnp.finfo(jnp.dtype(name)) for name in names]
    eps = np.array([info.eps for info in infos], np.float32)
    smallest = np.array([info.smallest_normal for info in infos], np.float32)
    return Merged(weights, eps, smallest)


def ulp(
    weights: Float[Array, "*shape"],
    eps: Float[AnyArray, ""] | None = None,
    smallest: Float[AnyArray, ""] | None = None,
) -> Float[Array, "*shape"]:
    r"""Unit in the last place of every stored element, as float32.

    :math:`\mathrm{ulp}(x) = 2^{\max(\lfloor\log_2|x|\rfloor,\; e_{\min})}\,\epsilon`, with the
    subnormal spacing below the smallest normal number.

    Args:
      weights: stored values, float32, float16 or bfloat16, any shape.
      eps: spacing of the grid just above one; that of the array's dtype if None.
      smallest: smallest normal number of the grid; that of the array's dtype if None.

    Returns:
      Spacing of the grid at each element, same shape, float32. Float32 values below about 1e-31
      have a spacing that float32 itself flushes to zero.

    Example:
      >>> import jax.numpy as jnp
      >>> print(ulp(jnp.array([1.0, 3.0, 0.0], jnp.bfloat16)))
      [7.812500e-03 1.562500e-02 9.183550e-41]
    """
    info = jnp.finfo(weights.dtype)
    least = jnp.float32(info.smallest_normal) if smallest is None else smallest
    magnitude = jnp.maximum(jnp.abs(weights.astype(jnp.float32)), least)
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.uint32) & jnp.uint32(0x7F800000)
    binade = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return binade * (jnp.float32(info.eps) if eps is None else eps)


def spacing(models: Merged) -> Float[Array, "model row col"]:
    """``ulp`` of every model's weights on its own grid."""
    return jax.vmap(ulp)(*(jnp.asarray(part) for part in models))


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
    weights: Weights,
    left: Float[Array, "model row rank"],
    right: Float[Array, "model rank col"],
    rounding: str = "R1",
    units: tuple[Float[Array, " row"], Float[Array, " col"]] | None = None,
) -> Float[Array, "model row col"]:
    r"""Variance of each merged weight's error: rounding to storage, and the merge's arithmetic.

    :math:`\frac{1}{12}\left(\mathrm{ulp}(W')^2 + k\,\mathrm{ulp}(M)^2 + 2^{-48}\,r\,
    (0.72\,M^2 + 0.36\,q)\right)`. The last term is the float32 sum of r products that makes M: its
    partial sums are a random walk that ends at M, with steps of mean square :math:`q / r`, where
    :math:`q_{xy} = |M V|_x^2 |V|_y^2 / r` does not depend on how M is factored. Without it,
    elements near zero, whose own spacing is tiny, would count a million times too much. k roundings
    of M itself belong to the rules R2 and R3.

    Args:
      weights: merged weights as stored.
      left: B of each update.
      right: A of each update.
      rounding: rule of the merge, R0 to R3.
      units: row and column factors that errors are measured in; none if None.

    Returns:
      Variances, never zero: float32 if there are units, else in the dtype of the factors.
    """
    models = as_merged(weights)
    again = ROUNDINGS[rounding]
    dtype, scale = left.dtype, None
    if units is not None:
        dtype = jnp.dtype(jnp.float32)
        left, right = left / units[0][:, None], right / units[1]
        scale = (1 / units[0][:, None] / units[1]).astype(dtype)

    def size(values: Array, eps: Array, smallest: Array) -> Array:
        own = ulp(values, eps, smallest).astype(dtype)
        return own if scale is None else own * scale

    def one(operands: tuple[Array, ...]) -> Array:
        stored, eps, smallest, b, a = operands
        gram = linalg.matmul(a, a.T)
        inverse = linalg.inverse_psd(gram)
        rank = jnp.maximum(jnp.sum(inverse * gram), 1)
        rows = jnp.sum(linalg.matmul(b, gram) * b, axis=1).astype(dtype)
        cols = jnp.sum(linalg.matmul(inverse, a) * a, axis=0).astype(dtype)
        update = linalg.matmul(b.astype(dtype), a.astype(dtype))
        walk = 0.72 * rank.astype(dtype) * jnp.square(update) + 0.36 * rows[:, None] * cols
        total = jnp.square(size(stored, eps, smallest)) + 2.0**-48 * walk
        if again:
            whole = update if scale is None else update / scale
            total = total + again * jnp.square(size(whole.astype(jnp.float32), eps, smallest))
        total = total / 12
        return jnp.maximum(total, jnp.mean(total) * 1e-12 + jnp.finfo(dtype).tiny)

    parts = (*(jnp.asarray(part) for part in models), left, right)
    return jax.lax.map(one, parts)


def fit_variance(variance: Float[Array, "model row col"]) -> Float[Array, "model row col"]:
    """Variances that a fit weighs by: not below a thousandth of their row's and column's usual."""

    def some(variance: linalg.PerModel) -> tuple[Array, Array]:
        models = linalg.sum_models(variance)
        return jnp.sum(models, axis=0), jnp.sum(models, axis=1, keepdims=True)

    n_models, _, col = variance.shape
    cols, rows = by_rows(some, Each(variance))
    usual = rows / (n_models * col) * (cols / jnp.mean(cols))
    return jnp.maximum(variance, FIT_FLOOR * usual)
