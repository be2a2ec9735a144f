"""Tensor names: every spelling that transformers has used, to the one that jdetune uses.

jdetune's parameters are called as in checkpoints on the hub, without the prefix of a task model
(``bert.``, ``vit.``). transformers 5 renames ViT's and DINOv2's layers in memory, and adapters
trained there have those names; they are understood wherever names are read.
"""

import re

from jdetune.models.bert import Bert
from jdetune.models.llama import Llama
from jdetune.models.vit import ViT

Model = Bert | ViT | Llama

_ATTENTION = [
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
]
_VIT_ONLY = [
    (r"^layers\.", "encoder.layer."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]
_BERT = [
    (r"^bert\.", ""),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
]
_LLAMA = [(r"^(embed_tokens|layers|norm)\.", r"model.\1.")]
#: Tensors that are no part of the arithmetic here: buffers, pretraining heads, a pooler not used.
_UNUSED = re.compile(
    r"(^|\.)(position_ids|inv_freq|mask_token)$|^cls\.|^pooler\.|^decoder\.|^head\."
)


def canonical(module: Model, name: str) -> str:
    """The name that a tensor has here.

    Args:
      module: the model that it belongs to.
      name: as a checkpoint or transformers has it.

    Example:
      >>> from jdetune.models.config import ViTConfig
      >>> canonical(ViT(ViTConfig()), "vit.layers.0.attention.q_proj.weight")
      'encoder.layer.0.attention.attention.query.weight'
    """
    if isinstance(module, ViT):
        rules = [(r"^(vit|dinov2)\.", "")]
        rules += _ATTENTION if module.config.layer_scale else [*_VIT_ONLY, *_ATTENTION]
    else:
        rules = _BERT if isinstance(module, Bert) else _LLAMA
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def canonical_module(module: Model, path: str) -> str:
    """The name that a layer has here, from the one that an adapter has."""
    return canonical(module, f"{path}.weight").removesuffix(".weight")


def is_unused(module: Model, name: str) -> bool:
    """Whether a tensor of a checkpoint plays no part in what the model computes here."""
    tied = isinstance(module, Llama) and module.config.tie_word_embeddings
    headless = not isinstance(module, Llama) and not module.config.labels
    return (
        bool(_UNUSED.search(name))
        or (tied and name == "lm_head.weight")
        or (headless and name.startswith("classifier."))
    )
