"""Which matrices write to the residual stream, by the names that checkpoints give them."""

import re
from typing import NamedTuple

#: What a matrix ends, in the order of a block.
MATRICES = ("attention", "mlp")
_ATTENTION = re.compile(
    r"(self_attn\.(o_proj|out_proj|dense)|attention\.(output\.dense|o_proj|dense|wo)"
    r"|self_attention\.dense|attn\.(c_proj|out_proj|proj))$"
)
_MLP = re.compile(
    r"(mlp\.(down_proj|c_proj|fc2|fc_out|dense_4h_to_h)|(?<!attention\.)output\.dense"
    r"|feed_forward\.w2|layers?\.\d+\.fc2)$"
)
#: Kernels of Flax, and the Conv1D of GPT-2, are stored [in, out].
_TRANSPOSED = re.compile(r"(\.kernel|\.c_proj(\.weight)?)$")


class Writer(NamedTuple):
    """A matrix that writes to the residual stream.

    Attributes:
      layer: number of its block.
      matrix: one of `MATRICES`.
      transposed: stored [in, out], so its columns are read and its rows are written.
    """

    layer: int
    matrix: str
    transposed: bool


def writer(name: str) -> Writer | None:
    """What a matrix is by its name; None for one that does not write to the residual stream.

    Args:
      name: of a tensor or layer, its parts separated by dots or slashes.

    Example:
      >>> writer("model.layers.3.mlp.down_proj.weight")
      Writer(layer=3, matrix='mlp', transposed=False)
      >>> writer("encoder.layer.0.attention.output.dense.kernel").transposed
      True
      >>> writer("model.layers.3.mlp.up_proj.weight") is None
      True
    """
    dotted = name.replace("/", ".")
    path = re.sub(r"\.(weight|kernel)$", "", dotted)
    number = re.search(r"(?:^|[._])(\d+)\.", path)
    if number is None:
        return None
    transposed = _TRANSPOSED.search(dotted) is not None
    for matrix, pattern in zip(MATRICES, (_ATTENTION, _MLP), strict=True):
        if pattern.search(path):
            return Writer(int(number[1]), matrix, transposed)
    return None
