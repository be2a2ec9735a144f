"""Small zoos: models of six layers with query, value and dense, a head and an embedding."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from jdetune.checkpoint import merge_peft, save_safetensors

SHAPE, LAYERS = (48, 32), 6
KINDS = ("query", "value", "dense")
BF16 = ml_dtypes.bfloat16
Model = dict[str, np.ndarray]


def inner(kinds=KINDS) -> list[str]:
    return [f"layer.{i}.{kind}.weight" for i in range(LAYERS) for kind in kinds]


def base(seed: int, dtype: type = np.float32) -> Model:
    rng = np.random.default_rng(seed)
    made = {n: (0.05 * rng.standard_normal(SHAPE)).astype(dtype) for n in inner()}
    made["embeddings.weight"] = (0.05 * rng.standard_normal((64, 32))).astype(dtype)
    made["head.weight"] = (0.05 * rng.standard_normal((20, 32))).astype(dtype)
    made["norm.bias"] = np.zeros(32, dtype)
    return made


def tune(model: Model, seed: int, rank: int = 2, names=None, size: float = 0.1) -> Model:
    """A low-rank update of some matrices, merged as PEFT does it."""
    rng = np.random.default_rng(1000 + seed)
    out = dict(model)
    for name in inner(("query", "value")) if names is None else names:
        left = size * rng.standard_normal((SHAPE[0], rank))
        right = size * rng.standard_normal((rank, SHAPE[1]))
        out[name] = merge_peft(model[name], left.astype(np.float32), right.astype(np.float32))
    return out


def dense(model: Model, seed: int, names, size: float = 1e-3) -> Model:
    """A full-rank change of some tensors."""
    rng = np.random.default_rng(2000 + seed)
    noise = {n: size * rng.standard_normal(model[n].shape) for n in names}
    return {n: (w + noise[n]).astype(w.dtype) if n in noise else w for n, w in model.items()}


def int8(model: Model) -> Model:
    """Matrices quantised to int8 by rows and back."""

    def there_and_back(w: np.ndarray) -> np.ndarray:
        step = np.abs(w).max(axis=1, keepdims=True) / np.float32(127)
        return (np.round(w / step) * step).astype(w.dtype)

    return {n: there_and_back(w) if n in inner() else w for n, w in model.items()}


def cast(model: Model, dtype: type) -> Model:
    return {n: w.astype(dtype) for n, w in model.items()}


def write(root: Path, models: dict[str, Model]) -> list[str]:
    for name, model in models.items():
        folder = root / name
        folder.mkdir(parents=True)
        save_safetensors(folder / "model.safetensors", model)
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return [str(root / name) for name in models]
