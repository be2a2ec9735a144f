"""Pico pipelines: folders laid out as diffusers does it, of a few small matrices, without torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jdetune.checkpoint import merge_peft, save_safetensors
from tests import pico

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = f"{BLOCK}.attn1.to_q.weight", f"{BLOCK}.attn2.to_k.weight"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj.weight"
OUTPUT = "text_model.encoder.layers.0.self_attn.out_proj.weight"
TUNED = (*(f"unet/{name}" for name in UNET), f"text_encoder/{TEXT}")
#: Matrices of one shape, so that one program solves them all.
SHAPE = (48, 32)


def base(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {name: 0.05 * rng.standard_normal(SHAPE) for name in TUNED}
    found[f"text_encoder/{OUTPUT}"] = 0.05 * rng.standard_normal(SHAPE)
    found["text_encoder/text_model.embeddings.token_embedding.weight"] = np.ones((5, 8))
    found["unet/conv_in.weight"] = rng.standard_normal((8, 4, 3, 3))
    found["unet/conv_in.bias"] = np.zeros(8)
    found["vae/decoder.conv_in.weight"] = rng.standard_normal((8, 4, 3, 3))
    return {name: value.astype(np.float32) for name, value in found.items()}


def tuned(base: dict[str, np.ndarray], seed: int, rank: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(100 + seed)
    pairs = {name: pico.pair(rng, SHAPE, rank) for name in TUNED}
    return {**base, **{name: merge_peft(base[name], *pairs[name]) for name in TUNED}}


def write(root: Path, tensors: dict[str, np.ndarray], variant: str = "", shards: int = 1) -> Path:
    """A pipeline of UNet, text encoder and VAE; the UNet in shards if asked for."""
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
    }
    configs = {
        "unet": {"_class_name": "UNet2DConditionModel"},
        "text_encoder": {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]},
        "vae": {"_class_name": "AutoencoderKL"},
    }
    dot = f".{variant}" if variant else ""
    for part, config in configs.items():
        folder = root / part
        folder.mkdir(parents=True)
        index[part] = ["some_library", config.get("_class_name", "CLIPTextModel")]
        (folder / "config.json").write_text(json.dumps(config))
        own = {n.removeprefix(f"{part}/"): v for n, v in tensors.items() if n.startswith(part)}
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        if part == "unet" and shards > 1:
            _write_shards(
                folder, f"{stem}{dot}", f"{stem}.safetensors.index{dot}.json", own, shards
            )
        else:
            save_safetensors(folder / f"{stem}{dot}.safetensors", own)
    others = {"scheduler": "scheduler_config.json", "tokenizer": "vocab.json"}
    for part, file in others.items():
        (root / part).mkdir()
        (root / part / file).write_text("{}")
        index[part] = ["some_library", "Something"]
    index["safety_checker"] = [None, None]
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def _write_shards(folder: Path, stem: str, index: str, tensors: dict, shards: int) -> None:
    files = [f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save_safetensors(folder / file, {n: tensors[n] for n in tensors if weight_map[n] == file})
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def family(root: Path, n_models: int = 3, **options) -> tuple[dict[str, np.ndarray], list[Path]]:
    """A base's tensors and folders of models merged from it."""
    truth = base()
    paths = [write(root / f"tune-{i}", tuned(truth, i), **options) for i in range(n_models)]
    return truth, paths
