"""Writes the pages: ``report.html`` and the model cards, beside what they are about."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jdetune.checkpoint.adapters import CONFIG_NAME, NOTES_HEAD
from jdetune.checkpoint.index import read_json
from jdetune.checkpoint.writer import save_text
from jdetune.errors import OutputError
from jdetune.pages.cards import AdapterFacts, adapter_card, base_card
from jdetune.pages.extraction_page import match_of, render_extraction
from jdetune.pages.numbers import largest
from jdetune.pages.page import GENERATOR, render
from jdetune.pages.view import View, read_view

PAGE_NAME = "report.html"
_CARD = "README.md"


def write_pages(stage: Path, report: Mapping[str, Any]) -> None:
    """Writes all pages of a recovery.

    Args:
      stage: folder that holds ``base`` and ``adapters``, where they were written.
      report: what report.json holds.
    """
    view = read_view(report)
    save_text(stage / PAGE_NAME, render(report))
    config = _config(stage / "base" / "config.json")
    if (stage / "base").is_dir():
        save_text(stage / "base" / _CARD, base_card(view, config))
    names = [model.name for model in view.solved_models]
    for name in names:
        facts = _facts_of_recovery(view, name)
        _write_adapter_card(stage / "adapters" / name, facts, config, report, names)


def write_extraction_pages(stage: Path, report: Mapping[str, Any]) -> None:
    """Writes the page and the adapters' cards of an extraction.

    Args:
      stage: folder that holds ``adapters``.
      report: what report.json holds.
    """
    save_text(stage / PAGE_NAME, render_extraction(report))
    config = _config(Path(report["base_path"]) / "config.json")
    for entry in report["inputs"]:
        own = [t for t in report["tensors"] if t["model"] == entry["name"]]
        good = [t for t in own if t["status"] == "extracted"]
        facts = AdapterFacts(
            name=entry["name"],
            ranks=[t["rank"] for t in good],
            match=match_of(good),
            ratio=largest([t["residual_ratio"] for t in good]),
            missing=[t["name"] for t in own if t["status"] in ("failed", "skipped")],
        )
        folder = stage / "adapters" / entry["name"]
        _write_adapter_card(folder, facts, config, report, [entry["name"]])


def write_page(report: Mapping[str, Any], path: Path) -> int:
    """Writes ``report.html`` of a report; a file that is no such page is left alone.

    Args:
      report: of ``jdetune recover`` or ``jdetune extract``.
      path: the page.

    Returns:
      Its size in bytes.

    Raises:
      InputError: it is another report.
      OutputError: the path holds something else, or cannot be written.
    """
    text = render_extraction(report) if report.get("kind") == "extract" else render(report)
    if path.is_dir() or (path.exists() and not _is_page(path)):
        raise OutputError(f"{path}: is no page that jdetune wrote. Choose another --out.")
    try:
        save_text(path, text)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error}). Check space and rights."
        ) from error
    return len(text.encode())


def _write_adapter_card(
    folder: Path,
    facts: AdapterFacts,
    base_config: Mapping[str, Any] | None,
    report: Mapping[str, Any],
    names: list[str],
) -> None:
    """Writes the card of an adapter in PEFT's format; others have none of ours."""
    config = _config(folder / CONFIG_NAME)
    if config is not None:
        base = str(config.get("base_model_name_or_path") or "")
        card = folder / _CARD
        written = card.read_text(encoding="utf-8") if card.is_file() else ""
        _, _, notes = written.partition(NOTES_HEAD)
        facts = dataclasses.replace(facts, notes=notes.strip())
        save_text(folder / _CARD, adapter_card(facts, config, base, base_config, report, names))


def _facts_of_recovery(view: View, name: str) -> AdapterFacts:
    place = next(model.index or 0 for model in view.solved_models if model.name == name)
    entries = [e for e in view.raw["tensors"] if e["status"] == "recovered"]
    inside = [
        (t, e) for t, e in zip(view.solved, entries, strict=True) if name not in e["left_out"]
    ]
    known = [(t, e["remerge_match"][place]) for t, e in inside if e["remerge_match"]]
    total = sum(t.size for t, _ in known)
    gaps = [
        t.values[place][-1] / t.edges[place]
        for t, _ in inside
        if place < min(len(t.values), len(t.edges)) and t.values[place]
    ]
    return AdapterFacts(
        name=name,
        ranks=[t.ranks[place] for t, _ in inside if place < len(t.ranks)],
        match=sum(match * t.size for t, match in known) / total if total else None,
        ratio=largest([t.ratio for t, _ in inside]),
        clearance=min(gaps, default=None),
        missing=[e["name"] for e in view.raw["tensors"] if e["status"] in ("failed", "skipped")],
    )


def _config(path: Path) -> Mapping[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return f'content="{GENERATOR}"'.encode() in file.read(2000)
