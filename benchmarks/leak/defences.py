"""Defences: what each leaves to the attacks, and what it costs.

The attacker knows the defence: the public fine-tunes of the bank go through the same one.
"""

import dataclasses
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from benchmarks.leak import attacks
from benchmarks.leak.setting import Made, Setting, make_bank, tune, whole
from jdetune.leak import defences, privacy
from jdetune.leak.denoiser import Adapter
from jdetune.leak.tuning import Recipe

#: Probability with which DP's guarantee may fail.
DELTA = 1e-5
#: DP-SGD's noise multipliers, and its clipping norm.
NOISES, CLIP = (0.0, 0.1, 0.3, 1.0, 5.0), 0.1


def released(seed: int) -> dict[str, Callable[[Adapter], Adapter]]:
    """What can be done to a finished adapter, by name."""
    key = jax.random.key(seed)
    return {
        "none": lambda lora: lora,
        "refactored": lambda lora: defences.refactored(lora, key),
        "noise 0.5 on factors": lambda lora: defences.noised(lora, 0.5, key),
        "noise 1.5 on factors": lambda lora: defences.noised(lora, 1.5, key),
        "rank 1": lambda lora: defences.truncated(lora, 1),
        "int8": lambda lora: defences.quantised(lora, defences.int8),
        "nf4": lambda lora: defences.quantised(lora, defences.nf4),
    }


def after_release(
    setting: Setting, made: Made, lora: Adapter, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows of defences that change a finished adapter."""
    rows = []
    for name, change in released(setting.seed).items():
        own = jax.random.key(setting.seed + 1)
        hidden = defences.refactored(lora, own) if name == "refactored" else change(lora)
        other = dataclasses.replace(made, lora=change(made.lora))
        rows.append(_row(setting, name, other, hidden, None))
        say(f"defence {name}")
    return rows


def early(
    setting: Setting, made: Made, lora: Adapter, steps: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Rows of fine-tunes that stopped early; both have an axis over these steps."""
    rows = []
    for i, step in enumerate(steps):
        pick = partial(jax.tree.map, operator.itemgetter(i))
        then, own = dataclasses.replace(made, lora=pick(made.lora)), pick(lora)
        rows.append(_row(setting, f"stopped after {step} steps", then, own, None))
    return rows


def private(
    setting: Setting, noises: tuple[float, ...], bank: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows of DP-SGD; bank and victims are trained with it, and the bank has its own size."""
    rows, base = [], setting.scale.recipe
    setting = dataclasses.replace(setting, scale=dataclasses.replace(setting.scale, bank=bank))
    for i, noise in enumerate(noises):
        recipe = dataclasses.replace(base, noise=noise, clip=CLIP)
        made = make_bank(setting, recipe, 10 + i)
        lora = tune(setting, recipe, whole(setting.victims), 200 + i)
        rows.append(_row(setting, f"DP-SGD, noise {noise:g}", made, lora, recipe))
        say(f"DP-SGD, noise {noise:g}")
    return rows


def _row(
    setting: Setting, name: str, made: Made, lora: Adapter, recipe: Recipe | None
) -> dict[str, Any]:
    found = attacks.plain(setting, made, lora)
    row: dict[str, Any] = {"defence": name, "scores": found, "epsilon": None, "group": None}
    if recipe is not None and recipe.noise:
        count = int(setting.victims.counts[0])
        row["epsilon"] = privacy.epsilon(recipe.steps, recipe.noise, DELTA)
        row["group"] = privacy.epsilon(recipe.steps, recipe.noise, DELTA, group=count)
    return row
