"""Which format adapters are written in, and writers and readers by format."""

from collections.abc import Callable, Mapping
from pathlib import Path

from jdetune.checkpoint import pipeline_folder
from jdetune.checkpoint.adapter_reader import Adapter, read_adapter
from jdetune.checkpoint.adapters import (
    CONFIG_NAME,
    RECOVERED_BASE,
    AdapterFiles,
    Factors,
    write_adapter,
)
from jdetune.checkpoint.diffusers_lora import WEIGHTS_NAME, read_diffusers, write_diffusers
from jdetune.checkpoint.index import Checkpoint
from jdetune.checkpoint.kohya import read_kohya, write_kohya
from jdetune.checkpoint.lora_files import save_component_card
from jdetune.checkpoint.single_file import is_original_layout
from jdetune.checkpoint.slots import slots_of
from jdetune.errors import InputError, OutputError

FORMATS = ("auto", "peft", "kohya", "diffusers", "none")


def choose_format(wanted: str, checkpoint: Checkpoint) -> str:
    """The format to write, checked against the kind of model before any work is done.

    Args:
      wanted: one of ``FORMATS``; ``auto`` is diffusers' for pipelines and diffusers models,
        kohya's for single files in the original Stable Diffusion layout, PEFT's for the rest.
      checkpoint: one of the merged models.

    Raises:
      OutputError: the format has no names for this kind of model.
    """
    if wanted not in FORMATS:
        raise ValueError(f"adapter_format is one of {', '.join(FORMATS)}; got {wanted!r}")
    original = is_original_layout(checkpoint)
    if wanted == "auto":
        in_diffusers = "_class_name" in checkpoint.config
        wanted = "kohya" if original else "diffusers" if in_diffusers else "peft"
        if wanted == "diffusers" and not slots_of(checkpoint):
            wanted = "peft"
    if not _has_names(wanted, checkpoint):
        fit = [f for f in ("peft", "diffusers", "kohya", "none") if _has_names(f, checkpoint)]
        raise OutputError(
            f"--adapter_format={wanted}: this format has no names for the modules of this kind of "
            f"model. Choose {', '.join(fit[:-1])} or {fit[-1]}."
        )
    names = _names(wanted, checkpoint)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise OutputError(
            f"--adapter_format={wanted}: two tensors of {checkpoint.name} would be called "
            f"{twice[0]} in it. Choose peft or none."
        )
    return wanted


def write_as(
    form: str,
    path: str | Path,
    factors: Factors,
    checkpoint: Checkpoint,
    per_model: tuple[str, ...] = (),
    base: str = RECOVERED_BASE,
    revision: str | None = None,
) -> AdapterFiles:
    """Writes one model's adapter in a format that ``choose_format`` returned.

    Args:
      form: the format.
      path: folder to write; not made for ``none``.
      factors: tensor name to left [row, rank] and right [rank, col]; a convolution's columns are
        in, height and width.
      checkpoint: the merged model.
      per_model: tensors that the base lacks.
      base: where the adapter says its base lies.
      revision: commit of a base of the hub; PEFT's format says it.

    Returns:
      Which tensors went where.
    """
    path = Path(path)
    if form == "none":
        return AdapterFiles(path, (), (), ())
    if form == "peft" and pipeline_folder.is_pipeline(checkpoint):
        return _write_components(path, factors, checkpoint, per_model, base)
    if form == "peft":
        return write_adapter(path, factors, checkpoint, per_model, base, revision)
    writers: Mapping[str, Callable[..., AdapterFiles]] = {
        "kohya": write_kohya,
        "diffusers": write_diffusers,
    }
    return writers[form](path, factors, checkpoint, per_model, base)


def read_as(path: str | Path, base: Checkpoint) -> Adapter:
    """Reads one model's adapter in whatever format it was written.

    Args:
      path: the model's folder.
      base: the recovered base, whose tensors the updates are of.

    Raises:
      InputError: it holds no adapter, or one that does not fit the base.
    """
    path = Path(path)
    if (path / CONFIG_NAME).is_file():
        return read_adapter(path, base)
    if (path / WEIGHTS_NAME).is_file():
        return read_diffusers(path / WEIGHTS_NAME, base)
    if (path / f"{path.name}.safetensors").is_file():
        return read_kohya(path / f"{path.name}.safetensors", base)
    parts = sorted(p.name for p in path.glob("*") if (p / CONFIG_NAME).is_file())
    if not parts:
        raise InputError(f"{path}: no adapter in it. Give a folder that jdetune wrote.")
    views = {part: pipeline_folder.component_view(base, part) for part in parts}
    found = {part: read_adapter(path / part, views[part]) for part in parts}
    updates = {f"{p}/{name}": u for p, own in found.items() for name, u in own.updates.items()}
    saved = {f"{p}/{name}": array for p, own in found.items() for name, array in own.saved.items()}
    return Adapter(updates, saved, {})


def _write_components(
    path: Path,
    factors: Factors,
    checkpoint: Checkpoint,
    per_model: tuple[str, ...],
    base: str,
) -> AdapterFiles:
    """PEFT knows single models: a folder for every component that has an update."""
    written = []
    used = [n for n, (left, _) in factors.items() if left.shape[1]] + list(per_model)
    parts = dict.fromkeys(pipeline_folder.component_of(n) for n in used or list(factors)[:1])
    for part in parts:
        folder = f"{part}/"
        own = {n.removeprefix(folder): f for n, f in factors.items() if n.startswith(folder)}
        whole = tuple(n.removeprefix(folder) for n in per_model if n.startswith(folder))
        where = f"../{base}/{part}" if base == RECOVERED_BASE else f"{base}/{part}"
        view = pipeline_folder.component_view(checkpoint, part)
        files = write_adapter(path / part, own, view, whole, where)
        save_component_card(path / part, view.config, where)
        written.append((folder, files))
    named = {
        key: tuple(f"{folder}{name}" for folder, files in written for name in getattr(files, key))
        for key in ("targets", "left_out", "saved")
    }
    reasons = {f"{folder}{n}": why for folder, files in written for n, why in files.reasons.items()}
    return AdapterFiles(path, **named, reasons=reasons)


def _has_names(form: str, checkpoint: Checkpoint) -> bool:
    """Whether a format has names for any module of a model."""
    if form == "none":
        return True
    if form == "peft":
        return not is_original_layout(checkpoint)
    return bool(_names(form, checkpoint))


def _names(form: str, checkpoint: Checkpoint) -> list[str]:
    """Names of a model's modules in kohya's and diffusers' files."""
    if form not in ("kohya", "diffusers"):
        return []
    slots = [slot for own in slots_of(checkpoint).values() for slot in own]
    if form == "kohya":
        return [slot.kohya for slot in slots if slot.kohya is not None]
    return [f"{slot.component}.{slot.module}" for slot in slots if slot.module is not None]
