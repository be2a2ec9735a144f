"""Small models of transformers' own with weights large enough for every part to matter."""

import warnings
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from jdetune import models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

#: float32 rounding of two libraries through two layers, values of size one to ten.
TOLERANCE = 2e-5

BERT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
LLAMA = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = {
    "bert": ("BertConfig", BERT),
    "vit": ("ViTConfig", {**VIT, "intermediate_size": 48}),
    "dinov2": ("Dinov2Config", {**VIT, "mlp_ratio": 2}),
    "llama": ("LlamaConfig", LLAMA),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": None}),
}


def theirs(kind, head=None, seed=0, **changes) -> Any:
    """A transformers model in evaluation mode; every weight, bias and norm is random."""
    name, sizes = KINDS[kind]
    config = getattr(transformers, name)(**{**sizes, **changes})
    default = "ForCausalLM" if kind in ("llama", "mistral") else "Model"
    torch.manual_seed(seed)
    model = getattr(transformers, name.removesuffix("Config") + (head or default))(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            centre = 1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0
            weight.copy_(centre + 0.25 * torch.randn_like(weight))
    return model


def tensors(model):
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def ours(model, **known) -> tuple[Any, Any]:
    """The same model in Flax."""
    found = tensors(model)
    module = models.build(model.config.to_dict(), found, **known)
    return module, models.load_params(module, found)


#: Compiled as a whole: op by op takes longer.
run = partial(jax.jit, static_argnames=("module", "taps", "edit", "last"))(models.run)


def save(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def close(got, wanted, tolerance=TOLERANCE):
    wanted = wanted.detach().numpy() if hasattr(wanted, "detach") else np.asarray(wanted)
    assert np.std(wanted) > 0.1, "nothing to compare"
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=tolerance, atol=tolerance)


def smallest(kind, **changes) -> tuple[Any, Any, Any]:
    """Theirs and ours with one layer, for what does not depend on their number."""
    model = theirs(kind, num_hidden_layers=1, **changes)
    return (model, *ours(model))


def token_ids(shape, vocabulary=40, seed=0):
    return np.random.default_rng(seed).integers(3, vocabulary, shape).astype(np.int32)


#: Inputs of most tests, so that compiled programs are shared.
IDS = token_ids((3, 7))
MASK = np.array([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
PIXELS = np.random.default_rng(0).standard_normal((2, 3, 28, 28)).astype(np.float32)
