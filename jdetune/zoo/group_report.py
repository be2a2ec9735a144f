"""The result of grouping as JSON: every model, every group, every comparison."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from jdetune.outfolder import safe_name
from jdetune.report import main_dtype, number, source_entry
from jdetune.zoo import reasons
from jdetune.zoo.grouping import Group, Zoo
from jdetune.zoo.pairs import Relation

SCHEMA = "jdetune.group/1"


def content(zoo: Zoo, lines: Mapping[str, str]) -> dict[str, Any]:
    """The keys that say what was found.

    Args:
      zoo: the groups.
      lines: name of every recoverable group to its command line.

    Returns:
      ``models``, ``groups``, ``alone``, ``comparisons``, ``bytes_read`` and ``summary``.
    """
    several = [group for group in zoo.groups if len(group.members) > 1]
    single = [group for group in zoo.groups if len(group.members) == 1]
    models = [entry for group in zoo.groups for entry in _models(zoo, group)]
    place = {checkpoint.name: i for i, checkpoint in enumerate(zoo.checkpoints)}
    grouped = sum(len(group.members) for group in several if group.recoverable)
    return {
        "models": sorted(models, key=lambda entry: place[entry["name"]]),
        "groups": [_group(zoo, group, lines) for group in several],
        "alone": [zoo.checkpoints[group.members[0]].name for group in single],
        "comparisons": [_comparison(zoo, relation) for relation in zoo.relations],
        "bytes_read": zoo.bytes_read,
        "summary": {
            "models": len(zoo.checkpoints),
            "groups": len(several),
            "recoverable": sum(group.recoverable for group in several),
            "grouped": grouped,
            "alone": len(single),
            "exit_code": 0 if grouped == len(zoo.checkpoints) else 5,
        },
    }


def name_of(zoo: Zoo, group: Group) -> str:
    """A group's name: that of its first member, so that it stays when a zoo grows."""
    return safe_name(f"family-of-{zoo.checkpoints[group.members[0]].name}")


def command_line(models: Sequence[str], out: str, flags: Sequence[str]) -> str:
    """The recover command of one group, quoted for a shell.

    Example:
      >>> command_line(["zoo/a b", "-c"], "out/x", ["--masks"])
      "jdetune recover --out=out/x --masks -- 'zoo/a b' -c"
    """
    dashed = any(model.startswith("-") for model in models)
    if dashed:
        return shlex.join(["jdetune", "recover", f"--out={out}", *flags, "--", *models])
    return shlex.join(["jdetune", "recover", *models, f"--out={out}", *flags])


def _models(zoo: Zoo, group: Group) -> list[dict[str, Any]]:
    entries = []
    for model in group.members:
        checkpoint = zoo.checkpoints[model]
        twin, how = group.twins.get(model, (None, None))
        alone = len(group.members) == 1
        kin = group.kinship
        ranks = {} if kin is None else {n: r[model] for n, r in kin.ranks.items() if model in r}
        entries.append(
            {
                "name": checkpoint.name,
                **source_entry(checkpoint),
                "dtype": main_dtype(checkpoint),
                "parameters": checkpoint.n_parameters,
                "group": None if alone else name_of(zoo, group),
                "equals": None if twin is None else zoo.checkpoints[twin].name,
                "copy": how == "copy",
                "ranks": ranks or None,
                "reason": reasons.alone(zoo, group) if alone else None,
                "notes": reasons.notes(zoo, group, model),
            }
        )
    return entries


def _group(zoo: Zoo, group: Group, lines: Mapping[str, str]) -> dict[str, Any]:
    kin = group.kinship
    names = [checkpoint.name for checkpoint in zoo.checkpoints]
    first = zoo.checkpoints[group.members[0]]
    families = kin.families if kin is not None and len(kin.families) > 1 else ()
    dtypes = {main_dtype(zoo.checkpoints[m]) for m in group.members}
    return {
        "name": name_of(zoo, group),
        "model_type": first.config.get("model_type"),
        "members": [names[m] for m in group.members],
        "distinct": len(group.distinct),
        "dtypes": sorted(filter(None, dtypes)),
        "pair_rank": None if kin is None else kin.pair_rank,
        "families": [[names[m] for m in family] for family in families],
        "families_apart": None if kin is None else kin.apart,
        "recoverable": group.recoverable,
        "reason": reasons.too_few(group),
        "apart": reasons.apart(zoo, group),
        "command": lines.get(name_of(zoo, group)),
    }


def _comparison(zoo: Zoo, relation: Relation) -> dict[str, Any]:
    return {
        "first": zoo.checkpoints[relation.first].name,
        "second": zoo.checkpoints[relation.second].name,
        "verdict": relation.verdict,
        "rounding": relation.rounding,
        "equal": list(relation.names("equal")),
        "tested": [
            {
                "name": layer.name,
                "verdict": layer.verdict,
                "rank": layer.rank,
                "side": layer.side,
                "size": number(layer.size),
            }
            for layer in relation.layers
            if layer.verdict != "equal"
        ],
    }
