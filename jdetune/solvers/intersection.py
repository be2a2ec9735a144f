r"""Subspace intersection: base and updates in closed form, with ranks found from the data.

The difference of two models needs no base: :math:`D_{ij} = W'_i - W'_j = M_i - M_j` up to rounding.
For generic updates its column space is :math:`\mathrm{col}(M_i) + \mathrm{col}(M_j)`, so that of
one update is the intersection of the column spaces of its differences, and

.. math::
   [U_i\,U_j]^+ D_{ij} ([V_i\,V_j]^+)^T = \mathrm{blockdiag}(X_i, -X_j), \qquad
   W = \mathrm{mean}_i(W'_i - U_i X_i V_i^T).

There is no iteration count, no rank to guess and no schedule; pairs at ring offsets one and two
make the work linear in the number of models.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdetune import linalg
from jdetune.noise import ROUNDINGS, Weights, as_merged, ulp
from jdetune.ranks import PairPlan, clear_ranks, plan_pairs
from jdetune.solvers.pairs import PairFactors, Scales, factor_pairs
from jdetune.types import STORAGE_DTYPES

#: A further common direction is called shared if its misfit is within this many times the rounding,
SHARED_TOLERANCE = 4.0
#: and if the squared sine of its angle to the others' spaces is below this: weak directions, whose
#: angles are unknown, are no sign of anything.
SHARED_MISFIT = 0.1


@dataclasses.dataclass(frozen=True)
class SubspaceIntersection:
    """The default solver: closed form, three models or more, ranks from the data.

    Attributes:
      polish: refine the closed form to the most likely base and updates, weighing every element
        by its own rounding error (``jdetune.solvers.likelihood``), then decide every element of
        the base on its grid (``jdetune.exact``) and certify it (``jdetune.certificate``).
      precision: dtype of the dense algebra. ``auto`` is float64 where the hardware has it, and
        float32 on TPU.
      base_dtype: grid that the base lies on. ``auto`` finds bfloat16 and float16 in wider models.
      rounding: how the models were merged: R0 and R1 round the sum (PEFT's default), R2 also the
        update before (``safe_merge=True``), R3 the update twice (16-bit adapters on CUDA).
      rank: None to find the ranks; an integer where every update is known to have that rank; a
        share between 0 and 1 to find them and cut each adapter to that share of its energy, which
        the base does not notice.

    Raises:
      ValueError: a value that is none of these.

    Example:
      >>> SubspaceIntersection().precision
      'auto'
    """

    polish: bool = True
    precision: linalg.Precision = "auto"
    base_dtype: str = "auto"
    rounding: str = "R1"
    rank: int | float | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.base_dtype not in ("auto", *STORAGE_DTYPES):
            known = ", ".join(("auto", *STORAGE_DTYPES))
            raise ValueError(f"base_dtype is one of {known}; got {self.base_dtype!r}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding is one of {', '.join(ROUNDINGS)}; got {self.rounding!r}")
        known = self.rank is None or (
            self.rank >= 1 if isinstance(self.rank, int) else 0 < self.rank < 1
        )
        if not known:
            raise ValueError(
                f"rank is None, an integer of 1 or more, or a share below 1; got {self.rank}"
            )


class Solution(NamedTuple):
    """One layer, solved: the base and the updates as left @ core @ right^T.

    ``conditioning`` is about the squared sine of the smallest angle between two models' spaces,
    columns times rows: small where directions are nearly shared. ``detection_floor`` is the
    singular value of an update below which it is lost in the rounding.
    """

    base: Float[Array, "row col"]
    left: Float[Array, "model row rank"]
    core: Float[Array, "model rank rank"]
    right: Float[Array, "model col rank"]
    ranks: Int[Array, " model"]
    agree: Bool[Array, ""]
    shared: Bool[Array, ""]
    residual_ratio: Float[Array, ""]
    tail_ratio: Float[Array, ""]
    shared_margin: Float[Array, ""]
    conditioning: Float[Array, ""]
    rank_gap: Float[Array, ""]
    detection_floor: Float[Array, ""]


def _common_directions(
    basis: Float[Array, "pair side width"], angle: Float[Array, "pair width"], plan: PairPlan
) -> tuple[Float[Array, "model side width"], Float[Array, "model width"], Array]:
    """Directions by how far they lie in all of a model's differences, best first.

    Returns the directions, their misfit (partners minus eigenvalue of the sum of projectors: zero
    for a direction in all of them) and the misfit that rounding alone explains.
    """
    partners = plan.partner.shape[1]
    width = basis.shape[2]
    stacked = basis[plan.partner]
    gram = linalg.contract("mpsw,mqsv->mpwqv", stacked, stacked)
    gram = gram.reshape(plan.partner.shape[0], partners * width, partners * width)
    values, vectors = linalg.eigh_descending(gram)
    values, vectors = values[:, :width], vectors[:, :, :width]
    vectors = vectors.reshape(-1, partners, width, width)
    safe = jnp.maximum(values, 0.5)
    directions = linalg.contract("mpsw,mpwd->msd", stacked, vectors) / jnp.sqrt(safe)[:, None]
    weight = jnp.square(vectors) * values[:, None, None]
    explained = jnp.sum(weight * jnp.square(angle[plan.partner])[..., None], axis=(1, 2))
    return directions, partners - values, explained


def intersect(
    weights: Weights,
    factors: PairFactors,
    scales: Scales,
    max_rank: int,
    rank: int | None = None,
) -> Solution:
    """Base and updates of one layer from the factors of its pairwise differences.

    Args:
      weights: merged weights as stored.
      factors: from ``factor_pairs``; its width is at least ``2 * max_rank``.
      scales: the whitening of the factors.
      max_rank: static size of the rank axis.
      rank: rank of every update where it is known; found from the differences if None.

    Returns:
      The solution in the dtype of the factors; the base is not yet rounded to storage.
    """
    dtype = factors.values.dtype
    models = jax.tree.map(jnp.asarray, as_merged(weights))
    n_models = models.values.shape[0]
    plan = plan_pairs(n_models)
    if rank is None:
        pair_ranks, ranks, agree, floor = clear_ranks(factors.values, factors.edge, plan)
        agree &= jnp.all(ranks <= max_rank)
        ranks = jnp.minimum(ranks, max_rank)
    else:
        ranks = jnp.full(n_models, rank, jnp.int32)
        pair_ranks = jnp.full_like(factors.ranks, 2 * rank)
        agree, floor = jnp.array(True), factors.edge

    width = min(2 * max_rank, factors.values.shape[1])
    keep = jnp.arange(width, dtype=jnp.int32) < pair_ranks[:, None]
    values = factors.values[:, :width]
    left = jnp.where(keep[:, None], factors.left[:, :, :width], 0)
    right = jnp.where(keep[:, None], factors.right[:, :, :width], 0)
    values = jnp.where(keep, values, 0)
    angle = jnp.where(keep, factors.edge[:, None] / jnp.where(keep, values, 1), 0)

    active = jnp.arange(max_rank, dtype=jnp.int32) < ranks[:, None]
    sides, margins, misfits = [], [], []
    for basis in (left, right):
        directions, misfit, explained = _common_directions(basis, angle, plan)
        sides.append(jnp.where(active[:, None], directions[:, :, :max_rank], 0))
        next_one = ranks[:, None]
        margin = jnp.take_along_axis(misfit / jnp.maximum(explained, 1e-30), next_one, axis=1)
        inside = next_one[:, 0] < directions.shape[2]
        margins.append(jnp.min(jnp.where(inside, margin[:, 0], jnp.inf)))
        nearest = jnp.take_along_axis(misfit, next_one, axis=1)[:, 0]
        misfits.append(jnp.min(jnp.where(inside, nearest, 1)))
    shared_margin = jnp.minimum(*margins)

    core, conditioning = _cores(sides[0], sides[1], left, values, right, plan)
    core = jnp.where(active[:, :, None] & active[:, None, :], core, 0)
    sides[0] = sides[0] * scales.row[:, None]
    sides[1] = sides[1] * scales.col[:, None]

    reference = models.values[0].astype(dtype)

    def update(model: Array) -> Array:
        scaled = linalg.matmul(sides[0][model], core[model])
        return linalg.matmul(scaled, sides[1][model].T)

    def add(total: Array, model: Array) -> tuple[Array, None]:
        return total + (models.values[model].astype(dtype) - reference) - update(model), None

    index = jnp.arange(n_models, dtype=jnp.int32)
    shift, _ = jax.lax.scan(add, jnp.zeros_like(reference), index)
    shift = shift / n_models

    def add_residual(total: tuple[Array, Array], model: Array) -> tuple[tuple[Array, Array], None]:
        stored = jax.tree.map(lambda part: part[model], models)
        residual = (stored.values.astype(dtype) - reference) - shift - update(model)
        noise = jnp.square(ulp(*stored).astype(dtype)) / 12
        return (total[0] + jnp.sum(jnp.square(residual)), total[1] + jnp.sum(noise)), None

    zero = jnp.zeros_like(reference[0, 0])
    (squares, noise), _ = jax.lax.scan(add_residual, (zero, zero), index)
    ratio = jnp.sqrt(squares / jnp.maximum(noise * (n_models - 1) / n_models, 1e-37))

    last = jnp.take_along_axis(factors.values, jnp.maximum(pair_ranks - 1, 0)[:, None], axis=1)
    first_out = jnp.minimum(pair_ranks, factors.values.shape[1] - 1)[:, None]
    after = jnp.take_along_axis(factors.values, first_out, axis=1)
    gap = jnp.where(pair_ranks[:, None] > 0, last / jnp.maximum(after, 1e-30), jnp.inf)
    return Solution(
        base=reference + shift,
        left=sides[0],
        core=core,
        right=sides[1],
        ranks=ranks,
        agree=agree,
        shared=(shared_margin < SHARED_TOLERANCE) & (jnp.minimum(*misfits) < SHARED_MISFIT),
        residual_ratio=ratio,
        tail_ratio=jnp.max(factors.tail_ratio),
        shared_margin=shared_margin,
        conditioning=conditioning,
        rank_gap=jnp.min(gap),
        detection_floor=jnp.max(floor),
    )


def _cores(
    left: Float[Array, "model row rank"],
    right: Float[Array, "model col rank"],
    pair_left: Float[Array, "pair row width"],
    pair_values: Float[Array, "pair width"],
    pair_right: Float[Array, "pair col width"],
    plan: PairPlan,
) -> tuple[Float[Array, "model rank rank"], Float[Array, ""]]:
    """Core of each update, averaged over the pairs it is in, and the conditioning."""
    rank = left.shape[2]
    joint_left = jnp.concatenate([left[plan.first], left[plan.second]], axis=2)
    joint_right = jnp.concatenate([right[plan.first], right[plan.second]], axis=2)
    grams = jnp.concatenate(
        [
            linalg.contract("psr,pst->prt", joint_left, joint_left),
            linalg.contract("psr,pst->prt", joint_right, joint_right),
        ]
    )
    inverse_left, inverse_right = jnp.split(linalg.inverse_psd(grams), 2)
    seen_left = linalg.contract("psr,psw->prw", joint_left, pair_left) * pair_values[:, None]
    seen_right = linalg.contract("psr,psw->prw", joint_right, pair_right)
    middle = linalg.contract("prw,ptw->prt", seen_left, seen_right)
    blocks = linalg.contract("pab,pbc,pcd->pad", inverse_left, middle, inverse_right)
    first, second = blocks[:, :rank, :rank], -blocks[:, rank:, rank:]
    own = jnp.where(
        jnp.asarray(plan.sign)[:, :, None, None] > 0, first[plan.partner], second[plan.partner]
    )
    left_worst, right_worst = (
        jnp.max(jnp.diagonal(inverse, axis1=1, axis2=2))
        for inverse in (inverse_left, inverse_right)
    )
    return jnp.mean(own, axis=1), 1 / jnp.maximum(left_worst * right_worst, 1)


def solve_layer(
    weights: Weights,
    max_rank: int,
    precision: linalg.Precision = "auto",
    batch_size: int = 1,
) -> Solution:
    """The whole closed form for one layer, pure: works under jit, vmap and shard_map.

    Args:
      weights: merged weights of one layer as stored, float32, float16 or bfloat16.
      max_rank: static bound on every model's rank; larger ranks show up as ``agree == False``.
      precision: see ``SubspaceIntersection``.
      batch_size: pairs that are worked on at a time.

    Returns:
      The solution; arrays are float64 if the precision is, so trace it inside ``linalg.scope``.
    """
    dtype = linalg.resolve_dtype(precision)
    models = as_merged(weights)
    width = min(2 * max_rank + 10, *models.values.shape[1:])
    with linalg.scope(dtype):
        factors, scales = factor_pairs(models, width, dtype, batch_size)
        return intersect(models, factors, scales, max_rank)
