"""Writes PEFT adapter folders from factors: config, weights and a card."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdetune.checkpoint import peft_layout as layout
from jdetune.checkpoint.index import Checkpoint
from jdetune.checkpoint.peft_tensors import Pair, module_tensors, stack_tensors
from jdetune.checkpoint.placement import Placement, place
from jdetune.checkpoint.shapes import view_of, whole_of
from jdetune.checkpoint.ties import is_tied, tied_copies
from jdetune.checkpoint.writer import save_json, save_safetensors, save_text
from jdetune.deferred import Deferred

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
#: Name of a matrix (a tensor, or ``NAME[i]`` of a stack) to left [row, rank] and right [rank, col].
Factors = Mapping[str, Pair]

_CARD = """\
---
library_name: peft
base_model: {base}
tags:
- lora
- jdetune
---

# {name}

LoRA factors that jdetune took out of a merged model. Load them on {which}:

```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained("{where}")
model = PeftModel.from_pretrained(base, "PATH/adapters/{name}")
```

{n_layers} layers, ranks {low} to {high}. The scale of LoRA cannot be known from merged weights, so
`lora_alpha` equals the rank in every layer.{shared}{notes}
"""
_RESIZED = """

Its vocabulary has {rows} entries, not the base's {common}: call
`base.resize_token_embeddings({rows})` before the adapter is loaded."""
_TIED = """

The head is tied to the embedding, which has factors: call `model.merge_and_unload()` before use,
since PEFT applies them to the head only when they are merged."""
RECOVERED_BASE = "../../base"
#: Heads the part of a card that says what to do beyond loading; it comes last.
NOTES_HEAD = "## Before use"


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """What was written for one model.

    Attributes:
      path: the adapter's folder.
      targets: tensors that carry factors.
      left_out: tensors with an update that PEFT cannot hold.
      saved: tensors kept whole, through ``modules_to_save``.
      reasons: why each of them is left out.
    """

    path: Path
    targets: tuple[str, ...]
    left_out: tuple[str, ...]
    saved: tuple[str, ...]
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write_adapter(
    path: str | Path,
    factors: Factors,
    checkpoint: Checkpoint,
    per_model: tuple[str, ...] = (),
    base: str = RECOVERED_BASE,
    revision: str | None = None,
) -> AdapterFiles:
    """Writes one model's adapter.

    Args:
      path: folder to write.
      factors: tensor name to left and right; rank 0 is left out.
      checkpoint: the merged model; gives module names, config and tensors kept whole.
      per_model: tensors that the base lacks; their modules are kept whole.
      base: ``base_model_name_or_path``.
      revision: the base's commit, where it is a model of the hub.

    Returns:
      Which tensors went where.
    """
    path = Path(path)
    placed = place(factors, checkpoint, per_model)
    if not (placed.modules or placed.stacks or placed.saved):
        placed = dataclasses.replace(placed, modules=_zero_update(factors, checkpoint))
    infos, config = checkpoint.tensors, checkpoint.config
    tensors: dict[str, np.ndarray | Deferred] = {}
    for name, pair in placed.modules.items():
        tensors.update(module_tensors(infos[name], pair, config))
    for name, pairs in placed.stacks.items():
        tensors.update(stack_tensors(infos[name], pairs, placed.depths[name], config))
    tensors.update({layout.PREFIX + n: whole_of(checkpoint, n) for n in placed.saved})
    for name, source in tied_copies(placed.saved, checkpoint).items():
        tensors[layout.PREFIX + name] = tensors[layout.PREFIX + source]
        placed = dataclasses.replace(placed, whole={*placed.whole, layout.module_of(name)})
    tensors = {layout.loaded_name(key, config): array for key, array in tensors.items()}
    save_safetensors(path / WEIGHTS_NAME, tensors)
    said = _config(placed, checkpoint, base) | ({"revision": revision} if revision else {})
    save_json(path / CONFIG_NAME, said, sort_keys=True)
    card = _card(path.name, placed.ranks, base, config, _notes(placed, checkpoint))
    save_text(path / "README.md", card)
    targets = (*placed.modules, *placed.stacks)
    left_out = placed.left_out
    return AdapterFiles(path, targets, tuple(left_out), placed.saved, left_out)


def _zero_update(factors: Factors, checkpoint: Checkpoint) -> dict[str, Pair]:
    """A rank-1 update of zeros on one module: PEFT loads no adapter without a target."""
    views = {n: view_of(info) for n, info in checkpoint.tensors.items()}
    usable = [n for n, view in views.items() if view is not None and view.kind == "matrix"]
    name = next((n for n in [*factors, *usable] if n in usable and layout.is_targetable(n)), None)
    if name is None:
        return {}
    row, col = checkpoint.tensors[name].shape
    return {name: (np.zeros((row, 1), np.float32), np.zeros((1, col), np.float32))}


def _config(placed: Placement, checkpoint: Checkpoint, base: str) -> dict[str, Any]:
    loaded = functools.partial(layout.loaded_name, config=checkpoint.config)
    modules = set(map(loaded, layout.all_modules(checkpoint)))
    ranks = {loaded(name): rank for name, rank in placed.ranks.items()}
    top = placed.main_rank
    pattern = {layout.pattern_key(m, modules): r for m, r in ranks.items() if r != top}
    paths = [loaded(layout.module_of(name)) for name in placed.modules]
    whole = sorted(map(loaded, placed.whole))
    kinds = {layout.kind_of(module, checkpoint.config) for module in paths}
    # PEFT wants at least one target; a module that is kept whole is never made a LoRA layer
    targets = layout.target_modules(paths, modules)
    if not (targets or placed.stacks):
        targets = whole
    return {
        "peft_type": "LORA",
        "task_type": layout.task_type(checkpoint.config),
        "base_model_name_or_path": base,
        "r": top,
        "lora_alpha": top,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": targets,
        "target_parameters": sorted(map(loaded, placed.stacks)) or None,
        "modules_to_save": whole or None,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": layout.Kind.CONV1D in kinds,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _notes(placed: Placement, checkpoint: Checkpoint) -> str:
    """What a user has to do beyond loading."""
    infos = [checkpoint.tensors[name] for name in placed.saved]
    sizes = {(i.whole[0], i.shape[0]) for i in infos if i.whole is not None}
    notes = [_RESIZED.format(rows=rows, common=common) for rows, common in sorted(sizes)]
    leaves = [layout.leaf_of(layout.module_of(name)) for name in placed.modules]
    if is_tied(checkpoint.config) and set(leaves) & set(layout.TOKEN_EMBEDDINGS):
        notes.append(_TIED)
    return "".join(["\n\n", NOTES_HEAD, *notes]) if notes else ""


def _card(
    name: str, ranks: Mapping[str, int], base: str, config: Mapping[str, Any], notes: str = ""
) -> str:
    auto = {
        "CAUSAL_LM": "AutoModelForCausalLM",
        "SEQ_CLS": "AutoModelForSequenceClassification",
        "TOKEN_CLS": "AutoModelForTokenClassification",
        "QUESTION_ANS": "AutoModelForQuestionAnswering",
        "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    }.get(layout.task_type(config) or "", "AutoModel")
    values = list(ranks.values()) or [0]
    recovered = base == RECOVERED_BASE
    return _CARD.format(
        base=base,
        name=name,
        auto=auto,
        n_layers=len(ranks),
        low=min(values),
        notes=notes,
        high=max(values),
        which="the recovered base" if recovered else "the base that it was compared with",
        where="PATH/base" if recovered else base,
        shared=" What all models had in common is part of the base." if recovered else "",
    )
