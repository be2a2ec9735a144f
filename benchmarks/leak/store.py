"""A bank on disk for ``jdetune leak audit``, with a few victims to try it on."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.leak import attacks, glyphs
from benchmarks.leak.setting import Made, Setting
from jdetune.leak.bank import Bank, save_adapter, save_bank
from jdetune.leak.denoiser import Adapter

#: Victims that are written.
EXAMPLES = 4
_NAMES = {attacks.RIDGE: "regression", attacks.SILENT: "without a prompt"}


def bank_of(setting: Setting, made: Made, done: dict[str, Any]) -> Bank:
    """The bank of a setting; its gallery leaves out the victims that are written."""
    scores = done.get("attack", {})
    measured = {
        ours: float(np.mean(scores[name]["top1"]))
        for name, ours in _NAMES.items()
        if name in scores
    }
    recipe = dataclasses.asdict(setting.scale.recipe)
    return Bank(
        size=setting.scale.size,
        params=setting.params,
        lora=made.lora,
        targets=made.targets.astype(np.float32),
        classes=setting.known.classes[made.identities],
        counts=np.asarray(made.private.counts),
        gallery=setting.gallery[EXAMPLES:],
        gallery_classes=setting.held.classes[EXAMPLES:],
        usual=setting.usual,
        network=setting.network,
        about={
            "classes": list(glyphs.CLASSES),
            "data": glyphs.versions(),
            "recipe": recipe,
            "measured": measured,
        },
    )


def save_for_audit(
    path: Path, setting: Setting, made: Made, lora: Adapter, done: dict[str, Any]
) -> None:
    """Writes the bank, and victims as PEFT adapters with their pictures."""
    save_bank(path, bank_of(setting, made, done))
    for i in range(EXAMPLES):
        folder = path / "victims" / str(i)
        save_adapter(folder, jax.tree.map(lambda x: x[i], lora))  # noqa: B023
        count = int(setting.victims.counts[i])
        np.save(folder / "pictures.npy", np.asarray(setting.victims.pictures[i, :count]))
