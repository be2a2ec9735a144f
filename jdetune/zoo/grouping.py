"""Which models of a zoo share a base.

Headers part the architectures. Within one, every model is compared with one representative of each
group; groups that lie near each other are compared again by other representatives. What is found is
what rank tests of sampled matrices say: all comparisons are part of the result.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from jdetune import outfolder
from jdetune.checkpoint.index import Checkpoint, open_checkpoint
from jdetune.checkpoint.manifest import group_by_architecture, is_common
from jdetune.errors import InputError
from jdetune.solving import Progress
from jdetune.zoo.kinship import Kinship, kinship
from jdetune.zoo.pairs import FAR, Relation, compare_models
from jdetune.zoo.sampling import Order, Sampler, is_sampled, sample_order

#: Models that differ and share a base, at least, for the base to be recoverable.
ENOUGH = 3


@dataclasses.dataclass(frozen=True)
class Group:
    """Models that share a base, or a single one without a relative.

    Attributes:
      members: indices of the models, in the order given.
      twins: index of a model to that of an earlier one that it equals, and how
        (``copy`` or ``equal_matrices``).
      architecture: number of the architecture.
      kinship: ranks of the members' updates, and sub-families; None for a single model.
    """

    members: tuple[int, ...]
    twins: dict[int, tuple[int, str]]
    architecture: int
    kinship: Kinship | None = None

    @property
    def distinct(self) -> tuple[int, ...]:
        """Members that equal no earlier one in every matrix."""
        return tuple(m for m in self.members if m not in self.twins)

    @property
    def recoverable(self) -> bool:
        """Whether there are enough of them."""
        return len(self.distinct) >= ENOUGH


@dataclasses.dataclass(frozen=True)
class Zoo:
    """Groups of a zoo, and all that was compared to find them.

    Attributes:
      checkpoints: the models.
      groups: in the order of their first members.
      relations: every comparison.
      bytes_read: of tensors.
    """

    checkpoints: tuple[Checkpoint, ...]
    groups: tuple[Group, ...]
    relations: tuple[Relation, ...]
    bytes_read: int


@dataclasses.dataclass
class _Draft:
    """A group that grows."""

    members: list[int]
    twins: dict[int, tuple[int, str]]
    ranks: dict[int, int]

    @property
    def leader(self) -> int:
        return self.members[0]


def open_zoo(models: Sequence[str | Path]) -> list[Checkpoint]:
    """Opens models and gives them names that are safe and unique.

    Raises:
      InputError: none is given, or one cannot be read.
    """
    if not models:
        raise InputError("no model is given. Give the paths or hub ids of merged models.")
    opened = [open_checkpoint(path) for path in models]
    names = outfolder.model_names(opened)
    return [dataclasses.replace(c, name=name) for c, name in zip(opened, names, strict=True)]


def group_models(
    checkpoints: Sequence[Checkpoint],
    count: int = 4,
    seed: int = 0,
    wanted: Callable[[str], bool] = lambda name: True,
    progress: Progress | None = None,
) -> Zoo:
    """Groups opened models by base.

    Args:
      checkpoints: the models, with names of their own.
      count: differing matrices to test for every two models.
      seed: of the draw of matrices.
      wanted: which tensors may be looked at.
      progress: told of every model compared, then of every pair whose rank was measured.

    Returns:
      Groups and single models.
    """
    sampler = Sampler(checkpoints)
    relations: list[Relation] = []
    found: list[tuple[_Draft, int, Order]] = []
    done = 0
    for number, models in enumerate(_architectures(checkpoints)):
        order = sample_order([checkpoints[m] for m in models], wanted, seed)
        drafts: list[_Draft] = []
        for model in models:
            _place(sampler, drafts, model, order, count, relations)
            done += 1
            if progress is not None:
                progress("compare", done, len(checkpoints))
        _merge_near(sampler, drafts, order, count, relations)
        found += [(draft, number, order) for draft in drafts]
    groups = []
    for index, (draft, number, _) in enumerate(found):
        group = Group(tuple(sorted(draft.members)), draft.twins, number)
        if len(group.distinct) > 1:
            names = _measured(checkpoints, relations, group)
            found_kin = kinship(sampler, group.distinct, names)
            group = dataclasses.replace(group, kinship=found_kin)
        groups.append(group)
        if progress is not None:
            progress("ranks", index + 1, len(found))
    groups.sort(key=lambda group: group.members[0])
    return Zoo(tuple(checkpoints), tuple(groups), tuple(relations), sampler.bytes_read)


def _architectures(checkpoints: Sequence[Checkpoint]) -> list[list[int]]:
    """Indices of models by their large matrices' names and shapes: vectors are much alike."""
    shown = []
    for checkpoint in checkpoints:
        large = {name: info for name, info in checkpoint.tensors.items() if is_sampled(info)}
        shown.append(dataclasses.replace(checkpoint, tensors=large or checkpoint.tensors))
    return group_by_architecture(shown)


def _place(
    sampler: Sampler,
    drafts: list[_Draft],
    model: int,
    order: Order,
    count: int,
    relations: list[Relation],
) -> None:
    """Puts a model into the first group whose leader it is related to, or into one of its own."""
    for draft in drafts:
        relation = compare_models(sampler, draft.leader, model, order, count)
        relations.append(relation)
        if relation.joined:
            _join(sampler, draft, model, order, count, relations)
            return
    drafts.append(_Draft([model], {}, {}))


def _join(
    sampler: Sampler,
    draft: _Draft,
    model: int,
    order: Order,
    count: int,
    relations: list[Relation],
) -> None:
    """Adds a model whose relation to the leader came last, and looks for one that it equals."""
    relation = relations[-1]
    ranks = [layer.rank for layer in relation.layers if layer.verdict == "low_rank"]
    draft.ranks[model] = max((rank for rank in ranks if rank is not None), default=0)
    if relation.verdict != "related":
        draft.twins[model] = (draft.leader, relation.verdict)
    else:
        for other in draft.members[1:]:
            if other not in draft.twins and _alike(sampler, other, model, order):
                again = compare_models(sampler, other, model, order, count)
                relations.append(again)
                if again.verdict in ("copy", "equal_matrices"):
                    draft.twins[model] = (other, again.verdict)
                    break
    draft.members.append(model)


def _alike(sampler: Sampler, first: int, second: int, order: Order) -> bool:
    """Whether two models are equal in all matrices that both were looked at in."""
    one, two = (sampler.marks(model, order.names) for model in (first, second))
    common = one.keys() & two.keys()
    return bool(common) and all(one[name] == two[name] for name in common)


def _merge_near(
    sampler: Sampler,
    drafts: list[_Draft],
    order: Order,
    count: int,
    relations: list[Relation],
) -> None:
    """Compares groups again that differ by little, by the members with the smallest updates.

    Two updates of large ranks do not fit a matrix together, and then look like two bases.
    """
    tried = {(r.first, r.second) for r in relations}
    near = {(r.first, r.second) for r in relations if not r.joined and r.size < FAR}
    for late in range(len(drafts) - 1, 0, -1):
        for early in range(late):
            one, two = drafts[early], drafts[late]
            if not any((a, b) in near or (b, a) in near for a in one.members for b in two.members):
                continue
            pair = (_smallest(one), _smallest(two))
            if pair in tried or pair[::-1] in tried:
                continue
            relation = compare_models(sampler, *pair, order, count)
            relations.append(relation)
            if relation.joined:
                one.members += two.members
                one.twins |= two.twins
                if relation.verdict != "related":
                    one.twins[pair[1]] = (pair[0], relation.verdict)
                del drafts[late]
                break


def _smallest(draft: _Draft) -> int:
    """The member whose difference from the leader has the lowest rank: its update is small.

    That is the leader itself only where it is alone.
    """
    others = [m for m in draft.members if m not in draft.twins and m != draft.leader]
    return min(others, key=lambda m: (draft.ranks.get(m, 0), m), default=draft.leader)


def _measured(
    checkpoints: Sequence[Checkpoint], relations: Sequence[Relation], group: Group
) -> tuple[str, ...]:
    """Matrices of all members in which two differ by low rank, most often seen first."""
    seen: dict[str, tuple[int, int]] = {}
    for relation in relations:
        if relation.first in group.members and relation.second in group.members:
            for layer in relation.layers:
                if layer.verdict == "low_rank":
                    above, times = seen.get(layer.name, (0, 0))
                    seen[layer.name] = (above + bool(layer.rank), times + 1)
    if any(above for above, _ in seen.values()):  # the others differ by rounding only
        seen = {name: counts for name, counts in seen.items() if counts[0]}
    models = [checkpoints[m] for m in group.distinct]
    everywhere = [name for name in seen if is_common(models, name)]
    return tuple(sorted(everywhere, key=lambda name: seen[name], reverse=True))
