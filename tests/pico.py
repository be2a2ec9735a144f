"""Pico checkpoints: a base of a few small matrices and models merged from it."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from jdetune.checkpoint import merge_peft, save_safetensors
from jdetune.result import Adapters, Recoveries, Recovery
from jdetune.status import Status

SHAPES = {
    "encoder.layer.0.query.weight": (48, 32),
    "encoder.layer.0.value.weight": (48, 32),
    "encoder.layer.1.query.weight": (48, 32),
    "encoder.layer.1.value.weight": (48, 32),
    "encoder.layer.0.dense.weight": (24, 24),
}


@dataclasses.dataclass(frozen=True)
class Pico:
    """A base, its merged models and where they lie."""

    root: Path
    base: dict[str, np.ndarray]
    models: list[dict[str, np.ndarray]]
    factors: list[dict[str, tuple[np.ndarray, np.ndarray]]]
    paths: list[Path]


def make(
    root: Path, n_models: int = 3, rank: int = 2, dtype: type = np.float32, seed: int = 0
) -> Pico:
    """Writes a family of one base; the last matrix is fine-tuned in no model."""
    rng = np.random.default_rng(seed)
    base = {n: (0.05 * rng.standard_normal(s)).astype(dtype) for n, s in SHAPES.items()}
    base["encoder.norm.weight"] = np.ones(32, dtype)
    base["encoder.norm.bias"] = np.zeros(32, dtype)
    base["classifier.weight"] = rng.standard_normal((3, 32)).astype(dtype)
    base["classifier.bias"] = rng.standard_normal(3).astype(dtype)
    tuned = [name for name in SHAPES if "dense" not in name]
    factors = [{n: pair(rng, SHAPES[n], rank) for n in tuned} for _ in range(n_models)]
    models = [{**base, **{n: merge_peft(base[n], *f[n]) for n in tuned}} for f in factors]
    paths = [write(root / f"tune-{i}", model) for i, model in enumerate(models)]
    return Pico(root, base, models, factors, paths)


def pair(rng: np.random.Generator, shape: tuple[int, ...], rank: int):
    left = 0.1 * rng.standard_normal((shape[0], rank))
    right = 0.1 * rng.standard_normal((rank, shape[1]))
    return left.astype(np.float32), right.astype(np.float32)


def write(path: Path, tensors: dict[str, np.ndarray], shards: int = 1, **config) -> Path:
    """A Hugging Face folder with config and tokenizer files, in one file or in shards."""
    path.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    if shards == 1:
        save_safetensors(path / "model.safetensors", tensors)
    else:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        weight_map = {name: files[i % shards] for i, name in enumerate(names)}
        for file in files:
            part = {n: tensors[n] for n in names if weight_map[n] == file}
            save_safetensors(path / file, part)
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    content = {"model_type": "bert", "architectures": ["BertModel"], **config}
    (path / "config.json").write_text(json.dumps(content))
    (path / "tokenizer.json").write_text("{}")
    (path / "vocab.txt").write_text("a\nb\n")
    (path / "modeling_evil.py").write_text("raise SystemExit")
    return path


def truth_teller(base: dict[str, np.ndarray], statuses: dict[str, Status] | None = None):
    """A ``recover`` that knows the base; statuses by name make layers fail."""

    def recover(stacks, solver=None, progress=None, throw=False):
        found = {}
        for done, (name, stack) in enumerate(stacks.items()):
            found[name] = known(stack, base[name], (statuses or {}).get(name, Status.OK))
            if progress is not None:
                progress(done + 1, len(stacks))
        return Recoveries(found)

    return recover


def known(stack: np.ndarray, base: np.ndarray, status: Status = Status.OK) -> Recovery:
    updates = stack.astype(np.float64) - base.astype(np.float64)
    u, s, vt = np.linalg.svd(updates, full_matrices=False)
    ranks = (s > 1e-4).sum(axis=1)
    top = max(int(ranks.max()), 1)
    mask = np.arange(top) < ranks[:, None]
    left = u[:, :, :top] * np.sqrt(s[:, None, :top]) * mask[:, None]
    right = np.sqrt(s[:, :top, None]) * vt[:, :top] * mask[:, :, None]
    return Recovery(
        base=base if status.has_base else np.full_like(base, np.nan),
        ranks=ranks.astype(np.int32),
        adapters=Adapters(left.astype(np.float32), right.astype(np.float32)),
        status=np.array(int(status), np.int32),
        predicted_error=np.array(-99.0, np.float32),
        exact_fraction=np.array(np.nan, np.float32),
        amplification=np.array(np.nan, np.float32),
        certain=np.zeros(base.shape, bool),
        stats={"residual_ratio": np.array(1.0, np.float32)},
    )
