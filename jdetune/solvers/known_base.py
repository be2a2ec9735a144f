r"""Updates where the base is known: :math:`W' - W` is the update and one rounding error.

The difference is exact (both are stored numbers, subtracted in float64), its noise is known from
the stored dtype, and the rank is the number of its singular values above the edge of that noise.
The truncated decomposition weighs rows and columns by their rounding error; Newton steps then weigh
every element by its own (``jdetune.solvers.refit``), which is what makes a merge of the
result give the model back.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jdetune import linalg
from jdetune.factors import balanced_factors, keep_energy
from jdetune.noise import Merged, as_merged, spacing
from jdetune.solvers.pairs import PairFactors, Scales, factor_difference, noise_scales
from jdetune.solvers.refit import refit
from jdetune.stack import storage_dtypes

#: Greatest rms of what is left over, in units of the rounding error, that low rank explains.
TAIL_LIMIT = {"float64": 2.5, "float32": 10.0}
#: Width of the first sketch; it grows until the rank found stays ``HEADROOM`` below it.
FIRST_WIDTH, GROWTH, HEADROOM = 48, 4, 8
#: Newton steps of the refinement: the first takes a third off the error, more than six nothing.
NEWTON_STEPS = 6


class Update(NamedTuple):
    """A model's update of one matrix, ``left @ right``, and how well it explains the difference.

    Attributes:
      left: B, balanced, float32.
      right: A.
      low_rank: whether low rank and rounding explain the difference; also true of a given rank.
      residual_rms: rms of the difference less the update.
      noise_rms: rms of the rounding error expected of the stored dtype.
      rank_gap: last singular value kept over the first left out, both whitened.
      detection_floor: whitened singular value below which nothing can be told from rounding.
    """

    left: Float[np.ndarray, "row rank"]
    right: Float[np.ndarray, "rank col"]
    low_rank: bool
    residual_rms: float
    noise_rms: float
    rank_gap: float
    detection_floor: float

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.left.shape[1]

    @property
    def residual_ratio(self) -> float:
        """``residual_rms / noise_rms``: about 1 or below where rounding explains the rest."""
        return self.residual_rms / max(self.noise_rms, float(np.finfo(np.float32).tiny))


def extract_update(
    base: Float[np.ndarray, "row col"],
    merged: Float[np.ndarray, "row col"],
    rank: int | float | None = None,
    precision: linalg.Precision = "auto",
) -> Update:
    r"""The low-rank update that was merged into a known base.

    :math:`W' - W = BA + \epsilon` with :math:`\mathrm{var}\,\epsilon = \mathrm{ulp}(W')^2 / 12`.

    Args:
      base: W as stored, finite.
      merged: W' as stored, finite, of that shape; its dtype may differ.
      rank: None to count the singular values above the noise edge; an integer to keep as many; a
        share below 1 to find the rank and keep that share of the energy.
      precision: dtype of the algebra.

    Returns:
      The update. Of one that is not low rank the factors are empty.

    Raises:
      ValueError: the shapes differ, or the rank is none of these.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> w, b, a = (rng.standard_normal(s).astype(np.float32) for s in ((9, 8), (9, 2), (2, 8)))
      >>> extract_update(w, (w + np.matmul(b, a)).astype(np.float32)).rank
      2
    """
    if base.shape != merged.shape:
        raise ValueError(f"shapes differ: base {base.shape}, merged {merged.shape}")
    if rank is not None and not (rank >= 1 if isinstance(rank, int) else 0 < rank < 1):
        raise ValueError(f"rank is None, an integer of 1 or more, or a share below 1; got {rank}")
    dtype = linalg.resolve_dtype(precision)
    with linalg.scope(dtype):
        weights = as_merged(jnp.asarray(merged)[None], storage_dtypes(merged[None]))
        stored = jnp.asarray(base)
        pairs, scales, kept, low_rank = _find_rank(stored, weights, rank, dtype)
        if not low_rank:
            row, col = merged.shape
            nothing = np.zeros((row, 0), np.float32), np.zeros((0, col), np.float32)
            left, right = (jnp.asarray(part) for part in nothing)
        else:
            axis = max(-(-kept // 8) * 8, 8)  # few sizes, so that few programs compile
            axis = min(axis, pairs.values.shape[0])
            b, a = _refined(stored, weights, pairs, scales, jnp.asarray([kept], jnp.int32), axis)
            if isinstance(rank, float):
                ranks, b, a = keep_energy(np.asarray(b), np.asarray(a), rank)
                kept = int(ranks[0])
            left = jnp.asarray(b[0, :, :kept], jnp.float32)
            right = jnp.asarray(a[0, :kept], jnp.float32)
        residual, noise = _residual(stored, weights, left, right, dtype)
        values = np.append(np.asarray(pairs.values), 0.0)
        gap = float(values[kept - 1] / max(values[kept], 1e-30)) if kept else float("inf")
        return Update(
            left=np.asarray(left),
            right=np.asarray(right),
            low_rank=low_rank,
            residual_rms=float(residual),
            noise_rms=float(noise),
            rank_gap=gap,
            detection_floor=float(pairs.edge),
        )


def _find_rank(
    base: Array, weights: Merged, rank: int | float | None, dtype: jnp.dtype
) -> tuple[PairFactors, Scales, int, bool]:
    """Factors in a sketch that is wide enough, the rank, and whether that explains all."""
    row, col = base.shape
    smaller = min(row, col)
    most = row * col / (row + col)  # factors of a greater rank are larger than the matrix
    given = rank if isinstance(rank, int) else None
    needed = FIRST_WIDTH if given is None else given + HEADROOM
    while True:
        width = min(-(-needed // 8) * 8, smaller)
        pairs, scales = _factor(base, weights, width, dtype)
        found = int(pairs.ranks)
        if given is not None:
            return pairs, scales, min(given, smaller), True
        if width == smaller or found + HEADROOM <= width or found >= most:
            break
        needed = GROWTH * width
    fits = found < most and float(pairs.tail_ratio) < TAIL_LIMIT[str(dtype)]
    return pairs, scales, found, fits


@functools.partial(jax.jit, static_argnames=("width", "dtype"))
def _factor(
    base: Float[Array, "row col"], weights: Merged, width: int, dtype: jnp.dtype
) -> tuple[PairFactors, Scales]:
    scales = noise_scales(weights, dtype)
    sketch = jax.random.rademacher(jax.random.key(0), (base.shape[1], width), dtype)
    difference = weights.values[0].astype(dtype) - base.astype(dtype)
    variance = jnp.square(spacing(weights)[0].astype(dtype)) / 12
    return factor_difference(difference, variance, scales, sketch), scales


@functools.partial(jax.jit, static_argnames=("axis",))
def _refined(
    base: Float[Array, "row col"],
    weights: Merged,
    pairs: PairFactors,
    scales: Scales,
    ranks: Array,
    axis: int,
) -> tuple[Array, Array]:
    """Balanced factors of the leading directions, after a step that weighs every element."""
    active = jnp.arange(axis, dtype=jnp.int32) < ranks[0]
    left = jnp.where(active, pairs.left[:, :axis], 0) * scales.row[:, None]
    right = jnp.where(active, pairs.right[:, :axis], 0) * scales.col[:, None]
    core = jnp.diag(jnp.where(active, pairs.values[:axis], 0))
    b, a = balanced_factors(left[None], core[None], right[None], ranks)
    known = jnp.ones(base.shape, bool)

    b, a = refit(weights, b, a, ranks, scales, base, known, NEWTON_STEPS)
    eye = jnp.eye(axis, dtype=b.dtype)[None]
    return balanced_factors(b, eye, jnp.swapaxes(a, 1, 2), ranks)


@functools.partial(jax.jit, static_argnames=("dtype",))
def _residual(
    base: Array, weights: Merged, left: Array, right: Array, dtype: jnp.dtype
) -> tuple[Array, Array]:
    """Rms of what the update leaves over, and of the rounding error."""
    difference = weights.values[0].astype(dtype) - base.astype(dtype)
    rest = difference - linalg.matmul(left.astype(dtype), right.astype(dtype))
    noise = jnp.mean(jnp.square(spacing(weights)[0].astype(dtype))) / 12
    return jnp.sqrt(jnp.mean(jnp.square(rest))), jnp.sqrt(noise)
