"""Folders of merged models as people have them: real weights, config and tokenizer, on disk."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks import families, real_models

_PROFILE = "minilm-distinct"
_FLOATS = (np.float32, np.float16)


def minilm(root: Path, count: int, dtype: str) -> list[Path]:
    """all-MiniLM-L6-v2, merged with adapters that were trained on distinct tasks.

    Args:
      root: folder that gets one folder a model.
      count: how many models.
      dtype: how they are stored: float32, float16 or bfloat16.
    """
    source = real_models.weights_file("minilm")
    updates = families.factors(_PROFILE, count)
    made = []
    for index in range(count):
        own = {name: several[index] for name, several in updates.items()}
        made.append(_write(source.parent, source.name, root / f"minilm-{index:02d}", own, dtype))
    return made


def smollm2(root: Path, count: int, dtype: str, trained: bool) -> list[Path]:
    """SmolLM2-135M-Instruct, merged with adapters on its query and value projections.

    Args:
      root: folder that gets one folder a model, and the base's for as long as it is made.
      count: how many models.
      dtype: how they are stored.
      trained: adapters of ``benchmarks.train_adapters --set=smollm2-sft``, else random directions
        with singular values as the trained adapters of MiniLM have them (``like_trained``).
    """
    model, tokenizer, _ = real_models.load("smollm2")
    base = root / "base"
    base.mkdir(parents=True)
    model.config.save_pretrained(base)
    model.generation_config.save_pretrained(base)
    tokenizer.save_pretrained(base)
    state = {n: t.numpy() for n, t in model.state_dict().items() if n != "lm_head.weight"}  # tied
    save_file(state, base / "model.safetensors", {"format": "pt"})
    if trained:
        updates = families.factors("smollm2-sft", count)
    else:
        tuned = ("q_proj.weight", "v_proj.weight")
        weights = {name: value for name, value in state.items() if name.endswith(tuned)}
        updates = like_trained(weights, count)
    del model, state
    made = []
    for index in range(count):
        own = {name: several[index] for name, several in updates.items()}
        made.append(_write(base, "model.safetensors", root / f"smollm2-{index:02d}", own, dtype))
    shutil.rmtree(base)
    return made


def like_trained(
    weights: dict[str, np.ndarray], count: int, seed: int = 0
) -> dict[str, list[families.Factors]]:
    """Updates in random directions, with the sizes and spectra of real adapters.

    Args:
      weights: base weights by name.
      count: how many updates of each.
      seed: of NumPy's generator.
    """
    rng = np.random.default_rng(seed)
    shapes = _profiles()
    updates = {}
    for name, base in weights.items():
        several = []
        for _ in range(count):
            ratio, values = shapes[rng.integers(len(shapes))]
            rank = len(values)
            u = np.linalg.qr(rng.standard_normal((base.shape[0], rank)))[0]
            v = np.linalg.qr(rng.standard_normal((base.shape[1], rank)))[0]
            root = np.sqrt(values * ratio * np.linalg.norm(base))
            several.append(
                families.Factors(
                    (u * root).astype(np.float32), (root[:, None] * v.T).astype(np.float32), 1.0
                )
            )
        updates[name] = several
    return updates


def _profiles() -> list[tuple[float, np.ndarray]]:
    """Size against the weights, and singular values of unit norm, of trained updates."""
    updates = families.factors(_PROFILE)
    bases = families.base_weights(_PROFILE, tuple(updates))
    found = []
    for name, several in updates.items():
        for one in several:
            thin = [np.asarray(np.linalg.qr(side, mode="r")) for side in (one.left, one.right.T)]
            values = one.scaling * np.linalg.svd(thin[0] @ thin[1].T, compute_uv=False)
            size = np.linalg.norm(values)
            found.append((float(size / np.linalg.norm(bases[name])), values / size))
    return found


def _write(
    source: Path, file: str, out: Path, updates: dict[str, families.Factors], dtype: str
) -> Path:
    """Copies a model's folder, with its weights merged and stored in a dtype."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns(file, "__pycache__", "*.py"))
    tensors: dict[str, Any] = load_file(source / file)
    for name, update in updates.items():
        tensors[name] = families.merge(tensors[name], update.update(), dtype)
    kind = families.DTYPES[dtype]
    tensors = {n: t.astype(kind) if t.dtype in _FLOATS else t for n, t in tensors.items()}
    save_file(
        {n: np.ascontiguousarray(t) for n, t in tensors.items()}, out / file, {"format": "pt"}
    )
    return out
