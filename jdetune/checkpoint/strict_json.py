"""JSON of files that nobody vouches for: bounded, without duplicate keys."""

import json
import re
from collections.abc import Sequence
from typing import Any

from jdetune.errors import InputError, printable

#: Bytes that are read at most; as much as safetensors allows a header.
MAX_BYTES = 100_000_000
#: Values and levels at most: they cost memory and stack many times their size in the file.
MAX_VALUES = 4_000_000
MAX_DEPTH = 100
# possessive, and a string need not end: linear on any input
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)


def parse_object(data: bytes, where: object, constants: bool = True) -> dict[str, Any]:
    """The object that a JSON text holds.

    Args:
      data: UTF-8.
      where: file to name in messages.
      constants: whether NaN and Infinity may stand in it, which JSON itself does not have.

    Raises:
      InputError: no JSON object, duplicate keys, too deep or too many values.
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_VALUES:
        raise InputError(
            f"{where}: more than {MAX_VALUES} values in its JSON. No checkpoint has so many; do "
            "not use it if you do not trust it."
        )
    if is_deep(data):
        raise InputError(
            f"{where}: JSON of more than {MAX_DEPTH} levels. No checkpoint has so many; do not use "
            "it if you do not trust it."
        )
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=None if constants else _refuse,
        )
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: not readable as JSON ({printable(error)}). Copy the file again."
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON object was expected. Copy the file again.")
    return value


def is_deep(data: bytes, limit: int = MAX_DEPTH) -> bool:
    """Whether brackets outside of strings are nested in more than ``limit`` levels.

    Example:
      >>> is_deep(b'{"a[[": [[], {}]}', 2), is_deep(b'{"a[[": [[], {}]}', 3)
      (True, False)
    """
    if data.count(b"[") + data.count(b"{") <= limit:
        return False
    level = 0
    for found in _STRING_OR_BRACKET.finditer(data):
        if found.group() in (b"[", b"{"):
            level += 1
            if level > limit:
                return True
        elif found.group() in (b"]", b"}"):
            level -= 1
    return False


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {printable(twice)} twice")
    return found


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")
