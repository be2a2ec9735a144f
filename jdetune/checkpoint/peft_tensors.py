"""LoRA factors as PEFT stores them: keys, orientation and shapes for every kind of module."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdetune.checkpoint import peft_layout as layout
from jdetune.checkpoint.index import TensorInfo
from jdetune.checkpoint.shapes import view_of

#: Left [row, rank] and right [rank, col] of one matrix.
Pair = tuple[np.ndarray, np.ndarray]


def module_tensors(
    info: TensorInfo, pair: Pair, config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Factors of a module's weight: B [out, rank] and A [rank, in], convolutions with kernels.

    Args:
      info: the weight.
      pair: its factors.
      config: contents of config.json.
    """
    left, right = (factor.astype(np.float32) for factor in pair)
    module = layout.module_of(info.name)
    root, view = layout.PREFIX + module, view_of(info)
    if view is not None and view.kind == "conv":
        ones = (1,) * (len(info.shape) - 2)
        right = right.reshape(len(right), *info.shape[1:])
        left = left.reshape(*left.shape, *ones)
        return {f"{root}.lora_A.weight": right, f"{root}.lora_B.weight": left}
    kind = layout.kind_of(module, config)
    if kind is layout.Kind.EMBEDDING:
        return {f"{root}.lora_embedding_A": left.T, f"{root}.lora_embedding_B": right.T}
    if kind is layout.Kind.CONV1D:
        left, right = right.T, left.T
    return {f"{root}.lora_A.weight": right, f"{root}.lora_B.weight": left}


def stack_tensors(
    info: TensorInfo, pairs: Mapping[int, Pair], depth: int, config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Factors of stacked experts (PEFT's ``target_parameters``), padded to one rank.

    A is [expert * rank, in], expert by expert; B is [out, rank * expert], rank by rank.

    Args:
      info: the parameter, [expert, row, col].
      pairs: factors by expert; experts without any are zero.
      depth: how many wrappers of other parameters lie around this one's.
      config: contents of config.json.
    """
    count, row, col = info.shape
    rank = max(pair[0].shape[1] for pair in pairs.values())
    left = np.zeros((count, row, rank), np.float32)
    right = np.zeros((count, rank, col), np.float32)
    for index, pair in pairs.items():
        left[index, :, : pair[0].shape[1]] = pair[0]
        right[index, : pair[1].shape[0]] = pair[1]
    if layout.is_transposed(config):
        left, right = right.transpose(0, 2, 1), left.transpose(0, 2, 1)
    root = layout.PREFIX + layout.module_of(info.name) + ".base_layer" * depth
    out, inner = left.shape[1], right.shape[2]
    return {
        f"{root}.lora_A.weight": right.reshape(count * rank, inner),
        f"{root}.lora_B.weight": left.transpose(1, 2, 0).reshape(out, rank * count),
    }


def unstack(
    down: np.ndarray, up: np.ndarray, count: int, transposed: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Left and right of every expert, from PEFT's A and B of stacked experts.

    Args:
      down: A, [expert * rank, in].
      up: B, [out, rank * expert].
      count: number of experts.
      transposed: whether the parameter is [expert, in, out].
    """
    right = down.reshape(count, -1, down.shape[1])
    left = up.reshape(len(up), -1, count).transpose(2, 0, 1)
    pairs = zip(left, right, strict=True)
    return [(a.T, b.T) if transposed else (b, a) for b, a in pairs]


def nesting(names: Sequence[str]) -> dict[str, int] | None:
    """How deep PEFT wraps each parameter of one module; None where its order is not known.

    PEFT goes by the order in which the module defines them, the first innermost; files are sorted
    by name and do not tell.

    Example:
      >>> nesting(["experts.down_proj", "experts.gate_up_proj"])
      {'experts.gate_up_proj': 1, 'experts.down_proj': 0}
      >>> nesting(["experts.a", "experts.b"]) is None
      True
    """
    leaves = [layout.leaf_of(name) for name in names]
    if len(names) > 1 and not set(leaves) <= set(layout.PARAMETER_ORDER):
        return None
    order = sorted(names, key=lambda n: _place(layout.leaf_of(n)))
    return {name: len(order) - 1 - place for place, name in enumerate(order)}


def _place(leaf: str) -> int:
    return layout.PARAMETER_ORDER.index(leaf) if leaf in layout.PARAMETER_ORDER else 0
