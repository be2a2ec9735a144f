"""Brings the models' tensor names together: prefixes of wrappers, and weights that are tied.

Nothing is guessed: where two ways to match names are as good as each other, names stay as they are
and the reason is said.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from jdetune.checkpoint.index import Checkpoint, TensorInfo

#: What PEFT puts into the names of modules that it wraps.
_WRAPPERS = ((".base_layer.", "."), (".modules_to_save.default.", "."))
#: A change of prefixes, both not empty, must hold for as many names at least.
_MIN_CHANGED = 4
_MAX_WORDS = 32
#: Prefix that is taken away, prefix that is put in its place.
Rule = tuple[str, str]


def align_names(
    checkpoints: Sequence[Checkpoint],
) -> tuple[list[Checkpoint], list[str]]:
    """Models with their tensors under the first model's names.

    Args:
      checkpoints: opened models.

    Returns:
      The models, those with other prefixes renamed (they read the same tensors), and what was done
      or could not be done, in words.
    """
    template = checkpoints[0]
    found, notes = [template], []
    for model in checkpoints[1:]:
        names, rules, unclear = match_names(model.tensors, template.tensors)
        found.append(rename(model, names))
        changed = sum(old != new for old, new in names.items())
        if changed:
            said = ", ".join(_in_words(rule) for rule in rules) or "without PEFT's wrappers"
            notes.append(
                f"{changed} tensors of {model.name} are compared under {template.name}'s names: "
                f"{said}. To write other names, give a model that has them first"
            )
        if unclear:
            notes.append(
                f"{model.name} has other names than {template.name}, which can be matched in more "
                f"than one way ({unclear}), so they are not. Save it with the same class again."
            )
    notes += [
        f"{model.name} still holds LoRA factors beside its weights: they are compared as they are. "
        "If they are not merged, merge them first (PEFT: merge_and_unload)."
        for model in checkpoints
        if any(".lora_A." in name for name in model.tensors)
    ]
    return found, notes


def rename(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """A checkpoint whose tensors go by other names.

    Args:
      checkpoint: the model.
      names: its names to the new ones; those that are not in it stay.
    """
    if all(names.get(name, name) == name for name in checkpoint.tensors):
        return checkpoint
    tensors: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        new = names.get(name, name)
        tensors[new] = dataclasses.replace(info, name=new, key=info.stored_name)
    return dataclasses.replace(checkpoint, tensors=tensors)


def match_names(
    own: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo]
) -> tuple[dict[str, str], list[Rule], str | None]:
    """Matches names that differ by prefixes, one to one.

    Names that both have stay. For the rest, every pair with the longest common ending speaks for
    one change of prefix; the change that most pairs speak for is made, and so on with what is left.
    A change is not made if a rival for the same names has as many votes, or if shapes contradict.

    Args:
      own: names of a model, with their headers.
      wanted: names of the model to be like.

    Returns:
      Own names to wanted ones, the changes made, and the rivals if it is unclear.

    Example:
      >>> info = TensorInfo("", "", "float32", (2, 2))
      >>> match_names({"h.0.q.weight": info}, {"transformer.h.0.q.weight": info})[1]
      [('', 'transformer.')]
    """
    plain = {name: _unwrapped(name) for name in own}
    counts = Counter(plain.values())
    names = {
        n: (p if counts[p] == 1 and p in wanted and p not in own else n) for n, p in plain.items()
    }
    rest = {name: own[name] for name, new in names.items() if new not in wanted}
    free = {name: info for name, info in wanted.items() if name not in set(names.values())}
    rules: list[Rule] = []
    n_start = len(rest)
    while rest and free:
        votes = _votes({n: plain[n] for n in rest}, free)
        ranked = sorted(votes.items(), key=lambda item: (-len(item[1]), item[0]))
        ranked = [(rule, pairs) for rule, pairs in ranked if _is_sound(rule, pairs, n_start)]
        if not ranked:
            break
        rule, pairs = ranked[0]
        for other, theirs in ranked[1:]:
            if len(theirs) == len(pairs) and _overlap(pairs, theirs):
                said = f"{_in_words(rule)}, or {_in_words(other)}"
                return {name: name for name in own}, [], said
        if all(_same_kind(own[old], wanted[new]) for old, new in pairs.items()):
            names |= pairs
            rules.append(rule)
        else:
            break
        rest = {name: info for name, info in rest.items() if name not in pairs}
        free = {name: info for name, info in free.items() if name not in set(pairs.values())}
    return names, rules, None


def _unwrapped(name: str) -> str:
    for part, instead in _WRAPPERS:
        name = name.replace(part, instead)
    return name


def _votes(own: Mapping[str, str], free: Iterable[str]) -> dict[Rule, dict[str, str]]:
    """Changes of prefix, each with the names that it matches: those of longest common ending."""
    endings: dict[str, list[str]] = {}
    for name in free:
        for ending in _endings(name):
            endings.setdefault(ending, []).append(name)
    votes: dict[Rule, dict[str, str]] = {}
    for name, plain in own.items():
        ending = next((e for e in _endings(plain) if e in endings), None)
        for other in endings.get(ending or "", ()):
            assert ending is not None
            rule = (plain.removesuffix(ending), other.removesuffix(ending))
            votes.setdefault(rule, {})[name] = other
    return votes


def _endings(name: str) -> list[str]:
    """Endings of two words or more, the longest first; a name of one word is its own."""
    parts = name.rsplit(".", _MAX_WORDS)
    return [".".join(parts[i:]) for i in range(max(1, len(parts) - 1))]


def _is_sound(rule: Rule, pairs: Mapping[str, str], n_start: int) -> bool:
    """Whether a change may be made: it takes away or adds, or holds for most names."""
    one_to_one = len(set(pairs.values())) == len(pairs)
    many = len(pairs) >= max(_MIN_CHANGED, n_start / 2)
    return one_to_one and (not all(rule) or many)


def _overlap(first: Mapping[str, str], second: Mapping[str, str]) -> bool:
    targets = set(first.values()) & set(second.values())
    return bool(first.keys() & second.keys() or targets)


def _same_kind(own: TensorInfo, wanted: TensorInfo) -> bool:
    """Whether shapes agree, but for the rows of a vocabulary."""
    return len(own.shape) == len(wanted.shape) and own.shape[1:] == wanted.shape[1:]


def _in_words(rule: Rule) -> str:
    gone, new = rule
    if gone and new:
        return f"{gone}* as {new}*"
    return f"without {gone}" if gone else f"with {new} before them"
