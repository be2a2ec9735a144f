"""Why a model stands where it stands, in words."""

from jdetune.zoo.grouping import ENOUGH, Group, Zoo
from jdetune.zoo.pairs import FAR, Relation

_FULL = (
    "a full fine-tune, a quantised copy (QLoRA merged into the dequantised base), a DoRA merge, or "
    "another base of its kind"
)


def alone(zoo: Zoo, group: Group) -> str:
    """Why a model, or several copies of one, are in no group with others."""
    if not any(g.architecture == group.architecture and g is not group for g in zoo.groups):
        return "another architecture: no other model has its tensors, by name and shape"
    nearest = _nearest(zoo, group)
    return "no matrix could be compared" if nearest is None else _apart(zoo, group, nearest)


def apart(zoo: Zoo, group: Group) -> str | None:
    """What tells a group from the nearest other one; None where it lies far from all."""
    nearest = _nearest(zoo, group, several=True)
    return None if nearest is None or nearest.size >= FAR else _apart(zoo, group, nearest)


def too_few(group: Group) -> str | None:
    """Why a group cannot be recovered; None if it can."""
    if group.recoverable:
        return None
    count = len(group.distinct)
    copies = " that differ" if len(group.members) > count else ""
    return f"{count} models{copies}: a base needs {ENOUGH} or more"


def notes(zoo: Zoo, group: Group, model: int) -> list[str]:
    """What is odd about a member."""
    said = []
    for relation in zoo.relations:
        inside = relation.first in group.members and relation.second in group.members
        if not inside or relation.second != model:
            continue
        other = zoo.checkpoints[relation.first].name
        if relation.names("full_rank"):
            said.append(f"{_tested(relation, other)}: fine-tuned in full there, or of a large rank")
        low = [layer.rank for layer in relation.layers if layer.verdict == "low_rank"]
        if low and not any(low):
            said.append(f"differs from {other} by no more than rounding in all matrices tested")
    return [*said, *_damage(zoo, model)]


def _damage(zoo: Zoo, model: int) -> list[str]:
    """Matrices that could not be compared with this model's, unless it is the others that fail."""
    bad = {n for r in zoo.relations if r.second == model for n in r.names("not_finite")}
    return [f"NaN or infinity in {sorted(bad)[0]} of it or of its partner"] if bad else []


def _nearest(zoo: Zoo, group: Group, several: bool = False) -> Relation | None:
    """The comparison with a model outside that shows the smallest difference.

    Args:
      zoo: all groups.
      group: one of them.
      several: look only at other groups of two models or more.
    """
    others = {m for g in zoo.groups if len(g.members) > several for m in g.members}
    outside = others - set(group.members)
    crossing = [
        relation
        for relation in zoo.relations
        if (relation.first in group.members and relation.second in outside)
        or (relation.second in group.members and relation.first in outside)
    ]
    return min(crossing, key=lambda relation: relation.size, default=None)


def _apart(zoo: Zoo, group: Group, relation: Relation) -> str:
    inside = relation.first in group.members
    other = zoo.checkpoints[relation.second if inside else relation.first].name
    equal = relation.names("equal")
    if relation.verdict == "unknown":
        broken = relation.names("not_finite")
        cause = f"NaN or infinity in {broken[0]}" if broken else "no large matrix in common"
        return f"could not be compared with {other}: {cause}"
    said = _tested(relation, other)
    if equal:
        return f"{said}, equal in {len(equal)} others: some of its matrices were fine-tuned in full"
    if relation.size >= FAR:
        return f"another base: {said}; they differ by {relation.size:.0%} of their size"
    near = f"{said}; they differ by {relation.size:.2g} of their size"
    if relation.rounding:
        return f"{near}, as bases do where one was rounded to {relation.rounding} before merging"
    return f"{near}: {_FULL}"


def _tested(relation: Relation, other: str) -> str:
    """How many of the tested matrices differ by no low rank, and an example."""
    full = [layer for layer in relation.layers if layer.verdict == "full_rank"]
    tested = len(full) + len(relation.names("low_rank"))
    example = f"{full[0].name}, rank {full[0].rank} of {full[0].side}"
    return f"no low rank against {other} in {len(full)} of {tested} matrices tested ({example})"
