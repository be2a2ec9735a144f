"""What the benchmark works on: a weight matrix and the LoRA updates of many models."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np
from jaxtyping import Float

#: Storage dtypes that models can be merged into.
MERGE_DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class Lora:
    """One model's update of a layer: ``alpha / rank * left @ right``.

    Attributes:
      name: of the model.
      rank: as published.
      alpha: as published.
      left: B, float32.
      right: A, float32.
    """

    name: str
    rank: int
    alpha: float
    left: Float[np.ndarray, "row rank"]
    right: Float[np.ndarray, "rank col"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weight matrix with the updates of all models.

    Attributes:
      name: of the layer.
      base: weights before fine-tuning, float32.
      loras: one a model.
    """

    name: str
    base: Float[np.ndarray, "row col"]
    loras: tuple[Lora, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """Layers that are read one at a time.

    Attributes:
      names: of all layers, in order.
      models: names of the models.
      read: yields the layers asked for, in order, each read when it is asked for.
      origin: where they come from, in words.
    """

    names: tuple[str, ...]
    models: tuple[str, ...]
    read: Callable[[Sequence[str]], Iterator[Layer]]
    origin: Mapping[str, object]


def merge(
    layer: Layer, models: Sequence[int], dtype: str = "float32"
) -> tuple[Float[np.ndarray, "row col"], Float[np.ndarray, "model row col"]]:
    """The true base and the merged models, as stored in a dtype.

    In float32 as the paper's published code does: ``W + (alpha / rank * B) @ A``. In 16 bits the
    base is rounded first and the sum in float32 rounded once (R1), as PEFT does.

    Args:
      layer: base and updates.
      models: which models.
      dtype: a key of ``MERGE_DTYPES``.

    Example:
      >>> one = Lora("a", 1, 2.0, np.ones((2, 1), np.float32), np.ones((1, 2), np.float32))
      >>> merge(Layer("w", np.zeros((2, 2), np.float32), (one,)), [0])[1].tolist()
      [[[2.0, 2.0], [2.0, 2.0]]]
    """
    stored = MERGE_DTYPES[dtype]
    base = layer.base.astype(stored)
    wide = base.astype(np.float32)
    merged = np.empty((len(models), *base.shape), stored)
    for place, model in enumerate(models):
        lora = layer.loras[model]
        scaling = np.float32(lora.alpha / lora.rank)
        if dtype == "float32":
            merged[place] = wide + (scaling * lora.left) @ lora.right
        else:
            merged[place] = (wide + scaling * (lora.left @ lora.right)).astype(stored)
    return base, merged


def kind_of(name: str) -> str:
    """A layer's type: its last words that hold no number, without those that say nothing.

    Example:
      >>> kind_of("encoder.layer.3.attention.self.query.weight")
      'query'
      >>> kind_of("model.layers.7.self_attn.q_proj")
      'q_proj'
    """
    words = [word for word in re.split(r"[.:/]", name) if word]
    silent = {"weight", "lora", "base_layer"}
    told = [word for word in words if word not in silent and not word.isdigit()]
    return told[-1] if told else name


def depth_of(name: str) -> int | None:
    """The first number among a layer's words; None if there is none.

    Example:
      >>> depth_of("model.layers.7.self_attn.q_proj"), depth_of("head")
      (7, None)
    """
    numbers = [int(word) for word in re.split(r"[.:/_]", name) if word.isdigit()]
    return numbers[0] if numbers else None


def spread(names: Sequence[str], count: int | None) -> list[str]:
    """At most ``count`` names across depth and type, in order; all if None.

    Every type gets its share, at equal distances over the depth; the types are staggered, so
    that few layers of many types do not all lie at the same depths.

    Example:
      >>> spread(["0.q", "0.v", "1.q", "1.v", "2.q", "2.v"], 4)
      ['0.q', '0.v', '2.q', '2.v']
    """
    if count is None or count >= len(names):
        return list(names)
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    if len(kinds) > count:
        places = np.linspace(0, len(names) - 1, count).round().astype(int)
        return [names[int(place)] for place in places]
    shares = dict.fromkeys(kinds, 0)
    while sum(shares.values()) < count:  # one more for every type in turn, as far as it has some
        for kind, own in kinds.items():
            if shares[kind] < len(own) and sum(shares.values()) < count:
                shares[kind] += 1
    chosen: set[str] = set()
    for place, (kind, own) in enumerate(kinds.items()):
        share = shares[kind]
        if share == 1:
            where = [round(place * (len(own) - 1) / max(1, len(kinds) - 1))]
        else:
            where = np.linspace(0, len(own) - 1, share).round().astype(int).tolist()
        chosen |= {own[at] for at in where}
    return [name for name in names if name in chosen]
