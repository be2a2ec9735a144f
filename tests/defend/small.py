"""Small random models of every architecture, and fine-tunes of them."""

from typing import Any

import numpy as np

from jdetune import models
from jdetune.models.params import layout

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 64,
}
BERT = models.Bert(models.BertConfig(vocab_size=40, max_position_embeddings=16, **SIZES))
IMAGE: dict[str, Any] = {"image_size": 28, "patch_size": 14, **SIZES}
VIT = models.ViT(models.ViTConfig(**IMAGE))
DINOV2 = models.ViT(models.ViTConfig(layer_scale=True, **IMAGE))
LLAMA = models.Llama(
    models.LlamaConfig(
        vocab_size=40, num_key_value_heads=4, head_dim=12, attention_bias=True, **SIZES
    )
)
MODULES = {"bert": BERT, "vit": VIT, "dinov2": DINOV2, "llama": LLAMA}
_RNG = np.random.default_rng(0)
IDS = _RNG.integers(3, 40, (2, 7)).astype(np.int32)
PIXELS = _RNG.standard_normal((2, 3, 28, 28)).astype(np.float32)


def inputs(module):
    return PIXELS if isinstance(module, models.ViT) else IDS


def weights(module, seed=0):
    """Every weight, bias and norm is random and matters."""
    rng, found = np.random.default_rng(seed), {}
    for name, (_, shape) in layout(module).items():
        is_gain = "norm" in name.lower() and name.endswith("weight") or "lambda" in name
        found[name] = (float(is_gain) + 0.25 * rng.standard_normal(shape)).astype(np.float32)
    return found


def fine_tunes(module, base, count=3, rank=2, size=0.02):
    """Models with updates of that rank in every matrix of the blocks."""
    rng, found = np.random.default_rng(1), []
    for _ in range(count):
        model = dict(base)
        for name, weight in base.items():
            if weight.ndim == 2 and "layer" in name:
                row, col = weight.shape
                update = np.matmul(rng.standard_normal((row, rank)),
                                   rng.standard_normal((rank, col)))  # fmt: skip
                model[name] = (weight + size * update).astype(np.float32)
        found.append(model)
    return found
