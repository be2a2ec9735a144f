"""Experts stored one by one: factors made alike, since loaders fuse them into one parameter.

Transformers joins such experts when it loads a model, and PEFT joins their factors likewise: all of
one rank, that of the config's ``r``, and none missing.
"""

import re
from collections.abc import Collection, Mapping

import numpy as np

from jdetune.checkpoint.index import TensorInfo
from jdetune.checkpoint.peft_tensors import Pair

_EXPERT = re.compile(r".*\.experts\.\d+\.(?:.*\.)?([^.]+)\.weight")
#: Projections that are joined with each other.
_FUSED = (("w1", "w3"), ("gate_proj", "up_proj"))


def expert_rank(modules: Mapping[str, Pair]) -> int | None:
    """Largest rank among experts that are stored one by one, None if none has factors."""
    ranks = [pair[0].shape[1] for name, pair in modules.items() if _EXPERT.fullmatch(name)]
    return max(ranks, default=None)


def complete_experts(
    modules: Mapping[str, Pair], tensors: Mapping[str, TensorInfo], without: Collection[str] = ()
) -> dict[str, Pair]:
    """Factors with those of experts padded to one rank, and zeros for experts that have none.

    Args:
      modules: weights with their factors.
      tensors: all weights of the model.
      without: tensors that are kept whole.
    """
    rank = expert_rank(modules)
    if rank is None:
        return dict(modules)
    tuned = {_leaf(name) for name in modules} - {None}
    tuned |= {leaf for group in _FUSED if tuned & set(group) for leaf in group}
    found = dict(modules)
    for name, info in tensors.items():
        if _leaf(name) in tuned and len(info.shape) == 2 and name not in without:
            row, col = info.shape
            left, right = np.zeros((row, rank), np.float32), np.zeros((rank, col), np.float32)
            if name in modules:
                own = modules[name][0].shape[1]
                left[:, :own], right[:own] = modules[name]
            found[name] = (left, right)
    return found


def _leaf(name: str) -> str | None:
    found = _EXPERT.fullmatch(name)
    return found[1] if found else None
