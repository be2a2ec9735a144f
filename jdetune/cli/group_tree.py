"""The tree of groups that ``jdetune group`` prints."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from jdetune.cli import common

#: Branch, last branch, trunk and gap.
UNICODE = ("├── ", "└── ", "│   ", "    ")
ASCII = ("|-- ", "`-- ", "|   ", "    ")


class Node(NamedTuple):
    """A line and what hangs below it."""

    text: str
    children: Sequence["Node"] = ()


def draw(nodes: Sequence[Node], marks: Sequence[str] = UNICODE) -> list[str]:
    """Lines of a tree.

    Example:
      >>> draw([Node("a", [Node("b", [Node("c")]), Node("d")])], ASCII)
      ['a', '|-- b', '|   `-- c', '`-- d']
    """
    lines = []
    for node in nodes:
        lines.append(node.text)
        for place, child in enumerate(node.children):
            last = place == len(node.children) - 1
            first, *rest = draw([child], marks)
            lines.append(marks[1 if last else 0] + first)
            lines += [marks[3 if last else 2] + line for line in rest]
    return lines


def tree(value: Mapping[str, Any], marks: Sequence[str] = UNICODE) -> str:
    """Groups with their members, then the models alone, each with its reason."""
    models = {entry["name"]: entry for entry in value["models"]}
    nodes = [_group(group, models) for group in value["groups"]]
    if value["alone"]:
        alone = [
            Node(_label(models[name]), [Node(models[name]["reason"])]) for name in value["alone"]
        ]
        nodes.append(Node("alone", alone))
    return "\n\n".join("\n".join(draw([node], marks)) for node in nodes)


def _group(group: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> Node:
    kind = f"{group['model_type']}, " if group["model_type"] else ""
    copies = len(group["members"]) - group["distinct"]
    count = f"{group['distinct']} models" + (
        f" and {copies} equal to one of them" if copies else ""
    )
    text = f"{group['name']}: {kind}{count}, {' and '.join(group['dtypes'])}"
    notes = [Node(f"({text})") for text in (group["reason"], group["apart"]) if text]
    if not group["families"]:
        return Node(text, [*_members(group["members"], models), *notes])
    text += (
        f"; {len(group['families'])} sub-families, whose bases differ by rank "
        f"{group['families_apart']}"
    )
    families = []
    for family in group["families"]:
        twins = [name for name in group["members"] if _root(models, name) in family]
        families.append(Node(f"{len(family)} models", _members(twins, models)))
    return Node(text, [*families, *notes])


def _members(names: Sequence[str], models: Mapping[str, Mapping[str, Any]]) -> list[Node]:
    return [_member(name, names, models) for name in names if models[name]["equals"] is None]


def _member(name: str, names: Sequence[str], models: Mapping[str, Mapping[str, Any]]) -> Node:
    entry = models[name]
    ranks = list((entry["ranks"] or {}).values())
    text = _label(entry) + (f"  rank {common.span(ranks)}" if ranks else "")
    twins = [
        Node(
            f"{other}  " + ("identical copy" if models[other]["copy"] else "equal in all matrices")
        )
        for other in names
        if models[other]["equals"] is not None and _root(models, other) == name
    ]
    return Node(text, [*twins, *(Node(f"({note})") for note in entry["notes"])])


def _label(entry: Mapping[str, Any]) -> str:
    """Name and dtype, and the path of a model whose name is not its folder's."""
    path = PurePath(entry["path"])
    renamed = entry["revision"] is None and entry["name"] not in (path.name, path.stem)
    return f"{entry['name']}  {entry['dtype']}" + (f"  {entry['path']}" if renamed else "")


def _root(models: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """The model that a model, and what it equals, equals in the end."""
    while models[name]["equals"] is not None:
        name = models[name]["equals"]
    return name
