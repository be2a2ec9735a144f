r"""Full space and core space: everything that low-rank updates do, in a small matrix a model.

All differences :math:`D_i = W'_i - W'_{ref}` of merged models lie, up to rounding, in one column
space and one row space of dimension at most :math:`\sum_i r_i`. With orthonormal bases L [row, p]
and R [col, q] of those, the cores

.. math:: C_i = L^T D_i R

hold everything but noise, and an algorithm that only subtracts low-rank parts of differences can
run on them at a cost that no longer depends on row * col. The reference is model 0. Everything is
kept relative to it, because differences of stored numbers are small and nearly exact where the
numbers are neither.

The functions take one layer; vmap or map over layers outside. They run in the dtype of the basis:
trace them inside ``linalg.scope`` of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdetune import linalg
from jdetune.types import Array as AnyArray

#: Directions beyond the sum of the ranks, so that a random sketch misses none of them.
OVERSAMPLING = 10


class CoreBasis(NamedTuple):
    """Orthonormal columns that span the joint column and row spaces of all differences."""

    left: Float[Array, "row left_width"]
    right: Float[Array, "col right_width"]


def core_widths(n_models: int, rank: int, row: int, col: int) -> tuple[int, int]:
    """Static sizes of the core: the sum of the ranks with oversampling, at most each side.

    Args:
      n_models: number of models.
      rank: bound on every model's rank.
      row: rows of the matrix.
      col: columns of the matrix.

    Returns:
      Widths of the left and of the right basis.

    Example:
      >>> core_widths(5, 16, 768, 64)
      (90, 64)
    """
    bound = n_models * rank + OVERSAMPLING
    return min(bound, row), min(bound, col)


def joint_basis(
    weights: Float[AnyArray, "model row col"],
    widths: tuple[int, int],
    dtype: jnp.dtype,
    seed: int = 0,
) -> CoreBasis:
    r"""Bases of the joint column and row spaces, by a Rademacher sketch and one power step.

    :math:`Q = \mathrm{orth}(\sum_i D_i \Omega_i)` with random signs :math:`\Omega_i`, then
    :math:`L = \mathrm{orth}(\sum_i D_i D_i^T Q)`; R likewise from the transposes. Without the power
    step the sketch leaves 3 to 5 times the rounding error outside; with it, within a percent or two
    of what the exact singular vectors leave.

    Orth is Householder QR, so directions at the level of rounding come last and the leading ones
    are continuous functions of the weights. Whitening would leave a rotation that the last bits
    decide, and random numbers drawn in core space would mean something else on every device.

    Args:
      weights: merged weights of one layer as stored, two models or more.
      widths: static widths of the bases, from ``core_widths``.
      dtype: dtype of the algebra, float64 where there is one.
      seed: of the signs.

    Returns:
      The bases in ``dtype``. Where the differences span less than a width, the spare columns are
      other orthonormal directions.
    """
    left_key, right_key = jax.random.split(jax.random.key(seed))
    weights = jnp.asarray(weights)
    return CoreBasis(
        left=_column_space(weights, widths[0], dtype, left_key),
        right=_column_space(jnp.swapaxes(weights, 1, 2), widths[1], dtype, right_key),
    )


def _column_space(weights: Array, width: int, dtype: jnp.dtype, key: Array) -> Array:
    def sketch(difference: Array, model: Array) -> Array:
        shape = (difference.shape[1], width)
        signs = jax.random.rademacher(jax.random.fold_in(key, model), shape, dtype)
        return linalg.long_matmul(difference, signs)

    basis = linalg.qr_basis(_sum_over_differences(sketch, weights, dtype))

    def power(difference: Array, _: Array) -> Array:
        return linalg.long_matmul(difference, linalg.long_matmul(difference.T, basis))

    return linalg.qr_basis(_sum_over_differences(power, weights, dtype))


def to_core(
    weights: Float[AnyArray, "model row col"], basis: CoreBasis
) -> Float[Array, "model left_width right_width"]:
    r"""Cores :math:`L^T (W'_i - W'_0) R` of all models; that of model 0 is zero.

    Args:
      weights: merged weights of one layer as stored.
      basis: from ``joint_basis``.

    Returns:
      One core a model, in the dtype of the basis.
    """
    weights = jnp.asarray(weights)

    def one(model: Array) -> Array:
        image = linalg.long_matmul(_difference(weights, model, basis.left.dtype), basis.right)
        return linalg.long_matmul(basis.left.T, image)

    return jax.lax.map(one, jnp.arange(weights.shape[0], dtype=jnp.int32))


def from_core(
    core: Float[Array, "left_width right_width"], basis: CoreBasis
) -> Float[Array, "row col"]:
    r"""The matrix :math:`L C R^T` that a core stands for.

    Example:
      >>> import jax.numpy as jnp
      >>> basis = CoreBasis(jnp.eye(3, 1), jnp.eye(2, 1))
      >>> from_core(jnp.full((1, 1), 5.0), basis).tolist()
      [[5.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    return linalg.matmul(linalg.matmul(basis.left, core), basis.right.T)


def base_from_core(
    weights: Float[AnyArray, "model row col"],
    basis: CoreBasis,
    mean_update: Float[Array, "left_width right_width"],
) -> Float[Array, "row col"]:
    r"""The base :math:`W'_0 + \mathrm{mean}_i D_i - L\,\mathrm{mean}_i(M_i)\,R^T`.

    Args:
      weights: merged weights of one layer as stored.
      basis: from ``joint_basis``.
      mean_update: mean over models of the updates' cores.

    Returns:
      :math:`\mathrm{mean}_i(W'_i - M_i)` in full, in the dtype of the basis: what lies outside
      the core is averaged over the models, as it is in full space.
    """
    dtype = basis.left.dtype
    weights = jnp.asarray(weights)
    shift = _mean_difference(weights, dtype) - from_core(mean_update, basis)
    return weights[0].astype(dtype) + shift


def outside_residual(
    weights: Float[AnyArray, "model row col"],
    basis: CoreBasis,
    cores: Float[Array, "model left_width right_width"],
) -> Float[Array, ""]:
    r"""Mean square of what differs between models outside the core.

    With :math:`E_i = D_i - L C_i R^T`, the mean over models and elements of
    :math:`(E_i - \mathrm{mean}\,E)^2`. An iteration in core space cannot change it; a loss in core
    space adds it to equal the loss in full space.

    Args:
      weights: merged weights of one layer as stored.
      basis: from ``joint_basis``.
      cores: from ``to_core``.

    Returns:
      A scalar in the dtype of the basis.
    """
    dtype = basis.left.dtype
    weights = jnp.asarray(weights)
    center = _mean_difference(weights, dtype)
    core_center = jnp.mean(cores, axis=0)

    def squares(difference: Array, model: Array) -> Array:
        outside = (difference - center) - from_core(cores[model] - core_center, basis)
        return jnp.sum(jnp.square(outside))

    reference = squares(jnp.zeros_like(center), jnp.zeros((), jnp.int32))
    return (reference + _sum_over_differences(squares, weights, dtype)) / weights.size


def _difference(weights: Array, model: Array, dtype: jnp.dtype) -> Array:
    return weights[model].astype(dtype) - weights[0].astype(dtype)


def _mean_difference(weights: Array, dtype: jnp.dtype) -> Array:
    total = _sum_over_differences(lambda difference, _: difference, weights, dtype)
    return total / weights.shape[0]


def _sum_over_differences(
    function: Callable[[Array, Array], Array], weights: Array, dtype: jnp.dtype
) -> Array:
    """Sum of ``function(W'_i - W'_0, i)`` over the models after the first, one at a time."""

    def add(total: Array, model: Array) -> tuple[Array, None]:
        return total + function(_difference(weights, model, dtype), model), None

    models = jnp.arange(1, weights.shape[0], dtype=jnp.int32)
    difference = jax.ShapeDtypeStruct(weights.shape[1:], dtype)
    result = jax.eval_shape(function, difference, jax.ShapeDtypeStruct((), jnp.int32))
    zero = jnp.zeros_like(weights, shape=result.shape, dtype=dtype)  # varies as weights do
    return jax.lax.scan(add, zero, models)[0]
