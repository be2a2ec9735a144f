"""Pairwise differences of models: whitened by the rounding error, and their leading directions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jdetune import linalg
from jdetune.noise import Weights, as_merged, pair_edge, spacing, ulp
from jdetune.ranks import plan_pairs

#: Variance of a merge's float32 arithmetic, in squares of the update: a sum of r products makes
#: about r/12 * 2^-48 a model. It exceeds the storage's rounding where the weights are small.
MERGE_ARITHMETIC = 4 * 2.0**-48


class Scales(NamedTuple):
    """Rounding error as a product of a row and a column factor; differences are divided by it."""

    row: Float[Array, " row"]
    col: Float[Array, " col"]


class PairFactors(NamedTuple):
    """Truncated singular value decompositions of whitened pairwise differences, pair first.

    ``ranks`` counts the values above the noise ``edge``; ``tail_ratio`` is the rms of what these
    leave over, in units of the rounding error.
    """

    left: Float[Array, "pair row width"]
    values: Float[Array, "pair width"]
    right: Float[Array, "pair col width"]
    ranks: Int[Array, " pair"]
    edge: Float[Array, " pair"]
    tail_ratio: Float[Array, " pair"]


def noise_scales(weights: Weights, dtype: jnp.dtype) -> Scales:
    """Row and column factors of the rounding error, relative to its rms.

    The outer product of the factors fits ulp(W')^2, averaged over models, as a rank-one matrix.
    Rows without noise (all zero) get a small positive factor.
    """
    total = linalg.sum_models(jnp.square(spacing(as_merged(weights)).astype(dtype)))
    mean = jnp.maximum(jnp.mean(total), jnp.finfo(dtype).tiny)
    floor = jnp.asarray(1e-6, dtype)
    row = jnp.sqrt(jnp.maximum(jnp.mean(total, axis=1) / mean, floor))
    col = jnp.sqrt(jnp.maximum(jnp.mean(total, axis=0) / mean, floor))
    return Scales(row, col)


def factor_pairs(
    weights: Weights, width: int, dtype: jnp.dtype, batch_size: int
) -> tuple[PairFactors, Scales]:
    """Singular triplets of all pairwise differences, by a sketch and one power step.

    Args:
      weights: merged weights of one layer as stored.
      width: sketch width; a rank within 8 of it may have been cut off.
      dtype: dtype of the algebra.
      batch_size: pairs that are worked on at a time.

    Returns:
      Factors of the whitened differences, and the scales they were whitened with.
    """
    models = jax.tree.map(jnp.asarray, as_merged(weights))
    plan = plan_pairs(models.values.shape[0])
    scales = noise_scales(models, dtype)
    sketch = jax.random.rademacher(jax.random.key(0), (models.values.shape[2], width), dtype)

    def factor(pair: tuple[Array, Array]) -> PairFactors:
        first, second = (jax.tree.map(lambda part, m=m: part[m], models) for m in pair)
        difference = first.values.astype(dtype) - second.values.astype(dtype)
        variance = jnp.square(ulp(*first).astype(dtype)) + jnp.square(ulp(*second).astype(dtype))
        return factor_difference(difference, variance / 12, scales, sketch)

    pairs = (jnp.asarray(plan.first), jnp.asarray(plan.second))
    return linalg.map_batched(factor, pairs, batch_size), scales


def factor_difference(
    difference: Float[Array, "row col"],
    variance: Float[Array, "row col"],
    scales: Scales,
    sketch: Float[Array, "col width"],
) -> PairFactors:
    """Singular triplets of one difference, by a sketch and one power step.

    Args:
      difference: of two models, or of a model and its base.
      variance: of its rounding error.
      scales: what it is whitened with.
      sketch: signs, as wide as the factors shall be.

    Returns:
      Factors of the whitened difference, without the pair axis.
    """
    dtype = difference.dtype
    difference = difference / scales.row[:, None] / scales.col
    basis = linalg.orthonormalize(linalg.long_matmul(difference, sketch))
    right = linalg.orthonormalize(linalg.long_matmul(difference.T, basis))
    image = linalg.long_matmul(difference, right)
    basis = linalg.orthonormalize(image)
    left, values, turn = linalg.svd_square(linalg.matmul(basis.T, image))
    variance = variance / jnp.square(scales.row)[:, None] / jnp.square(scales.col)
    variance = variance + MERGE_ARITHMETIC * jnp.square(difference)
    edge = pair_edge(variance)
    left, right = linalg.matmul(basis, left), linalg.matmul(right, turn)
    if dtype == jnp.float32:
        edge = edge + values[0] * jnp.finfo(dtype).eps * 2
    noise = jnp.maximum(jnp.sum(variance), jnp.finfo(dtype).tiny)
    total = jnp.sum(jnp.square(difference))
    if dtype == jnp.float64:  # in float32 a difference of squares would leave nothing
        edge = edge * _excess(values, edge, total, noise, difference.shape)
    signal = values > edge
    kept = jnp.where(signal, values, 0)
    if dtype == jnp.float32:
        tail = jnp.sum(jnp.square(difference - linalg.matmul(left * kept, right.T)))
    else:
        tail = total - jnp.sum(jnp.square(kept))
    return PairFactors(
        left=left,
        values=values,
        right=right,
        ranks=jnp.sum(signal, dtype=jnp.int32),
        edge=edge,
        tail_ratio=jnp.sqrt(jnp.maximum(tail, 0) / noise),
    )


def _excess(
    values: Float[Array, " width"], edge: Array, total: Array, noise: Array, shape: tuple[int, ...]
) -> Array:
    """What is left over beside one rounding: about the root of two for models rounded twice.

    The edge knows one rounding; in chained merges and averages the noise of a difference would
    stand out as a direction of its own.
    """
    signal = values > edge
    rank = jnp.sum(signal, dtype=values.dtype)
    rest = jnp.maximum(total - jnp.sum(jnp.square(jnp.where(signal, values, 0))), 0)
    freedom = jnp.maximum((1 - rank / shape[0]) * (1 - rank / shape[1]), 0.05)
    return jnp.clip(jnp.sqrt(rest / (noise * freedom)), 1, 2)
