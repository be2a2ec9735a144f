"""Writes PEFT adapter folders from factors: config, weights and a card."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdetune.checkpoint import peft_layout as layout
from jdetune.checkpoint.index import Checkpoint
from jdetune.checkpoint.reader import read_tensor
from jdetune.checkpoint.writer import save_json, save_safetensors, save_text

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
#: Tensor name to (left [row, rank], right [rank, col]).
Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]

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
`lora_alpha` equals the rank in every layer.{shared}
"""
_RECOVERED_BASE = "../../base"


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """What was written for one model.

    Attributes:
      path: the adapter's folder.
      targets: tensors that carry factors.
      left_out: tensors with an update that PEFT cannot hold (not a module's ``weight``).
      saved: tensors kept whole, through ``modules_to_save``.
    """

    path: Path
    targets: tuple[str, ...]
    left_out: tuple[str, ...]
    saved: tuple[str, ...]


def write_adapter(
    path: str | Path,
    factors: Factors,
    checkpoint: Checkpoint,
    per_model: tuple[str, ...] = (),
    base: str = _RECOVERED_BASE,
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
    modules = layout.all_modules(checkpoint)
    whole = {layout.module_of(name) for name in per_model} - {""}
    saved = tuple(n for n in checkpoint.tensors if layout.module_of(n) in whole)
    nonzero = {n: f for n, f in factors.items() if f[0].shape[1] > 0 and n not in saved}
    kept = {name: pair for name, pair in nonzero.items() if layout.is_targetable(name)}
    if not kept and not saved:
        kept = _zero_update(factors, checkpoint)
    tensors: dict[str, np.ndarray] = {}
    for name, (left, right) in kept.items():
        tensors.update(_lora_tensors(layout.module_of(name), left, right, checkpoint.config))
    tensors.update({layout.PREFIX + name: read_tensor(checkpoint, name) for name in saved})
    ranks = {layout.module_of(name): pair[0].shape[1] for name, pair in kept.items()}
    config = _config(ranks, whole, modules, checkpoint.config, base)
    config |= {"revision": revision} if revision else {}
    save_safetensors(path / WEIGHTS_NAME, tensors)
    save_json(path / CONFIG_NAME, config, sort_keys=True)
    save_text(path / "README.md", _card(path.name, ranks, base, checkpoint.config))
    root = tuple(n for n in per_model if not layout.module_of(n))
    left_out = tuple(name for name in nonzero if name not in kept) + root
    return AdapterFiles(path, tuple(kept), left_out, saved)


def _zero_update(
    factors: Factors, checkpoint: Checkpoint
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A rank-1 update of zeros on one module: PEFT loads no adapter without a target."""
    matrices = [n for n, info in checkpoint.tensors.items() if info.is_matrix]
    name = next((n for n in [*factors, *matrices] if layout.is_targetable(n)), None)
    if name is None:
        return {}
    row, col = checkpoint.tensors[name].shape
    return {name: (np.zeros((row, 1), np.float32), np.zeros((1, col), np.float32))}


def _lora_tensors(
    module: str, left: np.ndarray, right: np.ndarray, config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """PEFT's keys and orientation: B [out, rank] and A [rank, in]."""
    left, right = left.astype(np.float32), right.astype(np.float32)
    kind = layout.kind_of(module, config)
    root = layout.PREFIX + module
    if kind is layout.Kind.EMBEDDING:
        return {f"{root}.lora_embedding_A": left.T, f"{root}.lora_embedding_B": right.T}
    if kind is layout.Kind.CONV1D:
        left, right = right.T, left.T
    return {f"{root}.lora_A.weight": right, f"{root}.lora_B.weight": left}


def _config(
    ranks: Mapping[str, int],
    whole: set[str],
    modules: set[str],
    config: Mapping[str, Any],
    base: str,
) -> dict[str, Any]:
    top = max(ranks.values(), default=1)
    pattern = {layout.pattern_key(m, modules): r for m, r in ranks.items() if r != top}
    kinds = {layout.kind_of(module, config) for module in ranks}
    # PEFT wants at least one target; a module that is kept whole is never made a LoRA layer
    targets = layout.target_modules(list(ranks), modules) or sorted(whole)
    return {
        "peft_type": "LORA",
        "task_type": layout.task_type(config),
        "base_model_name_or_path": base,
        "r": top,
        "lora_alpha": top,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": targets,
        "modules_to_save": sorted(whole) or None,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": layout.Kind.CONV1D in kinds,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _card(name: str, ranks: Mapping[str, int], base: str, config: Mapping[str, Any]) -> str:
    auto = {
        "CAUSAL_LM": "AutoModelForCausalLM",
        "SEQ_CLS": "AutoModelForSequenceClassification",
        "TOKEN_CLS": "AutoModelForTokenClassification",
        "QUESTION_ANS": "AutoModelForQuestionAnswering",
        "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    }.get(layout.task_type(config) or "", "AutoModel")
    values = list(ranks.values()) or [0]
    recovered = base == _RECOVERED_BASE
    return _CARD.format(
        base=base,
        name=name,
        auto=auto,
        n_layers=len(ranks),
        low=min(values),
        high=max(values),
        which="the recovered base" if recovered else "the base that it was compared with",
        where="PATH/base" if recovered else base,
        shared=" What all models had in common is part of the base." if recovered else "",
    )
