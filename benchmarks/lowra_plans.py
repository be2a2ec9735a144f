"""Which subsets LoWRA Bench has here, and how each is sampled."""

import dataclasses
from collections.abc import Callable

from benchmarks import lowra_sources
from benchmarks.lowra_sources import COMMITTED, Likeness
from jdetune.bench.layers import Source, spread

#: Layers of Stable Diffusion 1.5's attention, one of each shape.
SD15 = {
    "down_blocks.0.attn1.to_q": (320, 320),
    "down_blocks.0.attn2.to_k": (320, 768),
    "down_blocks.1.attn1.to_v": (640, 640),
    "down_blocks.1.attn2.to_v": (640, 768),
    "mid_block.attn1.to_q": (1280, 1280),
    "mid_block.attn2.to_k": (1280, 768),
}
#: One layer of each shape of Mistral-7B's attention.
MISTRAL = {
    "layers.0.self_attn.k_proj": (1024, 4096),
    "layers.0.self_attn.q_proj": (4096, 4096),
}
#: Layers that likeness is measured on.
_MEASURED = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """One subset and how it is sampled.

    Attributes:
      name: of the subset.
      title: what figures call it; stand-ins have the word in it.
      real: a real model with trained adapters.
      papers: the subset of the paper that it stands beside.
      steps: of the paper's solver.
      counts: numbers of models n.
      repeats: random subsets for each n.
      layers: at most so many.
      like: of stand-ins, the real subset that they are made like.
      about: what is real and what is not, in a sentence.
      model: of real subsets, a key of `real_models.SOURCES`.
      traced: layers on which the paper's algorithm is followed step by step, with n = 5.
      whole: recover the whole model from three models too, and let it answer.
    """

    name: str
    title: str
    real: bool
    papers: str
    steps: int
    counts: tuple[int, ...] = (3, 5, 8, 15)
    repeats: int = 3
    layers: int = 12
    like: str | None = None
    about: str = ""
    model: str | None = None
    traced: int = 0
    whole: bool = False


def _minilm(name: str, what: str, traced: int = 0, layers: int = 3) -> Plan:
    return Plan(
        name,
        f"MiniLM, {what}",
        True,
        "-",
        300,
        about=f"Real all-MiniLM-L6-v2 and adapters trained on it: {what}.",
        model="minilm",
        layers=layers,
        traced=traced,
    )


PLANS = {
    plan.name: plan
    for plan in (
        Plan(
            "dinov2",
            "DINOv2-small",
            True,
            "vit",
            300,
            about="Real DINOv2-small; 15 adapters of rank 16 on query and value, one image task "
            "(digits and transforms of them) each.",
            model="dinov2",
            layers=4,
            traced=4,
        ),
        Plan(
            "smollm2-sft",
            "SmolLM2-135M SFT",
            True,
            "mistral-7b-v0.1-sft",
            1000,
            about="Real SmolLM2-135M-Instruct; adapters of rank 32 (64 would fill the 192 rows of "
            "k and v) on q, k, v and o, each on a random 80% of one corpus.",
            model="smollm2",
            layers=2,
            traced=2,
            whole=True,
        ),
        Plan(
            "smollm2-dpo",
            "SmolLM2-135M DPO",
            True,
            "mistral-7b-v0.1-dpo",
            1000,
            layers=2,
            about="Real SmolLM2-135M-Instruct; DPO that goes on from each SFT adapter, the true "
            "answer preferred to a mismatched one.",
            model="smollm2",
        ),
        _minilm("minilm-distinct", "distinct tasks", traced=4),
        _minilm("minilm-same", "one task, batches of their own"),
        _minilm("minilm-oneseed", "distinct tasks, one initial A"),
        _minilm("minilm-mixed", "ranks 4 to 32 mixed, all linear layers", layers=6),
        Plan(
            "sd15",
            "SD 1.5 shapes (stand-in)",
            False,
            "stable-diffusion-1.5",
            300,
            layers=3,
            like="dinov2",
            about="Stand-in: random matrices of Stable Diffusion 1.5's attention shapes, rank 32, "
            "with spectra, sizes and overlaps measured on a real subset. No real weight is in it.",
        ),
        Plan(
            "mistral7b",
            "Mistral-7B shapes (stand-in)",
            False,
            "mistral-7b-v0.1-sft",
            1000,
            layers=1,
            like="smollm2-sft",
            about="Stand-in: random matrices of Mistral-7B's attention shapes, rank 64, with "
            "spectra, sizes and overlaps measured on a real subset. No real weight is in it.",
        ),
    )
}
#: What --quick runs: the committed adapters, and one shape of a stand-in.
QUICK = (
    dataclasses.replace(
        _minilm(COMMITTED, "distinct tasks (committed adapters)", traced=2),
        counts=(3, 5),
        repeats=1,
        layers=2,
    ),
    dataclasses.replace(
        PLANS["sd15"], counts=(3,), repeats=1, layers=1, like=COMMITTED, name="sd15-quick"
    ),
)
_RANKS = {"sd15": 32, "sd15-quick": 32, "mistral7b": 64}
_SHAPES = {
    "sd15": SD15,
    "sd15-quick": dict(list(SD15.items())[:1]),
    "mistral7b": MISTRAL,
}


def open_source(plan: Plan, real: Callable[[str], Source]) -> tuple[Source, Likeness | None]:
    """A plan's layers, and of a stand-in what it was made like.

    Args:
      plan: the subset.
      real: opens a real subset by name.

    Raises:
      FileNotFoundError: adapters are missing; says how to train them.
    """
    if plan.like is None:
        return real(plan.name), None
    model = real(plan.like)
    like = lowra_sources.likeness(model, plan.like, spread(model.names, _MEASURED))
    shapes = _SHAPES[plan.name]
    return lowra_sources.stand_in(plan.name, shapes, _RANKS[plan.name], like), like
