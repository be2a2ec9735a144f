"""Results of single cells on disk: one JSON line each, appended as soon as it is known.

A run that was cut off goes on where it stopped. A line that was cut off is not whole JSON and is
worked out again.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jdetune.errors import OutputError, WriteError

NAME = "cells.jsonl"
_SCHEMA = "jdetune.bench.cells/1"


class Key(NamedTuple):
    """What tells cells apart."""

    layer: str
    n: int
    repeat: int
    method: str


class Ledger:
    """The cells of one run, in memory and on disk.

    Attributes:
      path: the file.
      cells: what is known, by key.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        """Opens or begins a ledger.

        Args:
          path: the file.
          settings: what must be the same for cells to belong together.
          overwrite: begin anew where the settings differ.

        Raises:
          OutputError: the file holds cells of other settings, or is none of ours.
        """
        self.path, self.cells = path, {}
        head = {"schema": _SCHEMA, "settings": dict(settings)}
        lines = _lines(path) if path.exists() else iter(())
        first = next(lines, None)
        if first is not None and first != head and not overwrite:
            raise OutputError(f"{path}: {_difference(first, head)} Choose another --out, or give "
                              "--overwrite to begin anew.")  # fmt: skip
        if first == head:
            for line in lines:
                key = _key(line)
                if key is not None:
                    self.cells[key] = line
            self._append("")  # ends a line that was cut off
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self._append(json.dumps(head, allow_nan=False))

    def add(self, cell: Mapping[str, Any]) -> None:
        """Adds a cell, on disk before it returns."""
        key = _key(cell)
        assert key is not None
        self.cells[key] = dict(cell)
        self._append(json.dumps(cell, allow_nan=False))

    def _append(self, text: str) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise WriteError(
                f"{self.path}: cannot be written ({error}). Check space and rights, then run the "
                "same command again; it goes on from here."
            ) from error


def count_cells(path: Path) -> int:
    """Cells of a ledger, whatever its settings are."""
    return sum(_key(line) is not None for line in _lines(path))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines that are whole."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(value, dict):
                    yield value
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error}). Choose another --out.") from error


def _key(cell: Mapping[str, Any]) -> Key | None:
    try:
        key = Key(*(cell[field] for field in Key._fields))
        return key if isinstance(cell["status"], str) else None
    except KeyError:
        return None


def _difference(first: Mapping[str, Any], head: Mapping[str, Any]) -> str:
    if first.get("schema") != _SCHEMA or not isinstance(first.get("settings"), dict):
        return "holds something else than cells of this benchmark."
    old, new = first["settings"], head["settings"]
    names = [name for name in new if old.get(name) != new[name]]
    return f"holds cells of another run ({', '.join(names)} differ)."
