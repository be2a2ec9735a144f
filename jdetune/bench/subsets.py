"""The four published subsets of LoWRA Bench, with the settings of the paper's solver."""

import dataclasses

#: Where the data are published.
HUB_ID = "Eliahu/LoWRA-Bench"
#: LoRAs of every published subset.
MODELS = 15


@dataclasses.dataclass(frozen=True)
class Subset:
    """One subset and what the paper's solver is run with on it.

    Attributes:
      name: as published.
      base: the model that was fine-tuned.
      layers: fine-tuned layers.
      rank: of every LoRA.
      n: number of models in the paper's main table.
      steps: of the paper's solver.
    """

    name: str
    base: str
    layers: int
    rank: int
    n: int
    steps: int


#: Steps and n are those of the published commands; layers those of the published data.
SUBSETS = {
    subset.name: subset
    for subset in (
        Subset("vit", "ViT", 24, 16, 5, 300),
        Subset("stable-diffusion-1.5", "Stable Diffusion 1.5", 264, 32, 5, 300),
        Subset("mistral-7b-v0.1-sft", "Mistral-7B-v0.1, SFT", 128, 64, 12, 1000),
        Subset("mistral-7b-v0.1-dpo", "Mistral-7B-v0.1, DPO", 128, 64, 8, 1000),
    )
}

#: Where the paper contradicts itself, and what is taken here.
CONTRADICTIONS = (
    "Steps for ViT and Stable Diffusion: 300 in the paper's text and its published commands, 200 "
    "in its Table 9; 300 is taken.",
    "Layers of Stable Diffusion: 264 in the published data, 192 elsewhere in the paper; 264 is "
    "taken.",
)
