"""results.json and tables.md of one subset."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jdetune
from jdetune.bench import summary
from jdetune.bench.layers import Source
from jdetune.bench.protocol import Settings
from jdetune.bench.subsets import CONTRADICTIONS, MODELS, SUBSETS
from jdetune.bench.summary import Cell
from jdetune.checkpoint.writer import save_json, save_text


def content(source: Source, settings: Settings, cells: Sequence[Cell]) -> dict[str, Any]:
    """What results.json holds, but for times and the command.

    Args:
      source: the layers.
      settings: what was run.
      cells: all results.
    """
    ours = [cell for cell in cells if cell["method"] == "jdetune"]
    return {
        "jdetune_version": jdetune.__version__,
        "subset": settings.subset,
        "origin": dict(source.origin),
        "settings": dataclasses.asdict(settings),
        "sampling": {
            "layers": len(settings.layers),
            "layers_in_all": len(source.names),
            "n": list(settings.counts),
            "repeats": settings.repeats,
            "models_in_all": len(source.models),
            "seed": settings.seed,
            "all_layers": len(settings.layers) == len(source.names),
        },
        "notes": _notes(source, settings),
        "rows": summary.summarize(cells),
        "by_kind": summary.by(cells, "kind"),
        "by_depth": summary.by(cells, "depth"),
        "failures": summary.failures(cells),
        "exit_code": 5 if any(cell["w_error"] is None for cell in ours) else 0,
    }


def _notes(source: Source, settings: Settings) -> list[str]:
    """What a reader has to know: how the data differ from the published, and what was chosen."""
    notes = []
    subset = SUBSETS.get(settings.subset)
    if subset is not None:
        if (len(source.names), len(source.models)) != (subset.layers, MODELS):
            notes.append(
                f"{len(source.names)} layers of {len(source.models)} LoRAs; the published subset "
                f"has {subset.layers} layers of {MODELS}."
            )
        notes += CONTRADICTIONS
    if len(settings.layers) < len(source.names):
        notes.append(f"{len(settings.layers)} of {len(source.names)} layers.")
    return notes


def tables(value: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    """tables.md."""
    sampling = value["sampling"]
    lines = [
        f"# LoWRA Bench, {value['subset']}",
        "",
        f"{sampling['layers']} of {sampling['layers_in_all']} layers, at most "
        f"{sampling['repeats']} random subsets for each n of {sampling['models_in_all']} models, "
        f"seed {sampling['seed']}, merged in {value['settings']['merge_dtype']}, "
        f"{value['settings']['steps']} steps of the paper's solver. W-error is the mean over "
        "layers of log10 MSE (Eq. 8) of the base as it is stored, ± the standard deviation over "
        "random subsets; lower is better. Times are medians of calls that did not compile.",
        "",
        summary.main_table(value["rows"]),
        "",
        "## By type of layer",
        "",
        summary.breakdown_table(cells, "kind", "type"),
        "",
        "## By depth",
        "",
        summary.breakdown_table(cells, "depth", "depth"),
        "",
    ]
    if value["failures"]:
        rows = [
            [f["method"], str(f["n"]), f["status"], str(f["cells"]), f["reason"] or ""]
            for f in value["failures"]
        ]
        header = ["method", "n", "status", "cells", "reason"]
        lines += ["## Not solved, or not to the end", "", summary.markdown(header, rows), ""]
    lines += ["## Notes", "", *(f"- {note}" for note in value["notes"]), ""]
    lines += [f"![{name}]({name})" for name in value["figures"]]
    return "\n".join(lines) + "\n"


def write(out: Path, value: Mapping[str, Any], cells: Sequence[Cell]) -> None:
    """Writes both files.

    Args:
      out: folder.
      value: of ``content``, with times, command and figures.
      cells: all results; they go into results.json too.
    """
    save_json(out / "results.json", {**value, "cells": [dict(cell) for cell in cells]})
    save_text(out / "tables.md", tables(value, cells))
