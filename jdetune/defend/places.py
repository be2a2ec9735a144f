"""Where a model's coordinates are free: inner vectors that can be written in another basis.

An inner vector z is made by some matrices (their rows) and read by others (their columns). If
those that make it are multiplied by an invertible T and those that read it by its inverse, the
model computes what it did. Which T are free depends on what is done with z in between: nothing
between values and attention output, so any T of a head; an activation of every unit in an MLP, so
permutations; rotary positions between queries and keys, so what commutes with their rotations.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from jdetune.models.bert import Bert
from jdetune.models.llama import Llama
from jdetune.models.names import Model
from jdetune.models.params import layout

#: order: any permutation. mix: any invertible matrix in every head. turn: in every head, pairs of
#: coordinates as rotary positions take them, each turned and stretched. scale: any factor.
Kind = Literal["order", "mix", "turn", "scale"]


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of a tensor that is written in a place's coordinates.

    Attributes:
      name: of the tensor.
      axis: 0 for rows and vectors, 1 for columns.
      dual: takes the inverse transpose of T, not T.
      repeat: heads of this tensor that share one head of the place.
    """

    name: str
    axis: int = 0
    dual: bool = False
    repeat: int = 1


@dataclasses.dataclass(frozen=True)
class Place:
    """An inner vector whose coordinates are free.

    Attributes:
      name: the layer and what it is.
      kind: which changes are free.
      heads: parts that are changed apart; of one coordinate each for ``order`` and ``scale``.
      size: coordinates of a head.
      axes: the tensors written in them.
    """

    name: str
    kind: Kind
    heads: int
    size: int
    axes: tuple[Axis, ...]

    @property
    def blocks(self) -> int:
        """Number of square blocks on T's diagonal."""
        return self.heads * self.size // 2 if self.kind == "turn" else self.heads

    @property
    def side(self) -> int:
        """Side of a block."""
        return 2 if self.kind == "turn" else self.size


def places(module: Model) -> tuple[Place, ...]:
    """Every free place of a model, norms before what reads them.

    Args:
      module: BERT, ViT, DINOv2 or a Llama-type decoder.

    Example:
      >>> from jdetune.models import Bert, BertConfig
      >>> small = BertConfig(
      ...     hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
      ... )
      >>> [(place.kind, place.heads, place.size) for place in places(Bert(small))]
      [('mix', 2, 4), ('mix', 2, 4), ('order', 16, 1)]
    """
    names = layout(module)
    found = []
    for place in _every(module):
        axes = tuple(axis for axis in place.axes if axis.name in names)
        if any(axis.dual for axis in axes):  # without layer scale there is no such place
            found.append(dataclasses.replace(place, axes=axes))
    return tuple(found)


def gather(place: Place, axis: Axis, tensor: np.ndarray) -> np.ndarray:
    """A tensor as blocks of a place's coordinates: float64 [block, repeat, side, other]."""
    rows = np.asarray(tensor).astype(np.float64)
    rows = rows[:, None] if rows.ndim == 1 else np.moveaxis(rows, axis.axis, 0)
    other = rows.shape[1]
    if place.kind != "turn":
        return rows.reshape(place.heads, axis.repeat, place.size, other)
    pairs = rows.reshape(place.heads, axis.repeat, 2, place.size // 2, other)
    return pairs.transpose(0, 3, 1, 2, 4).reshape(place.blocks, axis.repeat, 2, other)


def scatter(place: Place, axis: Axis, blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `gather`: float64 of the tensor's shape."""
    other = blocks.shape[-1]
    if place.kind == "turn":
        half = place.size // 2
        blocks = blocks.reshape(place.heads, half, axis.repeat, 2, other).transpose(0, 2, 3, 1, 4)
    rows = blocks.reshape(-1, other)
    return rows.reshape(shape) if len(shape) == 1 else np.moveaxis(rows, 0, axis.axis)


def _every(module: Model) -> Iterator[Place]:
    """All places, with tensors that the model may lack."""
    if isinstance(module, Bert):
        for index in range(module.config.num_hidden_layers):
            yield from _bert_block(module, f"encoder.layer.{index}.")
    elif isinstance(module, Llama):
        for index in range(module.config.num_hidden_layers):
            yield from _llama_block(module, f"model.layers.{index}.")
        if not module.config.tie_word_embeddings:
            yield _norm("model.norm", ("lm_head",), module.config.hidden_size)
    else:
        for index in range(module.config.num_hidden_layers):
            yield from _vit_block(module, f"encoder.layer.{index}.")


def _bert_block(module: Bert, at: str) -> Iterator[Place]:
    c = module.config
    size = c.hidden_size // c.num_attention_heads
    own = f"{at}attention.self."
    yield _heads(f"{own}value", "mix", c.num_attention_heads, size, f"{at}attention.output.dense")
    yield _pairs(f"{own}query", f"{own}key", "mix", c.num_attention_heads, size)
    yield _units((f"{at}intermediate.dense",), f"{at}output.dense", c.intermediate_size)


def _vit_block(module: Model, at: str) -> Iterator[Place]:
    c = module.config
    size, deep = c.hidden_size // c.num_attention_heads, getattr(c, "layer_scale", False)
    before, after = ("norm1", "norm2") if deep else ("layernorm_before", "layernorm_after")
    up, down = ("mlp.fc1", "mlp.fc2") if deep else ("intermediate.dense", "output.dense")
    own, out = f"{at}attention.attention.", f"{at}attention.output.dense"
    readers = tuple(f"{own}{part}" for part in ("query", "key", "value"))
    yield _norm(f"{at}{before}", readers, c.hidden_size)
    yield _norm(f"{at}{after}", (f"{at}{up}",), c.hidden_size)
    yield _layer_scale(f"{at}layer_scale1.lambda1", out, c.hidden_size)
    yield _layer_scale(f"{at}layer_scale2.lambda1", f"{at}{down}", c.hidden_size)
    yield _heads(f"{own}value", "mix", c.num_attention_heads, size, out)
    yield _pairs(f"{own}query", f"{own}key", "mix", c.num_attention_heads, size)
    yield _units((f"{at}{up}",), f"{at}{down}", c.intermediate_size)


def _llama_block(module: Llama, at: str) -> Iterator[Place]:
    c = module.config
    own, mlp, groups = f"{at}self_attn.", f"{at}mlp.", c.num_key_value_heads
    shared = c.num_attention_heads // groups
    readers = tuple(f"{own}{part}_proj" for part in "qkv")
    yield _norm(f"{at}input_layernorm", readers, c.hidden_size)
    both = (f"{mlp}gate_proj", f"{mlp}up_proj")
    yield _norm(f"{at}post_attention_layernorm", both, c.hidden_size)
    yield _heads(f"{own}v_proj", "mix", groups, c.head_dim, f"{own}o_proj", shared)
    yield _pairs(f"{own}k_proj", f"{own}q_proj", "turn", groups, c.head_dim, shared)
    yield _units(both, f"{mlp}down_proj", c.intermediate_size)
    scaled = (*_rows(f"{mlp}up_proj"), Axis(f"{mlp}down_proj.weight", 1, dual=True))
    yield Place(f"{mlp}up_proj", "scale", c.intermediate_size, 1, scaled)


def _rows(path: str, dual: bool = False, repeat: int = 1) -> tuple[Axis, Axis]:
    """Rows of a matrix, and its bias."""
    return Axis(f"{path}.weight", 0, dual, repeat), Axis(f"{path}.bias", 0, dual, repeat)


def _heads(value: str, kind: Kind, heads: int, size: int, out: str, repeat: int = 1) -> Place:
    axes = (*_rows(value), Axis(f"{out}.weight", 1, True, repeat))
    return Place(value, kind, heads, size, axes)


def _pairs(one: str, two: str, kind: Kind, heads: int, size: int, repeat: int = 1) -> Place:
    return Place(one, kind, heads, size, (*_rows(one), *_rows(two, True, repeat)))


def _units(makers: tuple[str, ...], reader: str, units: int) -> Place:
    axes = [axis for maker in makers for axis in _rows(maker)]
    return Place(makers[0], "order", units, 1, (*axes, Axis(f"{reader}.weight", 1, dual=True)))


def _norm(norm: str, readers: tuple[str, ...], width: int) -> Place:
    axes = tuple(Axis(f"{reader}.weight", 1, dual=True) for reader in readers)
    return Place(norm, "scale", width, 1, (*_rows(norm), *axes))


def _layer_scale(factor: str, writer: str, width: int) -> Place:
    return Place(factor, "scale", width, 1, (*_rows(writer), Axis(factor, 0, dual=True)))
