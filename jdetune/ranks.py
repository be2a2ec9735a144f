"""Ranks of the updates from the ranks of pairwise differences.

For generic updates ``rank(W'_i - W'_j) = r_i + r_j``, so every triple gives
``2 r_i = r_ij + r_ik - r_jk``. A rank that is not an integer, or triples that disagree, means that
updates share directions; it is reported, never rounded away.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

#: Factors on the noise edge that are tried until all triples agree: a weak direction may stand out
#: in one difference and not in another.
EDGE_FACTORS = tuple(1.06**step for step in range(25))


@dataclasses.dataclass(frozen=True)
class PairPlan:
    """Which models are compared: static, a function of the number of models alone.

    Attributes:
      first: first model of each pair, [pair].
      second: second model of each pair, [pair].
      partner: pairs that a model is in, [model, partner].
      sign: +1 where the model is the first of that pair, -1 where the second, [model, partner].
      triples: for each model the pairs (ij, ik, jk) of its triples, [model, triple, 3].
    """

    first: np.ndarray
    second: np.ndarray
    partner: np.ndarray
    sign: np.ndarray
    triples: np.ndarray


def plan_pairs(n_models: int) -> PairPlan:
    """Ring neighbours at offsets one and two: at most 2n pairs, all of them up to five models.

    Args:
      n_models: number of models, at least three.

    Returns:
      The pairs; every model is in the same number of pairs and of triples.

    Example:
      >>> plan = plan_pairs(3)
      >>> plan.first.tolist(), plan.second.tolist()
      ([0, 0, 1], [1, 2, 2])
      >>> len(plan_pairs(40).first)
      80
    """
    if n_models < 3:
        raise ValueError(f"pairs and triples need at least three models, got {n_models}")
    ring = {
        (min(i, j), max(i, j))
        for i in range(n_models)
        for j in ((i + 1) % n_models, (i + 2) % n_models)
    }
    pairs = sorted(ring)
    index = {pair: p for p, pair in enumerate(pairs)}
    partner = [[p for p, pair in enumerate(pairs) if i in pair] for i in range(n_models)]
    sign = [[1 if pairs[p][0] == i else -1 for p in row] for i, row in enumerate(partner)]
    triples = []
    for i in range(n_models):
        others = sorted({m for p in partner[i] for m in pairs[p]} - {i})
        triples.append(
            [
                (index[min(i, j), max(i, j)], index[min(i, k), max(i, k)], index[j, k])
                for a, j in enumerate(others)
                for k in others[a + 1 :]
                if (j, k) in index
            ]
        )
    return PairPlan(
        first=np.array([pair[0] for pair in pairs], np.int32),
        second=np.array([pair[1] for pair in pairs], np.int32),
        partner=np.array(partner, np.int32),
        sign=np.array(sign, np.int32),
        triples=np.array(triples, np.int32),
    )


def model_ranks(
    pair_ranks: Int[Array, " pair"], plan: PairPlan
) -> tuple[Int[Array, " model"], Bool[Array, ""]]:
    """Rank of each model's update, and whether all triples agree on integers.

    Args:
      pair_ranks: rank of each pair's difference.
      plan: the pairs and triples.

    Returns:
      Ranks (the smallest that a triple gives, rounded down, at least 0) and the verdict.

    Example:
      >>> import jax.numpy as jnp
      >>> ranks, agree = model_ranks(jnp.array([3, 5, 6]), plan_pairs(3))
      >>> ranks.tolist(), bool(agree)
      ([1, 2, 4], True)
    """
    r = pair_ranks[plan.triples]
    twice = r[..., 0] + r[..., 1] - r[..., 2]
    smallest = jnp.min(twice, axis=1)
    agree = jnp.all(twice == smallest[:, None]) & jnp.all(smallest % 2 == 0)
    agree &= jnp.all(smallest >= 0)
    return jnp.maximum(smallest // 2, 0), agree


def clear_ranks(
    values: Float[Array, "pair width"], edge: Float[Array, " pair"], plan: PairPlan
) -> tuple[Int[Array, " pair"], Int[Array, " model"], Bool[Array, ""], Float[Array, " pair"]]:
    """Ranks at the lowest multiple of the noise edge at which all triples agree.

    Directions between the edge and the multiple are left out of the updates; the residual then
    shows what that costs, and is judged as always.

    Args:
      values: singular values of the differences, largest first.
      edge: largest singular value that rounding alone gives each.
      plan: the pairs and triples.

    Returns:
      Ranks of the differences, ranks of the models, whether the triples agree at any multiple
      (if not, all is as at the edge itself), and the edge used.

    Example:
      >>> import jax.numpy as jnp
      >>> values = jnp.array([[9.0, 8, 1.1], [9.0, 7, 0.9], [9.0, 8, 0.8]])
      >>> pairs, ranks, agree, edge = clear_ranks(values, jnp.ones(3), plan_pairs(3))
      >>> ranks.tolist(), bool(agree), edge.round(4).tolist()
      ([1, 1, 1], True, [1.1236, 1.1236, 1.1236])
    """
    factors = jnp.asarray(EDGE_FACTORS, edge.dtype)
    counts = jnp.sum(values > factors[:, None, None] * edge[:, None], axis=2, dtype=jnp.int32)
    ranks, agree = jax.vmap(lambda count: model_ranks(count, plan))(counts)
    first = jnp.argmax(agree)
    return counts[first], ranks[first], agree[first], factors[first] * edge
