"""Weights that a model stores once and uses twice: heads tied to embeddings."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jdetune.checkpoint import peft_layout as layout
from jdetune.checkpoint.index import Checkpoint

_HEADS = ("lm_head", "embed_out", "decoder", "output_projection", "output")
_COPIES = ("encoder.embed_tokens", "decoder.embed_tokens")
_SHARED = "shared"


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a model's head is its embedding; transformers' default is that it is.

    Example:
      >>> is_tied({}), is_tied({"tie_word_embeddings": False})
      (True, False)
    """
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    return config.get("tie_word_embeddings", inner) is not False


def tie_pairs(checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """Heads that may be tied, each with the one embedding that it can be tied to.

    Args:
      checkpoints: models under the same names.

    Returns:
      Name of the head to that of the embedding, of the same shape; no pair where several embeddings
      would do.
    """
    shapes = {name: info.shape for c in checkpoints for name, info in c.tensors.items()}
    weights = [n for n, s in shapes.items() if len(s) == 2 and layout.is_targetable(n)]
    embeddings = [n for n in weights if _is_input(layout.module_of(n))]
    pairs: dict[str, str] = {}
    for name in weights:
        module = layout.module_of(name)
        if layout.leaf_of(module) not in _HEADS and not module.endswith(_COPIES):
            continue
        fits = [e for e in embeddings if e != name and shapes[e] == shapes[name]]
        shared = [e for e in fits if layout.leaf_of(layout.module_of(e)) == _SHARED]
        found = shared or [e for e in fits if not layout.module_of(e).endswith(_COPIES)]
        if len(found) == 1:
            pairs[name] = found[0]
    return pairs


def _is_input(module: str) -> bool:
    return layout.leaf_of(module) in layout.TOKEN_EMBEDDINGS


def tied_copies(saved: Sequence[str], checkpoint: Checkpoint) -> dict[str, str]:
    """Tensors that a tied model does not store, which have to be kept whole with its embedding.

    Args:
      saved: tensors that are kept whole.
      checkpoint: the model.

    Returns:
      Name of every tensor that transformers ties to a saved embedding, with the embedding's. Names
      come from the architecture; what a model does not have, PEFT passes over.
    """
    copies: dict[str, str] = {}
    for name in saved if is_tied(checkpoint.config) else ():
        root, _, leaf = layout.module_of(name).rpartition(".")
        if leaf not in layout.TOKEN_EMBEDDINGS:
            continue
        heads = layout.head_modules(checkpoint.config)
        inner = [f"{root}.{copy}".lstrip(".") for copy in _COPIES] if leaf == _SHARED else []
        names = [f"{module}.weight" for module in (*heads, *inner)]
        copies |= {head: name for head in names if head not in checkpoint.tensors}
    return copies


def with_ties(checkpoint: Checkpoint, pairs: Mapping[str, str]) -> Checkpoint:
    """The model with the heads that it lacks because they are tied: they read the embedding."""
    if not is_tied(checkpoint.config):
        return checkpoint
    tensors = dict(checkpoint.tensors)
    for head, embedding in pairs.items():
        if head not in tensors and embedding in tensors:
            info = tensors[embedding]
            tensors[head] = dataclasses.replace(info, name=head, key=info.stored_name)
    return dataclasses.replace(checkpoint, tensors=tensors)


def is_alias(checkpoint: Checkpoint, head: str, embedding: str) -> bool:
    """Whether the head is not in the model's file: it reads the embedding."""
    first, second = checkpoint.tensors.get(head), checkpoint.tensors.get(embedding)
    if first is None or second is None:
        return False
    return (first.file, first.stored_name) == (second.file, second.stored_name)
