r"""Base and updates by least squares, for row spaces that the pairwise differences show.

Where every direction of the updates stands clear of the rounding, two passes over the weights are
enough. The row space of one update is what its differences to two neighbours have in common. With
orthonormal rows :math:`V_i` known, :math:`W'_i = W + P_i V_i^T` is linear in all that is left:

.. math::
   [P_1 \dots P_n]\,\bigl(\mathrm{diag}(V_i^T V_i) - \tfrac1n [V_j^T V_i]\bigr)
   = [(W'_i - \bar W')\,V_i], \qquad W = \bar W' - \tfrac1n \sum_i P_i V_i^T .

In large matrices the products over the elements are float32, summed over long axes in float64 as is
all else; small ones are float64 throughout. What is not ``clear`` belongs to
``jdetune.solvers.intersection``, which looks closer and costs more.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jdetune import linalg
from jdetune.noise import Merged, Weights, as_merged, pair_edge, ulp
from jdetune.solvers.pairs import MERGE_ARITHMETIC, Scales

#: Columns of the sketch beside twice the largest rank.
OVERSAMPLING = 8
#: Columns that are added with random signs before the sketch, at most: it costs so much less.
FOLD = 8
#: The weakest direction of a difference stands this many times above the largest that rounding has.
CLEAR = 4.0
#: Squared cosine from which a direction counts as common to two differences,
COMMON = 0.9
#: and below which it does not; nothing may lie between.
OWN = 0.8
#: Conditioning below which directions are nearly shared.
WELL_CONDITIONED = 1e-2
#: Residuals above this many times the rounding error are not rounding.
RESIDUAL_LIMIT = 1.5
#: Random vectors that the residual is seen through.
PROBES = 4
#: Length of float32 sums, at least, and their number, at most; they are added up in float64.
BLOCK = 64
BLOCKS = 16
#: Power that stands for none.
TINY = 1e-60
#: Elements from which products over the elements are float32.
LARGE = 2**18


class RowSpaceSolution(NamedTuple):
    """One layer, solved: updates ``left @ right``; valid only where ``clear``.

    ``conditioning``, ``rank_gap`` and ``detection_floor`` are as in ``intersection.Solution``;
    ``pair_ranks`` tells which width would do where this one is too small.
    """

    base: Float[Array, "row col"]
    left: Float[Array, "model row rank"]
    right: Float[Array, "model rank col"]
    ranks: Int[Array, " model"]
    pair_ranks: Int[Array, " model"]
    clear: Bool[Array, ""]
    residual_ratio: Float[Array, ""]
    conditioning: Float[Array, ""]
    rank_gap: Float[Array, ""]
    detection_floor: Float[Array, ""]
    scales: Scales


class _Pairs(NamedTuple):
    """Whitened differences of neighbours, seen through their column spaces.

    The right singular vectors are ``rows.T @ turn``.
    """

    rows: Float[Array, "model width col"]
    turn: Float[Array, "model width width"]
    values: Float[Array, "model width"]


class _Noise(NamedTuple):
    """Whitening, and the rounding error of whitened weights: its power and its spectral edge."""

    scales: Scales
    power: Float[Array, ""]
    edge: Float[Array, ""]


def solve_layer(weights: Weights, max_rank: int, batch_size: int = 1) -> RowSpaceSolution:
    """Solves one layer; pure, to be traced inside ``linalg.scope`` of float64.

    Args:
      weights: merged weights of one layer as stored, three models or more.
      max_rank: static size of the rank axis; larger ranks are not ``clear``.
      batch_size: models that are worked on at a time.

    Returns:
      The solution. ``clear`` says whether it may be used.
    """
    models = jax.tree.map(jnp.asarray, as_merged(weights))
    n_models, row, col = models.values.shape
    width = min(2 * max_rank + OVERSAMPLING, row, col)
    noise = _noise(models)
    mean = _mean(models.values)
    pairs = _pair_row_spaces(models.values, noise.scales, width, batch_size)
    values, sizes = pairs.values, jnp.sqrt(jnp.sum(jnp.square(pairs.values), axis=1))
    edge = noise.edge + jnp.sqrt(MERGE_ARITHMETIC) * sizes
    ranks_of_pairs = jnp.sum(values > edge[:, None], axis=1, dtype=jnp.int32)
    held = jnp.arange(width, dtype=jnp.int32) < ranks_of_pairs[:, None]
    turn = jnp.where(held[:, None], pairs.turn, 0)[:, :, : 2 * max_rank]
    rows, ranks, apart = _common(pairs, turn, max_rank, batch_size)
    active = jnp.arange(max_rank, dtype=jnp.int32) < ranks[:, None]
    rows = jnp.where(active[:, :, None], rows, 0).astype(_product_dtype(row, col))

    probes = jax.random.rademacher(jax.random.key(2), (PROBES, col), jnp.float32)
    seen = _project(models.values, mean, rows, probes, noise.scales, batch_size)
    right = rows.astype(jnp.float64)
    wide = right.reshape(-1, col)
    gram = _gram(rows, batch_size)
    system = _system(gram, n_models, active)
    inverse = linalg.inverse_definite(system)
    data = jnp.moveaxis(seen[:, :, :max_rank], 0, 1).reshape(row, -1)
    left = jnp.where(active.reshape(-1), linalg.matmul(data, inverse), 0)
    shift = linalg.matmul(left * noise.scales.row[:, None], wide * noise.scales.col)
    left = jnp.moveaxis(left.reshape(row, n_models, max_rank), 1, 0)

    through = linalg.contract("mac,pc->map", right, probes.astype(right.dtype))
    moved = linalg.contract("mra,map->mrp", left, through)
    residual = seen[:, :, max_rank:] - moved + jnp.mean(moved, axis=0)
    power = noise.power + MERGE_ARITHMETIC / 2 * jnp.mean(jnp.square(sizes)) / (row * col)
    share = jnp.mean(jnp.square(residual)) / col / power * n_models / (n_models - 1)
    ratio = jnp.sqrt(share)

    conditioning = _conditioning(left, gram)
    last = jnp.take_along_axis(values, jnp.maximum(ranks_of_pairs - 1, 0)[:, None], axis=1)[:, 0]
    first_out = jnp.minimum(ranks_of_pairs, width - 1)[:, None]
    after = jnp.take_along_axis(values, first_out, axis=1)[:, 0]
    clear = jnp.all(last > CLEAR * edge) & jnp.all(apart)  # nothing seen may be too weak to see
    clear &= jnp.all(ranks + jnp.roll(ranks, -1) == ranks_of_pairs)
    clear &= jnp.max(ranks_of_pairs) + OVERSAMPLING <= width
    clear &= (conditioning > WELL_CONDITIONED) & (ratio < RESIDUAL_LIMIT)
    return RowSpaceSolution(
        base=mean - shift / n_models,
        left=left * noise.scales.row[:, None],
        right=right * noise.scales.col,
        ranks=ranks,
        pair_ranks=ranks_of_pairs,
        clear=clear,
        residual_ratio=ratio,
        conditioning=conditioning,
        rank_gap=jnp.min(last / jnp.maximum(after, 1e-30)),
        detection_floor=jnp.max(edge) * CLEAR,
        scales=noise.scales,
    )


def _noise(models: Merged) -> _Noise:
    """From the first model: the others' weights are of the same size, but may have other grids."""
    first = Merged(*(part[0] for part in models))
    square = jnp.square(ulp(jnp.asarray(first.values), first.eps, first.smallest))
    mean = jnp.maximum(jnp.mean(square), jnp.finfo(jnp.float32).tiny)
    row = jnp.sqrt(jnp.maximum(jnp.mean(square, axis=1) / mean, 1e-6))
    col = jnp.sqrt(jnp.maximum(jnp.mean(square, axis=0) / mean, 1e-6))
    grids = jnp.mean(jnp.square(models.eps / first.eps)).astype(jnp.float64)
    worst = jnp.max(jnp.square(models.eps / first.eps))
    white = square / jnp.square(row)[:, None] / jnp.square(col) / 12
    scales = Scales(*(side.astype(jnp.float64) for side in (row, col)))
    power = jnp.mean(white).astype(jnp.float64) * grids
    return _Noise(scales, power, (pair_edge(white) * jnp.sqrt(2 * worst)).astype(jnp.float64))


def _mean(values: Float[Array, "model row col"]) -> Float[Array, "row col"]:
    return linalg.sum_models(values.astype(jnp.float64)) / values.shape[0]


def _pair_row_spaces(
    values: Float[Array, "model row col"], scales: Scales, width: int, batch_size: int
) -> _Pairs:
    """Row spaces of the differences of neighbours: a shared sketch, and one product with it."""
    n_models, row, col = values.shape
    fold = max(1, min(FOLD, col // (2 * width)))
    folded = -(-col // fold)
    dtype = _product_dtype(row, col)
    keys = jax.random.split(jax.random.key(0))
    signs = jax.random.rademacher(keys[0], (col,), jnp.float32) / scales.col.astype(jnp.float32)
    signs = jnp.pad(signs, (0, fold * folded - col))
    dense = jax.random.rademacher(keys[1], (folded, width), jnp.float32)
    here = jnp.arange(n_models, dtype=jnp.int32)
    there = jnp.roll(here, -1)

    def sketch(model: Array) -> Array:
        difference = values[model].astype(jnp.float32) - values[0].astype(jnp.float32)
        difference = jnp.pad(difference, ((0, 0), (0, fold * folded - col))) * signs
        parts = [difference[:, k * folded : (k + 1) * folded] for k in range(fold)]
        return linalg.matmul(sum(parts[1:], parts[0]), dense)

    sketches = linalg.map_batched(sketch, here, batch_size)

    def rows_of(pair: tuple[Array, Array]) -> Array:
        image = (sketches[pair[0]] - sketches[pair[1]]).astype(jnp.float64)
        image = image / scales.row[:, None]
        # any basis near the column space will do: only its directions must be exact in float64
        power, axes = linalg.eigh_descending(linalg.matmul(image.T, image))
        floor = jnp.maximum(power[0] * jnp.finfo(power.dtype).eps * width, TINY)
        axes = axes * jax.lax.rsqrt(jnp.maximum(power, floor))
        left = linalg.matmul(image.astype(dtype), axes.astype(dtype))
        left = left / scales.row[:, None].astype(dtype)
        first, second = (functools.partial(_rows_of, values, model, dtype) for model in pair)
        rows = _blocked(lambda block: first(block) - second(block), left)
        return (rows / scales.col).astype(dtype)

    def axes_of(rows: Array) -> tuple[Array, Array]:
        exact = rows.astype(jnp.float64)
        power, turn = linalg.eigh_descending(linalg.matmul(exact, exact.T))
        size = jnp.sqrt(jnp.maximum(power, jnp.finfo(power.dtype).tiny))
        return turn / size, size

    rows = linalg.map_batched(rows_of, (here, there), batch_size)
    return _Pairs(rows, *linalg.map_batched(axes_of, rows, batch_size))


def _blocked(rows, left: Float[Array, "row width"]) -> Float[Array, "width col"]:
    """``left.T @ matrix`` over blocks of rows, summed in float64."""

    def part(block: slice) -> Array:
        return linalg.matmul(linalg.laid_out(left[block].T), rows(block)).astype(jnp.float64)

    return functools.reduce(jnp.add, map(part, _blocks(left)))


def _rows_of(values: Array, model: Array, dtype: jnp.dtype, block: slice) -> Array:
    return values[model, block].astype(dtype)


def _product_dtype(row: int, col: int) -> jnp.dtype:
    return jnp.dtype(jnp.float32 if row * col >= LARGE else jnp.float64)


def _blocks(long: Array) -> list[slice]:
    """Slices of the leading axis that float32 may sum over; one in float64."""
    length = long.shape[0]
    step = max(BLOCK, -(-length // BLOCKS)) if long.dtype == jnp.float32 else length
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _common(
    pairs: _Pairs,
    turn: Float[Array, "model width held"],
    max_rank: int,
    batch_size: int,
) -> tuple[Float[Array, "model rank col"], Int[Array, " model"], Bool[Array, " model"]]:
    """What the differences of a model to its two neighbours have in common, and if that is clear.

    With orthonormal X and Y and the decomposition of X^T Y, the directions X u + Y v of one
    singular value c are orthogonal and of the squared length 2 + 2c. All c are nearly one, so u is
    any basis; it is turned to the axes of the difference, strongest first.
    """
    rows = pairs.rows
    here = jnp.arange(rows.shape[0], dtype=jnp.int32)

    def one(pair: tuple[Array, Array]) -> tuple[Array, Array]:
        x, y = pair
        wide = [rows[side].astype(jnp.float64) for side in pair]
        angles = linalg.matmul(linalg.matmul(turn[x].T, linalg.matmul(wide[0], wide[1].T)), turn[y])
        square, u = linalg.eigh_descending(linalg.matmul(angles, angles.T))
        cosine = jnp.sqrt(jnp.maximum(square[:max_rank], 1e-3))
        u = jnp.where(square[:max_rank] > COMMON, u[:, :max_rank], 0)
        v = linalg.matmul(angles.T, u) / cosine
        seen = pairs.values[x, : u.shape[0], None] * u
        _, axes = linalg.eigh_descending(linalg.matmul(seen.T, seen))
        u, v = (linalg.matmul(w / jnp.sqrt(2 + 2 * cosine), axes) for w in (u, v))
        first, second = (linalg.matmul(turn[side], w).T for side, w in ((x, u), (y, v)))
        both = linalg.matmul(linalg.laid_out(first), wide[0])
        return both + linalg.matmul(linalg.laid_out(second), wide[1]), square

    found, square = linalg.map_batched(one, (jnp.roll(here, 1), here), batch_size)
    ranks = jnp.sum(square > COMMON, axis=1, dtype=jnp.int32)
    return found, ranks, ~jnp.any((square > OWN) & (square <= COMMON), axis=1)


def _project(
    values: Float[Array, "model row col"],
    mean: Float[Array, "row col"],
    rows: Float[Array, "model rank col"],
    probes: Float[Array, "probe col"],
    scales: Scales,
    batch_size: int,
) -> Float[Array, "model row seen"]:
    """Whitened models less their mean, times their rows and the probes."""
    dtype = _product_dtype(*values.shape[1:])
    across = scales.col.astype(dtype)

    def one(operands: tuple[Array, Array]) -> Array:
        stored, own = operands
        target = linalg.laid_out((jnp.concatenate([own, probes.astype(dtype)]) / across).T)

        def part(block: slice) -> Array:
            error = stored[:, block].astype(jnp.float64) - mean[:, block]
            return linalg.matmul(error.astype(dtype), target[block]).astype(jnp.float64)

        return functools.reduce(jnp.add, map(part, _blocks(target))) / scales.row[:, None]

    return linalg.map_batched(one, (values, rows), batch_size)


def _gram(rows: Float[Array, "model rank col"], batch_size: int) -> Float[Array, "all all"]:
    """Inner products of all rows; float64 within a model, where they are not small."""
    n_models, rank, col = rows.shape
    wide = rows.reshape(-1, col)
    across = linalg.matmul(wide, wide.T).astype(jnp.float64)

    def own(part: Array) -> Array:
        exact = part.astype(jnp.float64)
        return linalg.matmul(exact, exact.T)

    within = linalg.map_batched(own, rows, batch_size)
    blocks = across.reshape(n_models, rank, n_models, rank)
    here = jnp.arange(n_models, dtype=jnp.int32)
    return blocks.at[here, :, here].set(within).reshape(across.shape)


def _system(gram: Array, n_models: int, active: Bool[Array, "model rank"]) -> Array:
    """The normal equations of all left factors together; unused columns are the identity."""
    own = np.kron(np.eye(n_models), np.ones((active.shape[1],) * 2)) > 0
    spare = jnp.where(active.reshape(-1), 0, 1).astype(gram.dtype)
    return jnp.where(own, gram, 0) - gram / n_models + jnp.diag(spare)


def _conditioning(left: Array, gram: Array) -> Array:
    """Squared sines of the smallest angles of neighbours' spaces, columns times rows."""
    n_models, _, rank = left.shape
    here = jnp.arange(n_models, dtype=jnp.int32)
    there = jnp.roll(here, -1)
    blocks = gram.reshape(n_models, rank, n_models, rank)
    of_rows = blocks[here, :, there]
    of_columns = linalg.contract("mra,mrb->mab", left, left[there])
    power, axes = linalg.eigh_descending(linalg.contract("mra,mrb->mab", left, left))
    held = power > power[:, :1] * 1e-14
    axes = axes * jnp.where(held, jax.lax.rsqrt(jnp.where(held, power, 1)), 0)[:, None]
    of_columns = linalg.contract("mai,mab,mbj->mij", axes, of_columns, axes[there])

    def sine(angles: Array) -> Array:
        values, _ = linalg.eigh_descending(linalg.contract("mab,mac->mbc", angles, angles))
        return 1 - jnp.minimum(jnp.max(values), 1)

    return sine(of_rows) * sine(of_columns)
