"""The chain: victims publish merged models only; base and adapters are recovered, then attacked."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jdetune
from benchmarks.leak import attacks
from benchmarks.leak.setting import Made, Setting
from jdetune import metrics
from jdetune.leak.denoiser import Adapter
from jdetune.leak.updates import products
from jdetune.models.layers import Lora

#: Models that are merged from one base and published together.
GROUP = 4
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def merged(setting: Setting, lora: Adapter, dtype: Any) -> np.ndarray:
    """Merged weights, [group * layer, model, row, col]; all that the attacker has of victims."""
    base = np.stack([np.asarray(setting.params[f"{path}.weight"]) for path in lora])
    updates = np.asarray(products(lora))  # [victim, layer, row, col]
    groups = (base + updates).reshape(-1, GROUP, *updates.shape[1:]).swapaxes(1, 2)
    return groups.reshape(-1, GROUP, *updates.shape[2:]).astype(dtype)


def run(setting: Setting, made: Made, lora: Adapter, dtype: str) -> dict[str, Any]:
    """Scores on recovered adapters, and how well base and updates came back."""
    stack = merged(setting, lora, DTYPES[dtype])
    solver = jdetune.SubspaceIntersection(polish=False)
    found = jdetune.recover(stack, solver)
    layers = len(lora)
    left, right = (
        np.asarray(x, np.float32).reshape(-1, layers, GROUP, *x.shape[2:])
        for x in (found.adapters.left, found.adapters.right)
    )  # [group, layer, model, ...]
    left, right = (x.swapaxes(1, 2).reshape(-1, layers, *x.shape[3:]) for x in (left, right))
    own = {
        path: Lora(jnp.asarray(right[:, i]), jnp.asarray(left[:, i])) for i, path in enumerate(lora)
    }
    bases = np.asarray(found.base, np.float32).reshape(-1, layers, *stack.shape[2:])
    good = np.isfinite(bases).all(axis=(1, 2, 3))
    first = bases[int(np.argmax(good))]
    params = {**setting.params}
    params |= {f"{path}.weight": jnp.asarray(first[i]) for i, path in enumerate(lora)}
    own = {path: Lora(jnp.nan_to_num(pair.a), jnp.nan_to_num(pair.b)) for path, pair in own.items()}
    pictures = attacks.regressed(setting, made.lora, made.targets, own)
    pictures |= attacks.drawn(setting, own, 20, params)
    truth = np.stack([np.asarray(setting.params[f"{path}.weight"]) for path in lora])
    true = np.asarray(products(lora))
    apart = np.linalg.norm(np.asarray(products(own)) - true) / np.linalg.norm(true)
    errors = [
        metrics.log_mse(b, t) for group in bases[good] for b, t in zip(group, truth, strict=True)
    ]
    return {
        "scores": {name: attacks.scored(setting, p) for name, p in pictures.items()},
        "not_recovered": int(np.count_nonzero(np.asarray(found.status))),
        "layers": len(stack),
        "w_error": float(np.mean(errors)),
        "update_error": float(apart),
    }
