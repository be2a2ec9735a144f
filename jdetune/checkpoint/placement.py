"""Where a model's updates go in a PEFT adapter: factors of modules or parameters, whole copies."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

from jdetune.checkpoint import peft_layout as layout
from jdetune.checkpoint.experts import complete_experts, expert_rank
from jdetune.checkpoint.index import Checkpoint
from jdetune.checkpoint.peft_tensors import Pair, nesting
from jdetune.checkpoint.shapes import View, locate, view_of

#: Share of a model's parameters that a container may hold to be kept whole for one tensor of it.
LARGEST_CONTAINER = 0.25
BARE = "PEFT holds weights of modules and stacked experts only, in the base's shapes"
_ORDER = "several parameters of one module, in an order that the file does not tell and PEFT needs"
_ROOT = "it lies outside of any module, or in one that holds most of the model"


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where every tensor of one model goes.

    Attributes:
      modules: weights of modules, with their factors.
      stacks: stacked parameters, with factors by slice.
      depths: how deep PEFT wraps each stacked parameter.
      whole: modules that are kept whole.
      saved: tensors of these.
      left_out: tensors that PEFT cannot hold, each with the reason.
    """

    modules: Mapping[str, Pair]
    stacks: Mapping[str, Mapping[int, Pair]]
    depths: Mapping[str, int]
    whole: Collection[str]
    saved: tuple[str, ...]
    left_out: Mapping[str, str]

    @property
    def main_rank(self) -> int:
        """The config's ``r``: the experts' rank, where they are stored one by one."""
        return expert_rank(self.modules) or max(self.ranks.values(), default=1)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every target, by module path or by a parameter's name."""
        ranks = {layout.module_of(n): pair[0].shape[1] for n, pair in self.modules.items()}
        for name, pairs in self.stacks.items():
            ranks[name] = max(pair[0].shape[1] for pair in pairs.values())
        return ranks


def place(
    factors: Mapping[str, Pair], checkpoint: Checkpoint, per_model: Sequence[str] = ()
) -> Placement:
    """Sorts a model's updates by what PEFT can do with them.

    Args:
      factors: matrix name to left and right; rank 0 is left out.
      checkpoint: the merged model.
      per_model: tensors to keep whole.
    """
    tensors = checkpoint.tensors
    modules: dict[str, Pair] = {}
    stacks: dict[str, dict[int, Pair]] = {}
    left_out: dict[str, str] = {}
    whole = list(per_model)
    for unit, pair in factors.items():
        name, index = locate(tensors, unit)
        view = view_of(tensors[name])
        if pair[0].shape[1] == 0:
            continue
        if index is not None:
            stacks.setdefault(name, {})[index] = pair
        elif not layout.is_targetable(name):
            left_out[name] = BARE
        elif view is not None and _is_depthwise(view, tensors[name].shape):
            whole.append(name)
        else:
            modules[name] = pair
    kept, unkept = keep_whole(checkpoint, whole)
    saved = tuple(n for n in tensors if _is_inside(n, kept))
    left_out |= unkept
    depths: dict[str, int] = {}
    for parent in dict.fromkeys(map(layout.module_of, stacks)):
        names = [n for n in stacks if layout.module_of(n) == parent and n not in saved]
        fits = all(len(tensors[n].shape) == 3 and tensors[n].shape[0] > 1 for n in names)
        found = nesting(names) if parent and fits else None
        if found is None:
            left_out |= dict.fromkeys(names, _ORDER if parent and fits else BARE)
        else:
            depths |= found
    kept_factors = {n: pair for n, pair in modules.items() if n not in saved}
    return Placement(
        modules=complete_experts(kept_factors, tensors, saved),
        stacks={n: stacks[n] for n in depths},
        depths=depths,
        whole=kept,
        saved=saved,
        left_out={n: why for n, why in left_out.items() if n not in saved},
    )


def keep_whole(checkpoint: Checkpoint, names: Sequence[str]) -> tuple[set[str], dict[str, str]]:
    """Modules to keep whole for some of their tensors, and tensors whose module is too large.

    A bare parameter's module may hold others; it is kept with all of them.
    """
    kept: set[str] = set()
    left_out: dict[str, str] = {}
    for name in names:
        module = layout.module_of(name)
        inside = [i for n, i in checkpoint.tensors.items() if _is_inside(n, (module,))]
        size = sum(math.prod(info.shape) for info in inside)
        is_leaf = all(layout.module_of(info.name) == module for info in inside)
        if module and (is_leaf or size <= LARGEST_CONTAINER * checkpoint.n_parameters):
            kept.add(module)
        else:
            left_out[name] = _ROOT
    return kept, left_out


def _is_inside(name: str, modules: Collection[str]) -> bool:
    return any(name.startswith(module + ".") for module in modules if module)


def _is_depthwise(view: View, shape: tuple[int, ...]) -> bool:
    """Whether each channel has a kernel of its own (a convolution with groups)."""
    return view.kind == "conv" and shape[1] == 1 and shape[0] > 1
