"""Refusals and repairs in words: cause and remedy, with the tensors and models named."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jdetune.damage import Damage, find_damage, finite_models
from jdetune.repair import NO_UPDATE
from jdetune.status import Status
from jdetune.types import Array

_STRANGER = (
    "differs from the other models by more than a low-rank update and rounding: it has another "
    "base, or is fully fine-tuned, quantised or merged with DoRA. Recover it with models of its "
    "own base"
)


class RepairWarning(UserWarning):
    """A model was left out of a layer, or is damaged there; the others gave the base."""


class Note(NamedTuple):
    """One model that one tensor was solved without.

    Attributes:
      tensor: its name.
      model: the model's name.
      stranger: whether it has another base there; else it holds NaN or infinity.
      text: what is the matter and what was done, to follow the model's name.
    """

    tensor: str
    model: str
    stranger: bool
    text: str


def notes_of(
    tensor: str,
    groups: Int[np.ndarray, " model"],
    stack: Float[Array, "model row col"],
    names: Sequence[str],
) -> list[Note]:
    """What was repaired in a tensor that has a base.

    Args:
      tensor: its name.
      groups: ``base_group`` of every model.
      stack: merged weights as stored.
      names: name of every model.

    Returns:
      A note for every model that the base was not solved from.
    """
    strangers = [
        Note(tensor, names[model], True, f"was left out of {tensor}: it {_STRANGER}.")
        for model in np.flatnonzero(groups > 0).tolist()
    ]
    damaged = []
    for model in np.flatnonzero(groups < 0).tolist():
        found = find_damage(stack[model])
        text = _DAMAGED.format(where=found, tensor=tensor)
        lost = groups[model] == NO_UPDATE
        text += _NOTHING_LEFT if lost else _PARTLY if _has_lost(found) else _FILLED_IN
        damaged.append(Note(tensor, names[model], False, text + _MEND))
    return strangers + damaged


def repairs(notes: Sequence[Note], n_tensors: int) -> list[str]:
    """Notes of all tensors in a few sentences, one for each model and kind.

    Args:
      notes: of all tensors.
      n_tensors: number of tensors that were solved.

    Example:
      >>> repairs([Note(tensor, "tune-3", True, "") for tensor in ("a", "b")], 2)[0][:47]
      'tune-3 was left out of every tensor solved (2):'
    """
    by_model: dict[tuple[str, bool], list[Note]] = {}
    for note in notes:
        by_model.setdefault((note.model, note.stranger), []).append(note)
    lines = []
    for (model, stranger), found in by_model.items():
        if stranger:
            count, which = len(found), _some([note.tensor for note in found])
            part = f"{count} of {n_tensors} tensors solved ({which})"
            where = f"every tensor solved ({count})" if count == n_tensors else part
            lines.append(f"{model} was left out of {where}: it {_STRANGER}.")
        else:
            more = f" So in {len(found) - 1} more tensor(s)." if len(found) > 1 else ""
            lines.append(f"{model} {found[0].text}{more}")
    return lines


def failure(
    status: Status,
    groups: Int[np.ndarray, " model"],
    stack: Float[Array, "model row col"],
    names: Sequence[str],
) -> str:
    """Cause and remedy of a layer's status, with the models named where they can be told."""
    if status is Status.NON_FINITE:
        bad = np.flatnonzero(~finite_models(stack)).tolist()
        where = "; ".join(f"{names[model]} in {find_damage(stack[model])}" for model in bad)
        return f"{status.message} Found: {where}." if where else status.message
    sizes = np.bincount(groups[groups >= 0]) if len(groups) else np.zeros(0, int)
    if len(sizes) < 2 or sizes.max() < 2:
        return status.message
    said = base_groups(groups, names)
    if np.sum(sizes > 1) == 1 and sizes.max() >= 3:  # strangers were left out; the rest failed
        return f"{status.message} ({said})"
    return f"{said}. {_remedy(sizes, groups, names)}"


def base_groups(groups: Int[np.ndarray, " model"], names: Sequence[str]) -> str:
    """Groups of models in words.

    Example:
      >>> base_groups(np.array([0, 0, 1, 1, 2]), list("abcde"))
      'a, b share one base; c, d another; e shares none of these'
    """
    members = [
        [names[i] for i in np.flatnonzero(groups == g).tolist()] for g in range(groups.max() + 1)
    ]
    shared = [", ".join(group) for group in members if len(group) > 1]
    alone = [group[0] for group in members if len(group) == 1]
    parts = [f"{who} {'share one base' if i == 0 else 'another'}" for i, who in enumerate(shared)]
    if alone:
        parts.append(f"{', '.join(alone)} share{'s' if len(alone) == 1 else ''} none of these")
    return "; ".join(parts)


def _remedy(sizes: np.ndarray, groups: np.ndarray, names: Sequence[str]) -> str:
    if sizes.max() >= 3:
        return "Recover each group of three or more alone."
    first = ", ".join(names[i] for i in np.flatnonzero(groups == 0).tolist())
    return f"Three models of one base are needed: add models of the base of {first}."


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _has_lost(found: Damage) -> bool:
    return bool(found.rows.any() or found.cols.any())


_DAMAGED = "holds NaN or infinity in {where} of {tensor}: the base is that of the other models, "
_PARTLY = "and its own update is left at zero in what is lost."
_FILLED_IN = "and its own update is filled in from the elements around."
_NOTHING_LEFT = "and it gets no update there, since what is left of it is not low rank."
_MEND = " Download or save that model again."
