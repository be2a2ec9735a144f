"""Whether a report.json that is read has what is read from it: it may be anybody's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MAX_PATH = 4000


def is_whole(report: Mapping[str, Any]) -> bool:
    """Whether it has what is read from a report, in the right types."""
    summary, text = report.get("summary"), (str, type(None))
    known = isinstance(summary, dict) and isinstance(summary.get("base_written"), bool)
    return (
        known
        and _have(report.get("inputs"), name=str, path=str, duplicate_of=text, left_out=text)
        and _have(report.get("tensors"), name=str, status=str)
        and all(_is_folder_name(entry["name"]) for entry in report["inputs"])
    )


def _is_folder_name(name: str) -> bool:
    return name == Path(name).name != ".." and name.isprintable() and len(name) < 256


def _have(entries: Any, **kinds: Any) -> bool:
    """Whether it is a list of mappings whose values have these types; text is a path's length."""
    return isinstance(entries, list) and all(
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
        and len(entry.get("path") or "") < _MAX_PATH
        for entry in entries
    )
