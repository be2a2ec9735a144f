"""Kinds of modules, as PEFT meets them."""

import numpy as np
import pytest

from jdetune.checkpoint import open_checkpoint
from jdetune.checkpoint.adapters import write_adapter
from jdetune.checkpoint.peft_layout import Kind, kind_of
from tests import pico


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("x_embedder", Kind.LINEAR),
        ("transformer.context_embedder", Kind.LINEAR),
        ("time_text_embed.text_embedder.linear_1", Kind.LINEAR),
        ("embed_out", Kind.LINEAR),
        ("model.embed_tokens", Kind.EMBEDDING),
        ("embeddings.position_embedding", Kind.EMBEDDING),
    ],
)
def test_kinds_by_name(module, kind):
    assert kind_of(module, {}) is kind


def test_embedders_of_flux_get_factors_of_linear_modules(tmp_path):
    """``torch.nn.Linear`` in diffusers: PEFT would not find factors of an embedding."""
    weight = np.ones((8, 6), np.float32)
    path = pico.write(tmp_path / "m", {"x_embedder.weight": weight, "proj_out.weight": weight})
    pair = (np.ones((8, 1), np.float32), np.ones((1, 6), np.float32))
    write_adapter(tmp_path / "x", {"x_embedder.weight": pair}, open_checkpoint(path))
    written = open_checkpoint(tmp_path / "x" / "adapter_model.safetensors").tensors
    assert {n: i.shape for n, i in written.items()} == {
        "base_model.model.x_embedder.lora_A.weight": (1, 6),
        "base_model.model.x_embedder.lora_B.weight": (8, 1),
    }
