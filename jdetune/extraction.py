"""Adapters of merged models whose base is known: compare, extract, write, account for it all."""

import dataclasses
import datetime
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jdetune import outfolder, report
from jdetune.checkpoint.adapter_formats import choose_format, write_as
from jdetune.checkpoint.adapter_reader import merge_peft
from jdetune.checkpoint.adapters import AdapterFiles
from jdetune.checkpoint.aliases import align_names
from jdetune.checkpoint.compare import is_common
from jdetune.checkpoint.index import FLOATS, Checkpoint, open_checkpoint
from jdetune.checkpoint.placement import BARE
from jdetune.checkpoint.reader import raw_bytes, read_tensor
from jdetune.checkpoint.shapes import matrices, unit_name, view_of
from jdetune.checkpoint.ties import is_tied, tie_pairs
from jdetune.checkpoint.vocabulary import cut_rows
from jdetune.checkpoint.writer import save_json
from jdetune.damage import find_damage
from jdetune.errors import InputError, NotOneBaseError
from jdetune.outcomes import (
    Outcome,
    exit_code,
    input_entry,
    join_slices,
    judge_heads,
    summary,
    tensor_entry,
)
from jdetune.pages.files import write_extraction_pages
from jdetune.pipeline import device_name, version
from jdetune.remerge import raw_bits
from jdetune.solvers.known_base import extract_update
from jdetune.solving import Progress
from jdetune.status import Status

_FULL = (
    "differs from the base by more than a low-rank update and rounding: another base, full "
    "fine-tuning, quantised or DoRA merges"
)


_RESIZED = (
    "the base has another number of rows: it is kept whole. Call "
    "base.resize_token_embeddings({rows}) before the adapter is loaded"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
      rank: None to find the ranks; an integer to keep as many; a share below 1 of the energy.
      overwrite: replace a former output.
      command: what to name in the report as the command.
      adapter_format: one of ``jdetune.checkpoint.adapter_formats.FORMATS``.
    """

    rank: int | float | None = None
    overwrite: bool = False
    command: str = "jdetune.extraction.run"
    adapter_format: str = "auto"


def run(
    base: str | Path,
    models: Sequence[str | Path],
    out: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Extracts the adapters of merged models, a tensor at a time.

    Args:
      base: folder or ``.safetensors`` file of the base.
      models: folders or files of models merged from it.
      out: folder for ``adapters/<model>`` and ``report.json``.
      options: how to run.
      progress: told of every tensor.

    Returns:
      The report, as written; its ``summary.exit_code`` says how it went.

    Raises:
      InputError: a model cannot be read, or none is given.
      NotOneBaseError: a model has no tensor in common with the base.
      OutputError: OUT cannot be used; nothing is put in place.
    """
    options, out = options or Options(), Path(out)
    started, begin = datetime.datetime.now(datetime.UTC), time.monotonic()
    if not models:
        raise InputError("no model is given. Give the paths of merged models of this base.")
    known = open_checkpoint(base)
    opened = [open_checkpoint(path) for path in models]
    names = outfolder.model_names(opened)
    checkpoints = [dataclasses.replace(c, name=n) for c, n in zip(opened, names, strict=True)]
    (known, *checkpoints), notes = align_names([known, *checkpoints])
    outfolder.check_out(out, [c.path for c in (known, *checkpoints)], options.overwrite)
    for model in checkpoints:
        if not any(is_common([known, model], name) for name in known.tensors):
            raise NotOneBaseError(
                f"{model.path}: no tensor in common with {known.path} by name and shape, so it is "
                "no fine-tune of this base. Give the base that it was merged from."
            )
    form = choose_format(options.adapter_format, known)
    stage = outfolder.start_stage(out, overwrite=options.overwrite)
    total = sum(len(_names(known, model)) for model in checkpoints)
    found, written, done = [], [], 0
    for model in checkpoints:
        outcomes, both = [], _Pair.of(known, model)
        for name in _names(known, model):
            outcomes.append(_extract(both, name, options.rank))
            done += 1
            if progress is not None:
                progress("extract", done, total)
        outcomes = judge_heads(outcomes, known)
        code = exit_code(outcomes)
        if code in (0, 5):
            outcomes = _write(form, stage / "adapters" / model.name, known, model, outcomes)
            written += [model.name] if form != "none" else []
            code = exit_code(outcomes)
        found.append((model, outcomes, code))
    solved = any(o.code is not None for _, outcomes, _ in found for o in outcomes)
    content = {
        **report.top_level(
            command=options.command,
            started_at=started.isoformat(timespec="seconds"),
            seconds=time.monotonic() - begin,
            device=device_name() if solved else "none",
            version=version(),
        ),
        "kind": "extract",
        "notes": notes,
        "base_path": report.source_text(report.source_entry(known)),
        "adapter_format": form,
        "inputs": [input_entry(m, o, c, m.name in written) for m, o, c in found],
        "summary": summary([o for _, o, _ in found], [c for *_, c in found]),
        "tensors": [
            tensor_entry(known, model, outcome)
            for model, outcomes, _ in found
            for outcome in outcomes
        ],
    }
    write_extraction_pages(stage, content)
    save_json(stage / "report.json", content)
    outfolder.place(out, stage)
    return content


def _names(base: Checkpoint, model: Checkpoint) -> list[str]:
    return list(dict.fromkeys([*base.tensors, *model.tensors]))


class _Pair(NamedTuple):
    """A base and a model, the heads that may be tied and what has another number of rows."""

    base: Checkpoint
    model: Checkpoint
    ties: Mapping[str, str]
    resized: Collection[str]

    @classmethod
    def of(cls, base: Checkpoint, model: Checkpoint) -> "_Pair":
        return cls(base, model, tie_pairs([base, model]), cut_rows([base, model])[1])


def _extract(both: _Pair, name: str, rank: int | float | None) -> Outcome:
    """Compares one tensor with the base's."""
    base, model = both.base, both.model
    tied = _tied(both, name)
    if tied is not None:
        return Outcome(name, "identical", f"tied to {tied}, in the model and in the base")
    if name in both.resized and name in model.tensors and name in base.tensors:
        rows = model.tensors[name].shape[0]
        return Outcome(name, "kept_whole", _RESIZED.format(rows=rows))
    if name not in model.tensors:
        return Outcome(name, "skipped", "missing in the model. Save it again with all its tensors.")
    if name not in base.tensors:
        return Outcome(name, "kept_whole", "the base has no such tensor")
    if not is_common([base, model], name):
        kinds = [f"{c.tensors[name].dtype} {list(c.tensors[name].shape)}" for c in (base, model)]
        reason = f"not the same kind: {kinds[0]} in the base, {kinds[1]} in the model"
        return Outcome(name, "skipped", f"{reason}. Give the base that it was merged from.")
    before, after = read_tensor(base, name), read_tensor(model, name)
    both_floats = {str(before.dtype), str(after.dtype)} <= set(FLOATS)
    same = before.astype(after.dtype) if both_floats else before
    if np.array_equal(raw_bytes(same), raw_bytes(after)):
        return Outcome(name, "identical")
    view = view_of(model.tensors[name])
    if view is None:
        return Outcome(name, "kept_whole", "differs and is not a float matrix")
    pairs = zip(matrices(before, view), matrices(after, view), strict=True)
    if view.slices is None:
        return _solve(name, *next(pairs), rank)
    parts = {
        unit_name(name, index): _solve(unit_name(name, index), first, second, rank)
        for index, (first, second) in enumerate(pairs)
        if not np.array_equal(first.astype(second.dtype), second)
    }
    return join_slices(name, parts, view.reason) if parts else Outcome(name, "identical")


def _tied(both: _Pair, name: str) -> str | None:
    """The embedding that a head is one with, in a base that ties both and in the model."""
    base, model, embedding = both.base, both.model, both.ties.get(name)
    if embedding is None or not is_tied(base.config):
        return None
    if name not in model.tensors:
        return embedding if is_tied(model.config) else None
    head, other = read_tensor(model, name), read_tensor(model, embedding)
    return embedding if np.array_equal(raw_bytes(head), raw_bytes(other)) else None


def _solve(name: str, before: np.ndarray, after: np.ndarray, rank: int | float | None) -> Outcome:
    for who, matrix in (("base", before), ("model", after)):
        if not np.isfinite(matrix.astype(np.float32)).all():
            where = find_damage(matrix)
            reason = f"NaN or infinity in {where} of the {who}. Download or save it again."
            return Outcome(name, "failed", reason, Status.NON_FINITE)
    clock = time.monotonic()
    update = extract_update(before, after, rank)
    figures: dict[str, Any] = {
        "residual_rms": report.number(update.residual_rms),
        "noise_rms_expected": report.number(update.noise_rms),
        "residual_ratio": report.number(update.residual_ratio),
        "detection_floor": report.number(update.detection_floor),
    }
    if not update.low_rank:
        return Outcome(name, "not_low_rank", _FULL, Status.NOT_LOW_RANK, None, figures)
    again = merge_peft(before, update.left, update.right, dtype=after.dtype)
    figures |= {
        "rank": update.rank,
        "rank_gap": report.number(update.rank_gap),
        "remerge_match": float(np.mean(raw_bits(again) == raw_bits(after))),
        "seconds": time.monotonic() - clock,
    }
    reason = None if update.rank else "differs by rounding: no direction stands above it"
    return Outcome(name, "extracted", reason, Status.OK, (update.left, update.right), figures)


def _write(
    form: str, folder: Path, base: Checkpoint, model: Checkpoint, outcomes: Sequence[Outcome]
) -> list[Outcome]:
    """Writes one model's adapter; outcomes then say where every tensor went."""
    factors = {o.name: o.factors for o in outcomes if o.factors is not None}
    factors |= {unit: pair for o in outcomes for unit, pair in o.slices.items()}
    whole = tuple(o.name for o in outcomes if o.status in ("kept_whole", "not_low_rank"))
    files = write_as(form, folder, factors, model, whole, base.source, base.revision)
    return [_placed(outcome, files) for outcome in outcomes]


def _placed(outcome: Outcome, files: AdapterFiles) -> Outcome:
    if outcome.name in files.left_out:
        reason = f"an adapter leaves it out: {files.reasons.get(outcome.name, BARE)}"
        return dataclasses.replace(outcome, status="failed", reason=reason)
    if outcome.name not in files.saved:
        return outcome
    if outcome.status == "extracted":
        reason = "another tensor of its module is kept whole, so it is too"
        return dataclasses.replace(outcome, status="kept_whole", reason=reason)
    if outcome.status == "not_low_rank":
        return dataclasses.replace(outcome, reason=f"{outcome.reason}; its module is kept whole")
    return outcome
