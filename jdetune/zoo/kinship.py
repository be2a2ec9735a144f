"""Ranks of the updates within a group, and sub-families whose own base is a merged model.

Ranks of differences say this much: for generic updates ``rank(W'_i - W'_j) = r_i + r_j``. Where
members fall into sub-families, each with a further update in common, differences across them have
a higher rank than the members' own updates add up to.
"""

import dataclasses
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from jdetune.ranks import EDGE_FACTORS, plan_pairs
from jdetune.types import STORAGE_DTYPES
from jdetune.zoo.pairs import pair_spectrum
from jdetune.zoo.sampling import Sampler, kind_of

#: Matrices in which the ranks are measured.
MEASURED = 2
#: Members up to which all pairs are measured, to find sub-families.
ALL_PAIRS = 12
#: What a rank may be off by: weak directions are lost in the rounding.
SLACK, SLACK_SHARE = 2, 0.1


@dataclasses.dataclass(frozen=True)
class Kinship:
    """How the members of a group are related.

    Attributes:
      ranks: matrix to the rank of every member's update, by the model's index; a matrix in which
        the ranks do not add up is left out. With sub-families, of the update to their own base.
      pair_rank: rank of the difference of the first two members, in the first matrix measured.
      families: sub-families, indices of models; one where there are none.
      apart: rank by which the bases of two sub-families differ, in the first matrix measured; None
        where there are no sub-families.
    """

    ranks: dict[str, dict[int, int]]
    pair_rank: int | None
    families: tuple[tuple[int, ...], ...]
    apart: int | None = None

    def of(self, model: int) -> tuple[int, ...]:
        """A member's ranks in all matrices measured."""
        return tuple(ranks[model] for ranks in self.ranks.values() if model in ranks)


def kinship(sampler: Sampler, members: Sequence[int], names: Sequence[str]) -> Kinship:
    """Measures ranks in a few matrices, of different kinds where there are.

    Args:
      sampler: reads the models.
      members: indices of models that differ and share a base.
      names: matrices in which two of them differ by low rank, the best first.
    """
    chosen = _choose(names)
    everybody = (tuple(members),)
    pair_rank = None
    if chosen:
        storage = [sampler.storage(member, chosen[0]) for member in members[:2]]
        first = pair_spectrum(sampler, members[0], members[1], chosen[0], storage)
        pair_rank = None if first is None else first.rank
    if len(members) < 3:
        return Kinship({}, pair_rank, everybody)
    ranks: dict[str, dict[int, int]] = {}
    for name in chosen:
        found = _agreeing(sampler, members, name)
        if not found and len(members) <= ALL_PAIRS:
            families, apart = _families(sampler, members, name)
            if len(families) > 1:
                return _apart(sampler, families, apart, chosen, pair_rank)
        if found:
            ranks[name] = found
    return Kinship(ranks, pair_rank, everybody)


def _choose(names: Sequence[str]) -> list[str]:
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(kind_of(name), name)
    return [*kinds.values(), *(n for n in names if n not in kinds.values())][:MEASURED]


def _agreeing(sampler: Sampler, members: Sequence[int], name: str) -> dict[int, int]:
    """Ranks on which all triples agree, of those members of one storage dtype that have any."""
    storages: dict[str, list[int]] = {}
    for member in members:
        sampler.get(member, name)
        storages.setdefault(sampler.storage(member, name), []).append(member)
    ranks: dict[int, int] = {}
    for storage, alike in storages.items():
        ranks |= _clear(sampler, alike, name, storage) if len(alike) > 2 else {}
    return ranks


def _clear(sampler: Sampler, members: Sequence[int], name: str, storage: str) -> dict[int, int]:
    """Ranks of members of one storage dtype: ``ranks.clear_ranks``, on the host."""
    plan = plan_pairs(len(members))
    found = [
        pair_spectrum(sampler, members[a], members[b], name, (storage, storage))
        for a, b in zip(plan.first, plan.second, strict=True)
    ]
    known = [one for one in found if one is not None]
    for factor in EDGE_FACTORS if len(known) == len(found) else ():
        rank = np.array([np.sum(one.values > factor * one.edge) for one in known])[plan.triples]
        twice = rank[..., 0] + rank[..., 1] - rank[..., 2]
        if (twice == twice[:, :1]).all() and (twice % 2 == 0).all() and (twice >= 0).all():
            return dict(zip(members, (twice[:, 0] // 2).tolist(), strict=True))
    return {}


def _families(
    sampler: Sampler, members: Sequence[int], name: str
) -> tuple[tuple[tuple[int, ...], ...], int | None]:
    """Sub-families by all pairs: across them ranks exceed what the members' own add up to.

    All ranks are those above the rounding of the widest steps among the members. A member that
    seems to be a sub-family of its own is none: its update would be that of its base as well.
    """
    everybody = (tuple(members),)
    storage = max((sampler.storage(m, name) for m in members), key=STORAGE_DTYPES.index)
    pair: dict[tuple[int, int], int] = {}
    for a, b in combinations(members, 2):
        found = pair_spectrum(sampler, a, b, name, (storage, storage))
        if found is None:
            return everybody, None
        pair[a, b] = pair[b, a] = found.rank
    own = {
        m: min(
            (pair[m, a] + pair[m, b] - pair[a, b]) // 2
            for a, b in combinations([other for other in members if other != m], 2)
        )
        for m in members
    }
    families: list[list[int]] = []
    for m in members:
        for family in families:
            if all(_near(pair[m, other], own[m] + own[other]) for other in family):
                family.append(m)
                break
        else:
            families.append([m])
    if min(map(len, families)) < 2:
        return everybody, None
    across = [
        pair[a, b] - own[a] - own[b]
        for one, two in combinations(families, 2)
        for a in one
        for b in two
    ]
    apart = int(np.median(across)) if across else None
    return tuple(map(tuple, families)), apart


def _near(rank: int, expected: int) -> bool:
    return rank - expected <= SLACK + SLACK_SHARE * expected


def _apart(
    sampler: Sampler,
    families: tuple[tuple[int, ...], ...],
    apart: int | None,
    names: Sequence[str],
    pair_rank: int | None,
) -> Kinship:
    """Ranks within every sub-family that is large enough to tell."""
    ranks: dict[str, dict[int, int]] = {}
    for name in names:
        for family in families:
            ranks.setdefault(name, {}).update(_agreeing(sampler, family, name))
    return Kinship(ranks, pair_rank, families, apart)
