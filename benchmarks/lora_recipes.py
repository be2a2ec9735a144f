"""How the adapters of LoWRA Bench's real subsets are trained; `lora_cache` says what they are."""

import dataclasses

from benchmarks.lora_cache import COUNT, SUBSETS


@dataclasses.dataclass(frozen=True)
class Training:
    """How one subset is trained.

    Attributes:
      model: a key of `real_models.SOURCES`.
      kind: "images", "texts", "sft" or "dpo": which data and loss.
      targets: layers, as `jdetune.models.linear_layers` takes them.
      rank: of every layer, or the ranks that are drawn from.
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
    rank: int | tuple[int, ...]
    steps: int
    batch: int
    lr: float
    seed: int
    tasks: int = 15
    one_init: bool = False
    start: str | None = None
    count: int = COUNT


def _of(name: str, kind: str, steps: int, batch: int, lr: float, seed: int, **more) -> Training:
    one = SUBSETS[name]
    return Training(one.model, kind, one.targets, one.rank, steps, batch, lr, seed, **more)


#: In the order of training: preferences go on from answers.
TRAININGS = {
    "smollm2-sft": _of("smollm2-sft", "sft", 30, 4, 1e-3, 5000),
    "smollm2-dpo": _of("smollm2-dpo", "dpo", 16, 2, 3e-4, 6000, start="smollm2-sft"),
    "dinov2": _of("dinov2", "images", 40, 16, 1e-3, 7000),
    "minilm-distinct": _of("minilm-distinct", "texts", 40, 16, 1e-3, 8000),
    "minilm-same": _of("minilm-same", "texts", 40, 16, 1e-3, 8100, tasks=1),
    "minilm-oneseed": _of("minilm-oneseed", "texts", 40, 16, 1e-3, 8200, one_init=True),
    "minilm-mixed": _of("minilm-mixed", "texts", 40, 16, 1e-3, 8300),
}
