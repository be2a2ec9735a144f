"""Updates of matrices that do not write to the residual stream, as the next ones carry them there.

A LoRA on values alone, or on the MLP's inner matrices, leaves the attention output and MLP down as
they are: their difference shows nothing. What the change of a value matrix adds to the residual
stream still lies in the columns of ``W_o B_v``; that of an inner matrix, through gate and
activation neuron by neuron, in directions that those of ``W_down B_up`` are a guess at. Changes of
queries and keys only move attention, and cannot be seen so.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jdetune.errors import InputError
from jdetune.watch.directions import factors_of

#: Ends of paths: the matrix that is changed, and the one that its output goes through.
_NEXT = (
    (r"self_attn\.v_proj$", "self_attn.o_proj"),
    (r"mlp\.(up|gate)_proj$", "mlp.down_proj"),
    (r"attention\.self\.value$", "attention.output.dense"),
    (r"attention\.attention\.value$", "attention.output.dense"),
    (r"intermediate\.dense$", "output.dense"),
)


def carried(
    update: Mapping[str, Any], weights: Mapping[str, Any], head_dim: int | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Updates of the writing matrices, and of those that feed them as they come out there.

    Args:
      update: as `directions` takes factors: name to (B, A) or ``Lora``.
      weights: of the fine-tuned model, by name with ``.weight``, [out, in].
      head_dim: of a head; needed where several heads share a value head.

    Returns:
      Name of each writing matrix to factors (B, A), whose columns of A belong to different inputs;
      for `directions`.

    Raises:
      InputError: a matrix that carries an update is missing, or does not fit it.
    """
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for name in update:
        path = name.removesuffix(".weight")
        left, right = factors_of(update[name], name)
        found.setdefault(f"{path}.weight", [])
        for pattern, last in _NEXT:
            target = f"{re.sub(pattern, last, path)}.weight"
            if target != f"{path}.weight":
                if target not in weights:
                    raise InputError(
                        f"{target}: no such weight, but the update of {path} needs it."
                    )
                through = np.asarray(weights[target], np.float64)
                pair = (through @ _spread(left, through.shape[1], head_dim, name), right)
                found.setdefault(target, []).append(pair)
                break
        else:
            found[f"{path}.weight"].append((left, right))
    return {name: _beside(pairs) for name, pairs in found.items() if pairs}


def _spread(left: np.ndarray, wide: int, head_dim: int | None, name: str) -> np.ndarray:
    """Rows of shared value heads, once for each head that reads them."""
    if len(left) == wide:
        return left
    if head_dim is None or wide % len(left) or len(left) % head_dim:
        raise InputError(f"{name}: heads share values; say head_dim, as config.json has it.")
    heads = left.reshape(-1, head_dim, left.shape[1])
    return np.repeat(heads, wide // len(left), axis=0).reshape(wide, -1)


def _beside(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """One product of several, each with inputs of its own."""
    ranks = [right.shape[0] for _, right in pairs]
    wide = [right.shape[1] for _, right in pairs]
    right = np.zeros((sum(ranks), sum(wide)))
    row = col = 0
    for _, one in pairs:
        right[row : row + one.shape[0], col : col + one.shape[1]] = one
        row, col = row + one.shape[0], col + one.shape[1]
    return np.concatenate([left for left, _ in pairs], axis=1), right
