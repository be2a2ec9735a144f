"""Adapters as kohya's scripts write them: one file with ``lora_unet_*`` and ``lora_te_*`` names."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jdetune.checkpoint.adapter_reader import Adapter, LoraUpdate
from jdetune.checkpoint.adapters import RECOVERED_BASE, AdapterFiles, Factors
from jdetune.checkpoint.index import Checkpoint, open_checkpoint
from jdetune.checkpoint.lora_files import write_file
from jdetune.checkpoint.reader import read_tensor
from jdetune.checkpoint.slots import Piece, is_sdxl, joined, slots_of
from jdetune.errors import InputError

#: Width of the text features that a UNet attends to, to what kohya calls the model.
_VERSIONS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}


def write_kohya(
    path: Path,
    factors: Factors,
    checkpoint: Checkpoint,
    per_model: tuple[str, ...] = (),
    base: str = RECOVERED_BASE,
) -> AdapterFiles:
    """Writes one model's adapter as ``NAME/NAME.safetensors``; alpha is the rank everywhere.

    Modules of one component get one rank, smaller ones filled up with zeros: diffusers 0.42 reads
    the alphas of attention only where all are the same, and scales the rest wrongly.

    Args:
      path: folder to write.
      factors: tensor name to left and right.
      checkpoint: the merged model.
      per_model: tensors that the base lacks; the file cannot hold them.
      base: what the card names as the base.

    Returns:
      Which tensors went where.
    """

    def content(held: dict[str, list[Piece]]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        tensors: dict[str, np.ndarray] = {}
        tops = _top_ranks(held)
        for piece in (piece for own in held.values() for piece in own):
            rank = tops[piece.slot.component]
            tensors[f"{piece.slot.kohya}.lora_down.weight"] = _filled(piece.down, 0, rank)
            tensors[f"{piece.slot.kohya}.lora_up.weight"] = _filled(piece.up, 1, rank)
            tensors[f"{piece.slot.kohya}.alpha"] = np.array(rank, np.float32)
        return tensors, _metadata(path.name, held, checkpoint)

    file = path / f"{path.name}.safetensors"
    return write_file(
        file,
        factors,
        checkpoint,
        per_model,
        base,
        "kohya",
        lambda slot: slot.kohya is not None,
        content,
    )


def read_kohya(path: Path, base: Checkpoint) -> Adapter:
    """Reads a kohya file back into updates of a base's tensors.

    Raises:
      InputError: a module in it is no module of the base, or has only some of its tensors.
    """
    checkpoint = open_checkpoint(path)
    modules = {key.partition(".")[0] for key in checkpoint.tensors}
    updates: dict[str, LoraUpdate] = {}
    known: set[str] = set()
    for name, slots in slots_of(base).items():
        names = [slot.kohya for slot in slots]
        present = [own for own in names if own in modules]
        if not present:
            continue
        if len(present) < len(names):
            raise InputError(f"{path}: {name} has only some of its factors. Copy the file again.")
        known.update(own for own in names if own is not None)
        left, right = joined([_factors(checkpoint, own) for own in names if own is not None])
        updates[name] = LoraUpdate(left, right, 1.0)
    if modules - known:
        raise InputError(
            f"{path}: {sorted(modules - known)[0]} is no module of {base.path}. Give the adapter's "
            "own base."
        )
    return Adapter(updates, {}, {})


def _top_ranks(held: Mapping[str, list[Piece]]) -> dict[str, int]:
    """Greatest rank of every component."""
    tops: dict[str, int] = {}
    for piece in (piece for own in held.values() for piece in own):
        component = piece.slot.component
        tops[component] = max(tops.get(component, 0), len(piece.down))
    return tops


def _filled(factor: np.ndarray, axis: int, size: int) -> np.ndarray:
    """A factor with zeros up to a size along its rank axis."""
    missing = [(0, size - n if i == axis else 0) for i, n in enumerate(factor.shape)]
    return np.pad(factor, missing)


def _factors(checkpoint: Checkpoint, module: str) -> tuple[np.ndarray, np.ndarray]:
    """Down and up factor of a module, its scale folded into the up one."""
    keys = [f"{module}.{word}" for word in ("lora_down.weight", "lora_up.weight", "alpha")]
    if not set(keys) <= set(checkpoint.tensors):
        raise InputError(
            f"{checkpoint.path}: {module} has only some of its factors. Copy it again."
        )
    down, up, alpha = (read_tensor(checkpoint, key) for key in keys)
    return down, up * np.float32(float(alpha) / len(down))


def _metadata(name: str, held: Mapping[str, list[Piece]], checkpoint: Checkpoint) -> dict[str, str]:
    """Header text in kohya's words, as far as it can be known."""
    everything = [piece for own in held.values() for piece in own]
    top = str(max(_top_ranks(held).values(), default=1))
    spatial = any(max(piece.down.shape[2:], default=1) > 1 for piece in everything)
    extra = {"conv_dim": top, "conv_alpha": top} if spatial else {}
    version = _version(checkpoint)
    known = {} if version is None else {"ss_base_model_version": version}
    known |= {} if version is None else {"ss_v2": str(version == "sd_v2")}
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": top,
        "ss_network_alpha": top,
        "ss_network_args": json.dumps(extra),
        "ss_output_name": name,
        **known,
    }


def _version(checkpoint: Checkpoint) -> str | None:
    """Kohya's word for the kind of model, None where it is not known."""
    if any(
        name.startswith("double_blocks.") or ".double_blocks." in name
        for name in checkpoint.tensors
    ):
        return "flux1"
    widths = [i.shape[1] for n, i in checkpoint.tensors.items() if n.endswith(".attn2.to_k.weight")]
    version = _VERSIONS.get(widths[0]) if widths else None
    return version if (version == _VERSIONS[2048]) == is_sdxl(checkpoint) else None
