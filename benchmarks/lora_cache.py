"""The adapters of LoWRA Bench's real subsets: what they are and where they are kept.

`python -m benchmarks.train_loras` trains them; PEFT folders CACHE/lowra/SUBSET/00, 01, ...
"""

import dataclasses
from pathlib import Path

from benchmarks.families import cache_folder

_QV = ("query", "value")
_QKVO = r"encoder\.layer\.\d+\.attention\.(self\.(query|key|value)|output\.dense)"
_LINEAR = r"encoder\.layer\.\d+\..*(query|key|value|dense)"
_DECODER = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclasses.dataclass(frozen=True)
class Subset:
    """One real subset.

    Attributes:
      model: a key of `real_models.SOURCES`.
      kind: "images", "texts", "sft" or "dpo": which data and loss.
      targets: layers, as `jdetune.models.linear_layers` takes them.
      rank: of every layer, or None for ranks drawn from `train_loras.RANKS`.
      steps: of training.
      batch: examples of an adapter in a step.
      lr: learning rate of the first step.
      seed: of adapter 0; adapter i has seed + i.
      tasks: number of different tasks; adapter i trains task i modulo this.
      one_init: all adapters start from the same A.
      start: subset that it goes on from, adapter by adapter.
      count: adapters.
    """

    model: str
    kind: str
    targets: str | tuple[str, ...]
    rank: int | None
    steps: int
    batch: int
    lr: float
    seed: int
    tasks: int = 15
    one_init: bool = False
    start: str | None = None
    count: int = 15


#: Rank 32 in SmolLM2: three models of rank 64 would fill its 192 rows of key and value, and leave
#: nothing to tell them apart by.
SUBSETS = {
    "smollm2-sft": Subset("smollm2", "sft", _DECODER, 32, 30, 4, 1e-3, 5000),
    "smollm2-dpo": Subset("smollm2", "dpo", _DECODER, 32, 16, 2, 3e-4, 6000, start="smollm2-sft"),
    "dinov2": Subset("dinov2", "images", _QV, 16, 40, 16, 1e-3, 7000),
    "minilm-distinct": Subset("minilm", "texts", _QV, 16, 40, 16, 1e-3, 8000),
    "minilm-same": Subset("minilm", "texts", _QKVO, 32, 40, 16, 1e-3, 8100, tasks=1),
    "minilm-one-init": Subset("minilm", "texts", _QV, 16, 40, 16, 1e-3, 8200, one_init=True),
    "minilm-mixed": Subset("minilm", "texts", _LINEAR, None, 40, 16, 1e-3, 8300),
}


def subset_folder(name: str, quick: bool = False, cache: str | None = None) -> Path:
    """Where a subset's adapters are.

    Args:
      name: a key of `SUBSETS`.
      quick: of those that `--quick` trains.
      cache: folder of all adapters; `families.cache_folder` if None.
    """
    return cache_folder(cache) / ("lowra-quick" if quick else "lowra") / name


def adapters(name: str, quick: bool = False, cache: str | None = None) -> list[Path]:
    """PEFT folders of a subset that are trained already, in order; empty if none is."""
    folder = subset_folder(name, quick, cache)
    return sorted(path.parent for path in folder.glob("[0-9][0-9]/recipe.json"))
