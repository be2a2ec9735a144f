"""Dense linear algebra with its precision stated: the only file that calls ``jnp.linalg``.

Every product asks for full precision by name, because the default is TF32 on NVIDIA GPUs and
bfloat16 on TPUs. Inside a scope of ``jax.enable_x64`` the work is done in float64 with Gram
matrices and eigh, which are truly batched on GPUs; in float32 (TPU) it falls back to Householder QR
and to sums in blocks.

On CPU every factorisation is called on one matrix at a time. A batch would be spread over the
thread pool of XLA, and two such batches in one program deadlock on few cores in jaxlib 0.10.2.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

Precision: TypeAlias = Literal["auto", "float64", "float32"]


def _one_at_a_time(function: Callable[[Array], tuple[Array, ...]]):
    """``function`` of a square or tall matrix, for stacks of them: on CPU one after another."""
    sequential = jax.custom_batching.sequential_vmap(function)

    def apply(matrix: Array) -> tuple[Array, ...]:
        if matrix.ndim > 2:
            return jax.vmap(apply)(matrix)
        return lax.platform_dependent(matrix, cpu=sequential, default=function)

    return apply


_eigh = _one_at_a_time(lambda matrix: tuple(jnp.linalg.eigh(matrix)))
_inverse = _one_at_a_time(lambda matrix: (jnp.linalg.inv(matrix),))
_qr = _one_at_a_time(lambda matrix: tuple(jnp.linalg.qr(matrix)))


def _by_cholesky(matrix: Array) -> tuple[Array, ...]:
    lower, eye = jnp.linalg.cholesky(matrix), jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    eye = jnp.broadcast_to(eye, matrix.shape)
    root = lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
    return (contract("...ki,...kj->...ij", root, root),)


_definite = _one_at_a_time(_by_cholesky)


#: Something of every model: an array with a leading model axis, or a sequence.
PerModel: TypeAlias = Array | Sequence[Any]
#: Elements of a block of rows of all models that stays in a CPU's cache.
BLOCK_ELEMENTS = 2**18
#: Blocks that a long float32 product is split into, so that rounding grows with the block.
FLOAT32_BLOCKS = 16


def resolve_dtype(precision: Precision) -> jnp.dtype:
    """Dtype of the small dense algebra: float64, but float32 where there is none (TPU).

    Example:
      >>> str(resolve_dtype("float32"))
      'float32'
    """
    if precision not in ("auto", "float64", "float32"):
        raise ValueError(f"precision is auto, float64 or float32, got {precision!r}")
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "tpu" else "float64"
    return jnp.dtype(precision)


def scope(dtype: jnp.dtype):
    """Context in which arrays of ``dtype`` can be made; JAX's global setting stays untouched."""
    return jax.enable_x64(dtype == jnp.float64)


def contract(spec: str, *operands: Array) -> Array:
    """``jnp.einsum`` at full precision; operands share one dtype."""
    return jnp.einsum(spec, *operands, precision=lax.Precision.HIGHEST)


def matmul(a: Float[Array, "*b m k"], b: Float[Array, "*b k n"]) -> Float[Array, "*b m n"]:
    """Matrix product at full precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def laid_out(matrix: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """The same matrix, written out on CPU before a product uses it.

    For a thin ``a.T`` beside a large matrix: left to itself, XLA hands the transposition to the
    product, which then takes up to twice as long.
    """
    return lax.optimization_barrier(matrix) if jax.default_backend() == "cpu" else matrix


def long_matmul(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """Matrix product over a long axis; in float32 summed in blocks with compensation.

    The error of a float32 sum grows with its length. Blocks keep the partial sums short, and the
    blocks are added with Neumaier's compensated sum.
    """
    length = a.shape[1]
    if a.dtype != jnp.float32 or length < 4 * FLOAT32_BLOCKS:
        return matmul(a, b)
    pad = -length % FLOAT32_BLOCKS
    a_blocks = jnp.pad(a, ((0, 0), (0, pad))).reshape(a.shape[0], FLOAT32_BLOCKS, -1)
    b_blocks = jnp.pad(b, ((0, pad), (0, 0))).reshape(FLOAT32_BLOCKS, -1, b.shape[1])
    parts = contract("mbk,bkn->bmn", a_blocks, b_blocks)
    total, rest = parts[0], jnp.zeros_like(parts[0])
    for part in parts[1:]:
        total, error = two_sum(total, part)
        rest = rest + error
    return total + rest


def sum_models(values: PerModel) -> Float[Array, "..."]:
    """Sum over the leading axis, unrolled: XLA's reduction of a leading axis is slow on CPU."""
    total = values[0]
    for index in range(1, len(values)):
        total = total + values[index]
    return total


def sum_each(function: Callable, *models: PerModel) -> Any:
    """Sum over models of a function of each one's arrays.

    Sliced before, not after: XLA makes nothing of all models then, which on CPU is several times
    faster than ``sum_models`` of what is computed on the way.

    Args:
      function: of one model's arrays.
      models: arrays whose leading axis is the model, or one array a model.

    Example:
      >>> import jax.numpy as jnp
      >>> sum_each(lambda a, b: a * b, jnp.ones((3, 2)), jnp.ones((3, 2))).tolist()
      [3.0, 3.0]
    """
    each = (function(*(part[index] for part in models)) for index in range(len(models[0])))
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), each)


def map_each(function: Callable, *models: PerModel) -> Any:
    """A function of each model's arrays: on CPU one by one, and not put together.

    Args:
      function: of one model's arrays.
      models: arrays whose leading axis is the model, or one array a model.

    Returns:
      What the function returns, each array a tuple of one a model, or where batches are faster
      one array of all.
    """
    if jax.default_backend() == "cpu":
        indices = range(len(models[0]))
        found = [function(*(part[index] for part in models)) for index in indices]
        return jax.tree.map(lambda *each: each, *found)
    return jax.vmap(function)(*(jnp.asarray(part) for part in models))


def stack_models(models: PerModel) -> Float[Array, "model ..."]:
    """One array of each that ``map_each`` returns."""
    return jnp.stack(models) if isinstance(models, tuple) else jnp.asarray(models)


def weighted_mean(weights: PerModel, values: PerModel) -> Array:
    """Mean over models, each element weighted."""
    above, below = sum_each(lambda weight, value: (weight * value, weight), weights, values)
    return above / below


def inverse_variance_mean(variance: PerModel, values: PerModel) -> Array:
    """Mean over models, each element weighted by the inverse of its variance."""
    above, below = sum_each(lambda var, value: (value / var, 1 / var), variance, values)
    return above / below


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Rounded sum of two arrays and its exact rounding error (Knuth)."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def orthonormalize(y: Float[Array, "row width"]) -> Float[Array, "row width"]:
    """Orthonormal basis of the columns; columns that are numerically zero stay (nearly) zero.

    In float64: two rounds of whitening by the eigenvectors of the Gram matrix, with a floor on the
    eigenvalues. CholeskyQR breaks down here, because a sketch wider than the rank is singular to
    working precision. In float32: Householder QR.
    """
    if y.dtype == jnp.float32:
        return _qr(y)[0]
    return whiten(whiten(y))


def whiten(y: Float[Array, "row width"]) -> Float[Array, "row width"]:
    """Basis of the columns from the eigenvectors of their Gram matrix, weakest first.

    Orthonormal to the square root of the precision over the condition number, or better.
    """
    values, vectors = _eigh(matmul(y.T, y))
    info = jnp.finfo(y.dtype)
    floor = jnp.maximum(values[-1] * (info.eps * y.shape[1]), info.tiny)
    return matmul(y, vectors * lax.rsqrt(jnp.maximum(values, floor)))


def eigh_descending(
    symmetric: Float[Array, "*b n n"],
) -> tuple[Float[Array, "*b n"], Float[Array, "*b n n"]]:
    """Eigenvalues, largest first, and eigenvectors as columns."""
    values, vectors = _eigh(symmetric)
    return values[..., ::-1], vectors[..., ::-1]


def svd_square(
    square: Float[Array, "n n"],
) -> tuple[Float[Array, "n n"], Float[Array, " n"], Float[Array, "n n"]]:
    """Singular value decomposition of a small square matrix: left, values, right (as columns).

    LAPACK's SVD on CPU. Elsewhere the eigenvectors of [[0, B], [B^T, 0]], because batched SVD is a
    host loop on GPUs and slow to compile on TPUs; unlike eigh of B^T B this does not square the
    condition number. Singular vectors of values at rounding level are then not orthonormal.
    """
    return lax.platform_dependent(square, cpu=_svd_lapack, default=_svd_jordan_wielandt)


@jax.custom_batching.sequential_vmap
def _svd_lapack(square: Array) -> tuple[Array, Array, Array]:
    # the default, gesdd, now and then does not converge on graded matrices and returns NaN
    algorithm = lax.linalg.SvdAlgorithm.QR
    left, values, right = lax.linalg.svd(square, algorithm=algorithm)
    return left, values, right.T


def _svd_jordan_wielandt(square: Array) -> tuple[Array, Array, Array]:
    n = square.shape[0]
    zero = jnp.zeros_like(square)
    values, vectors = eigh_descending(jnp.block([[zero, square], [square.T, zero]]))
    vectors = vectors[:, :n] * jnp.sqrt(jnp.asarray(2, square.dtype))
    return vectors[:n], jnp.maximum(values[:n], 0), vectors[n:]


def inverse_psd(symmetric: Float[Array, "*b n n"]) -> Float[Array, "*b n n"]:
    """Pseudoinverse of a positive semidefinite matrix; its null space (masked axes) stays null."""
    values, vectors = _eigh(symmetric)
    floor = values[..., -1:] * (jnp.finfo(symmetric.dtype).eps * symmetric.shape[-1])
    safe = jnp.where(values > floor, values, 1)
    weights = jnp.where(values > floor, 1 / safe, 0)
    return contract("...ik,...k,...jk->...ij", vectors, weights, vectors)


def inverse_definite(symmetric: Float[Array, "*b n n"]) -> Float[Array, "*b n n"]:
    """Inverse of a positive definite matrix, by Cholesky; NaN where it is not definite."""
    return _definite(symmetric)[0]


def inverse(square: Float[Array, "*b n n"]) -> Float[Array, "*b n n"]:
    """Inverse of a square matrix of full rank."""
    return _inverse(square)[0]


def each_model(function: Callable, operands) -> Any:
    """``function`` of every model: one after another on CPU, whose batched products are slow."""
    at_a_time = 1 if jax.default_backend() == "cpu" else 2**30
    return map_batched(function, operands, at_a_time)


def row_block(row: int, width: int, least: int = 16) -> int:
    """Rows that are worked on together: a divisor of ``row``; all of them but on CPU.

    Args:
      row: number of rows.
      width: elements of one row, all models together.
      least: rows that are worth while, whatever their width.

    Example:
      >>> row_block(16, 4)
      16
    """
    if jax.default_backend() != "cpu":
        return row
    fits = max(BLOCK_ELEMENTS // width, least)
    divisors = [size for size in range(1, row + 1) if row % size == 0]
    best = max(size for size in divisors if size <= max(fits, 1))
    return best if 4 * best >= fits else row


def map_batched(function: Callable, operands, batch_size: int) -> Any:
    """``jax.vmap`` over the leading axis in chunks of ``batch_size``, one after another.

    One at a time keeps 2-D products on the CPU, where they are fastest; GPUs want batches.
    """
    length = jax.tree.leaves(operands)[0].shape[0]
    if batch_size >= length:
        return jax.vmap(function)(operands)
    if batch_size > 1:
        return lax.map(function, operands, batch_size=batch_size)
    return lax.map(function, operands)


def orthonormalize_leading(
    y: Float[Array, "side width"], active: Bool[Array, " width"]
) -> Float[Array, "side width"]:
    """Basis of the range of the active, leading columns; as many others stay zero.

    Householder QR on CPU and in float32; in float64 elsewhere the whitening of ``orthonormalize``,
    because batched QR is a loop over the batch on GPUs. The two differ by a rotation.
    """
    y = jnp.where(active, y, 0)
    if y.dtype == jnp.float32:
        return _qr_leading(y, active)
    return lax.platform_dependent(y, active, cpu=_qr_leading, default=_whiten_leading)


def _qr_leading(y: Array, active: Array) -> Array:
    return jnp.where(active, _qr(y)[0], 0)


def _whiten_leading(y: Array, active: Array) -> Array:
    return jnp.where(active, whiten(whiten(y))[:, ::-1], 0)  # eigh puts the null space first


def qr_basis(y: Float[Array, "side width"]) -> Float[Array, "side thin"]:
    """Orthonormal columns by Householder QR, as many as the smaller of side and width.

    A continuous function of columns of full rank.
    """
    return _qr(y)[0]
