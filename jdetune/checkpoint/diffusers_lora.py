"""Adapters as diffusers writes them: one file for all components, their config in its header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdetune.checkpoint import peft_layout as layout
from jdetune.checkpoint.adapter_reader import Adapter, LoraUpdate
from jdetune.checkpoint.adapters import RECOVERED_BASE, AdapterFiles, Factors
from jdetune.checkpoint.index import Checkpoint, open_checkpoint
from jdetune.checkpoint.lora_files import write_file
from jdetune.checkpoint.reader import read_tensor
from jdetune.checkpoint.slots import Piece, joined, slots_of
from jdetune.checkpoint.stream import open_tensors
from jdetune.errors import InputError

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"


def write_diffusers(
    path: Path,
    factors: Factors,
    checkpoint: Checkpoint,
    per_model: tuple[str, ...] = (),
    base: str = RECOVERED_BASE,
) -> AdapterFiles:
    """Writes one model's adapter as ``pytorch_lora_weights.safetensors``.

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
        ranks: dict[str, dict[str, int]] = {}
        for piece in (piece for own in held.values() for piece in own):
            component, module = piece.slot.component, str(piece.slot.module)
            tensors[f"{component}.{module}.lora_A.weight"] = piece.down
            tensors[f"{component}.{module}.lora_B.weight"] = piece.up
            ranks.setdefault(component, {})[module] = len(piece.down)
        said = json.dumps(_config(ranks, checkpoint), indent=2, sort_keys=True)
        return tensors, {"format": "pt", _METADATA: said}

    file = path / WEIGHTS_NAME
    return write_file(
        file,
        factors,
        checkpoint,
        per_model,
        base,
        "diffusers",
        lambda slot: slot.module is not None,
        content,
    )


def read_diffusers(path: Path, base: Checkpoint) -> Adapter:
    """Reads such a file back into updates of a base's tensors.

    Raises:
      InputError: a module in it is no module of the base, has one factor only, or a scale other
        than one.
    """
    checkpoint = open_checkpoint(path)
    config = json.loads(open_tensors(path)[1].get(_METADATA, "{}"))
    for key, value in config.items():
        twin = key.replace("lora_alpha", "r").replace("alpha_pattern", "rank_pattern")
        if twin != key and config.get(twin) != value:
            raise InputError(f"{path}: {key} is not the rank. Only a scale of one can be read.")
    updates: dict[str, LoraUpdate] = {}
    known: set[str] = set()
    for name, slots in slots_of(base).items():
        roots = [f"{slot.component}.{slot.module}" for slot in slots]
        keys = [f"{root}.lora_{word}.weight" for root in roots for word in "AB"]
        present = [key for key in keys if key in checkpoint.tensors]
        if not present:
            continue
        if len(present) < len(keys):
            raise InputError(f"{path}: {name} has only some of its factors. Copy the file again.")
        arrays = [read_tensor(checkpoint, key) for key in keys]
        left, right = joined(list(zip(arrays[::2], arrays[1::2], strict=True)))
        updates[name] = LoraUpdate(left, right, 1.0)
        known.update(keys)
    if set(checkpoint.tensors) - known:
        raise InputError(
            f"{path}: {sorted(set(checkpoint.tensors) - known)[0]} belongs to no module of "
            f"{base.path}. Give the adapter's own base."
        )
    return Adapter(updates, {}, config)


def _config(ranks: Mapping[str, Mapping[str, int]], checkpoint: Checkpoint) -> dict[str, Any]:
    """PEFT's config of every component, the component before every key."""
    every: dict[str, set[str]] = {}
    for slot in (slot for slots in slots_of(checkpoint).values() for slot in slots):
        every.setdefault(slot.component, set()).add(_inner(str(slot.module)))
    config: dict[str, Any] = {}
    for component, found in ranks.items():
        own = {_inner(module): rank for module, rank in found.items()}
        top = max(own.values())
        modules = every[component]
        pattern = {layout.pattern_key(m, modules): r for m, r in own.items() if r != top}
        values = {
            "peft_type": "LORA",
            "r": top,
            "lora_alpha": top,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": layout.target_modules(list(own), modules),
            "bias": "none",
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "inference_mode": True,
        }
        config |= {f"{component}.{key}": value for key, value in values.items()}
    return config


def _inner(module: str) -> str:
    """A path that ends the module's in old and new transformers, which dropped the outer name."""
    return module.removeprefix("text_model.")
