"""A bank of public fine-tunes on disk: what an auditor compares an adapter with.

A folder: ``bank.json`` (sizes, recipe, classes, measured accuracies), ``base.safetensors``,
``adapters.safetensors`` (factors with a leading axis over fine-tunes), ``known.safetensors``
(pictures, counts, classes, gallery) and ``judge.safetensors``.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jdetune.checkpoint import open_checkpoint, read_tensor, save_json, save_safetensors
from jdetune.checkpoint.strict_json import parse_object
from jdetune.errors import InputError
from jdetune.leak.denoiser import Adapter, Size
from jdetune.models.layers import Lora
from jdetune.models.params import Params

FORMAT = "jdetune.leak_bank/1"
_KNOWN = ("targets", "classes", "counts", "gallery", "gallery_classes", "usual")


@dataclasses.dataclass(frozen=True)
class Bank:
    """Public fine-tunes of one base, and what is needed to judge reconstructions.

    Attributes:
      size: of the base.
      params: its weights.
      lora: factors of the fine-tunes, with a leading axis.
      targets: [tune, side, side], mean picture that each was trained on.
      classes: [tune], class of its identity.
      counts: [tune], pictures that it was trained on.
      gallery: [identity, width], vectors of identities that are in no fine-tune.
      gallery_classes: [identity].
      usual: [side, side], mean public picture.
      network: weights of the recogniser.
      about: what else is known: names of classes, recipe, accuracies measured on held-out victims.
    """

    size: Size
    params: Params
    lora: Adapter
    targets: np.ndarray
    classes: np.ndarray
    counts: np.ndarray
    gallery: np.ndarray
    gallery_classes: np.ndarray
    usual: np.ndarray
    network: Any
    about: Mapping[str, Any]


def save_bank(path: str | Path, bank: Bank) -> None:
    """Writes a bank to a folder.

    Args:
      path: the folder; made if it is not there.
      bank: to write.

    Raises:
      WriteError: it cannot be written.
    """
    path = Path(path)
    about = {"format": FORMAT, "size": dataclasses.asdict(bank.size), "about": dict(bank.about)}
    scalings = {layer: float(pair.scaling) for layer, pair in bank.lora.items()}
    factors = {f"{layer}.A": np.asarray(pair.a) for layer, pair in bank.lora.items()}
    factors |= {f"{layer}.B": np.asarray(pair.b) for layer, pair in bank.lora.items()}
    flat = traverse_util.flatten_dict(bank.network, sep="/")
    save_safetensors(path / "base.safetensors", _arrays(bank.params))
    save_safetensors(path / "adapters.safetensors", factors)
    save_safetensors(path / "known.safetensors", _arrays({n: getattr(bank, n) for n in _KNOWN}))
    save_safetensors(path / "judge.safetensors", _arrays(flat))
    save_json(path / "bank.json", {**about, "scalings": scalings})  # last: it makes the bank whole


def load_bank(path: str | Path) -> Bank:
    """Reads a bank that `save_bank` wrote.

    Args:
      path: the folder.

    Raises:
      InputError: it is none, or damaged.
    """
    path = Path(path)
    if not (path / "bank.json").is_file():
        raise InputError(f"{path}: no bank.json in it. Give a folder of python -m benchmarks.leak.")
    said = parse_object((path / "bank.json").read_bytes(), path / "bank.json")
    if said.get("format") != FORMAT:
        raise InputError(f"{path}: is no bank ({FORMAT}). Make it again.")
    try:
        size = Size(**said["size"])
        known = _read(path / "known.safetensors")
        factors = _read(path / "adapters.safetensors")
        lora = {
            layer: Lora(jnp.asarray(factors[f"{layer}.A"]), jnp.asarray(factors[f"{layer}.B"]), s)
            for layer, s in said["scalings"].items()
        }
        flat = {name: jnp.asarray(x) for name, x in _read(path / "judge.safetensors").items()}
        params = {name: jnp.asarray(x) for name, x in _read(path / "base.safetensors").items()}
        arrays = {name: known[name] for name in _KNOWN}
        bank = Bank(
            size, params, lora, **arrays, network=traverse_util.unflatten_dict(flat, sep="/"),
            about=said["about"],
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: the bank is damaged ({error}). Make it again.") from error
    tunes = {len(bank.targets), len(bank.classes), len(bank.counts)}
    tunes |= {len(pair.a) for pair in lora.values()} | {len(pair.b) for pair in lora.values()}
    if len(tunes) != 1 or bank.targets.shape[1:] != (size.side, size.side):
        raise InputError(f"{path}: the bank's arrays do not fit together. Make it again.")
    return bank


def save_adapter(path: str | Path, adapter: Adapter) -> None:
    """Writes one adapter as a PEFT folder.

    Args:
      path: the folder.
      adapter: factors without a leading axis.
    """
    path, first = Path(path), next(iter(adapter.values()))
    rank = int(first.a.shape[0])
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": float(first.scaling * rank),
        "target_modules": list(adapter),
    }
    tensors = {}
    for layer, pair in adapter.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = np.asarray(pair.a)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = np.asarray(pair.b)
    save_safetensors(path / "adapter_model.safetensors", tensors)
    save_json(path / "adapter_config.json", config)


def _arrays(found: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in found.items()}


def _read(path: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(path)
    return {name: read_tensor(checkpoint, name) for name in checkpoint.tensors}
