"""What kohya's and diffusers' adapter files have in common: which updates they hold, and cards."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdetune.checkpoint import pipeline_folder
from jdetune.checkpoint.adapters import RECOVERED_BASE, AdapterFiles, Factors
from jdetune.checkpoint.index import Checkpoint
from jdetune.checkpoint.slots import Piece, Slot, pieces, slots_of
from jdetune.checkpoint.writer import save_safetensors, save_text

#: What kohya's and diffusers' files hold.
ONLY = (
    "only low-rank updates of linear and convolutional modules of the denoiser and of CLIP text "
    "encoders"
)
_CARD = """\
---
library_name: diffusers
base_model: {base}
tags:
- lora
- jdetune
---

# {name}

LoRA factors that jdetune took out of a merged model. Load them on {which}:

```python
from diffusers import DiffusionPipeline{more}

{load}
pipe.load_lora_weights("PATH/adapters/{name}", weight_name="{file}")
```

{n_modules} module(s), ranks {low} to {high}. The scale of LoRA cannot be known from merged weights,
so alpha equals the rank in every module.{shared}
"""
_COMPONENT_CARD = """\
---
library_name: peft
base_model: {base}
tags:
- lora
- jdetune
---

# {name}

LoRA factors that jdetune took out of one component of a merged pipeline:

```python
from {library} import {kind}
from peft import PeftModel

base = {kind}.from_pretrained("{base}")  # a path from this folder
model = PeftModel.from_pretrained(base, "PATH/adapters/{name}")
```
"""


def held_pieces(
    factors: Factors,
    checkpoint: Checkpoint,
    whole: Collection[str],
    has_name: Callable[[Slot], bool],
) -> tuple[dict[str, list[Piece]], tuple[str, ...]]:
    """Splits updates into those that a file can hold, by tensor, and names that it leaves out.

    Args:
      factors: tensor name to left and right; rank 0 is left out.
      checkpoint: the merged model.
      whole: tensors that the base lacks; such files hold low-rank factors only.
      has_name: whether a slot has a name in the file.

    Returns:
      Pieces of every tensor held, and what is left out. Where there is no update at all, a rank-1
      update of zeros on one module: loaders refuse an empty file.
    """
    table = {n: s for n, s in slots_of(checkpoint).items() if all(map(has_name, s))}
    nonzero = {n: f for n, f in factors.items() if f[0].shape[1] > 0 and n not in whole}
    kept = {name: pair for name, pair in nonzero.items() if name in table}
    if not kept and table:
        name = next((n for n in factors if n in table), next(iter(table)))
        kept = {name: _zeros(checkpoint.tensors[name].shape)}
    for name in _missing_outputs(kept, table):
        kept[name] = _zeros(checkpoint.tensors[name].shape)
    held = {
        name: list(pieces(name, left, right, checkpoint.tensors[name].shape, table[name]))
        for name, (left, right) in kept.items()
    }
    absent = [n for n in whole if n in checkpoint.tensors]
    return held, (*(n for n in nonzero if n not in kept), *absent)


def write_file(
    path: Path,
    factors: Factors,
    checkpoint: Checkpoint,
    whole: tuple[str, ...],
    base: str,
    kind: str,
    has_name: Callable[[Slot], bool],
    content: Callable[[dict[str, list[Piece]]], tuple[dict[str, np.ndarray], dict[str, str]]],
) -> AdapterFiles:
    """Writes the one file of an adapter, and its card beside it.

    Args:
      path: the file.
      factors: tensor name to left and right.
      checkpoint: the merged model.
      whole: tensors that the base lacks; the file cannot hold them.
      base: what the card names as the base.
      kind: what to call such a file.
      has_name: whether a slot has a name in it.
      content: tensors and header text of what it holds.

    Returns:
      Which tensors went where.
    """
    held, left_out = held_pieces(factors, checkpoint, whole, has_name)
    save_safetensors(path, *content(held))
    save_card(path.parent, path.name, held, checkpoint, base)
    reasons = dict.fromkeys(left_out, f"a {kind} file holds {ONLY}")
    return AdapterFiles(path.parent, tuple(held), left_out, (), reasons)


def _zeros(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A rank-1 update of zeros."""
    col = int(np.prod(shape[1:]))
    return np.zeros((shape[0], 1), np.float32), np.zeros((1, col), np.float32)


def _missing_outputs(
    kept: Collection[str], table: Mapping[str, tuple[Slot, ...]]
) -> tuple[str, ...]:
    """The first attention output of every text encoder that has updates, but none of an output.

    diffusers 0.42 tells a text encoder's keys by its outputs, and refuses a file without them.
    """
    found = []
    for component in dict.fromkeys(table[name][0].component for name in kept):
        names = [n for n, s in table.items() if s[0].component == component]
        outputs = [n for n in names if str(table[n][0].module).endswith(".self_attn.out_proj")]
        if component.startswith("text_encoder") and outputs and not set(outputs) & set(kept):
            found.append(outputs[0])
    return tuple(found)


def save_component_card(folder: Path, config: Mapping[str, Any], base: str) -> None:
    """Writes the README.md of a PEFT folder for one component of a pipeline."""
    kind = str(config.get("_class_name") or (config.get("architectures") or ["AutoModel"])[0])
    library = "diffusers" if "_class_name" in config else "transformers"
    text = _COMPONENT_CARD.format(
        base=base, name=f"{folder.parent.name}/{folder.name}", kind=kind, library=library
    )
    save_text(folder / "README.md", text)


def ranks_of(held: dict[str, list[Piece]]) -> list[int]:
    """Rank of every module."""
    return [len(piece.down) for own in held.values() for piece in own]


def save_card(
    folder: Path, file: str, held: dict[str, list[Piece]], checkpoint: Checkpoint, base: str
) -> None:
    """Writes the README.md of an adapter folder."""
    ranks = ranks_of(held) or [0]
    recovered = base == RECOVERED_BASE
    where = "PATH/base" if recovered else base
    load, more = f'pipe = DiffusionPipeline.from_pretrained("{where}")', ""
    if not pipeline_folder.is_pipeline(checkpoint):
        if checkpoint.path.is_file():
            kind = "StableDiffusionPipeline"
            path = f"{where}/model.safetensors" if recovered else where
            load, more = f'pipe = {kind}.from_single_file("{path}")', f", {kind}"
        else:
            load = f'pipe = DiffusionPipeline.from_pretrained("PIPELINE")  # with {where} in it'
    text = _CARD.format(
        base=base,
        name=folder.name,
        file=file,
        load=load,
        more=more,
        n_modules=len(ranks_of(held)),
        low=min(ranks),
        high=max(ranks),
        which="the recovered base" if recovered else "the base that it was compared with",
        shared=" What all models had in common is part of the base." if recovered else "",
    )
    save_text(folder / "README.md", text)
