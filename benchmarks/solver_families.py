"""Shapes that the solver is timed on: made families, and the real models."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from benchmarks.families import merged_stacks
from jdetune import synth

#: Elements of a layer above which only one is solved at a time.
LARGE = 2**23


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
      family: which family it belongs to.
      row: rows.
      col: columns.
      n_models: number of models.
      rank: of every update.
      steps: of the paper's solver.
      layers: solved in one call.
      extrapolate: the paper's solver is timed on a few steps only.
      real: set of real adapters, for real models.
      dtype: storage dtype.
    """

    family: str
    row: int
    col: int
    n_models: int
    rank: int
    steps: int = 300
    layers: int = 4
    extrapolate: bool = False
    real: str | None = None
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Family and shape in words."""
        return f"{self.family} {self.row}x{self.col} n={self.n_models} r={self.rank} {self.dtype}"

    def stacks(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Name to the true base and the merged models; layers differ."""
        if self.real is not None:
            shape = (self.n_models, self.row, self.col)
            every = merged_stacks(self.real, self.n_models, self.dtype)
            fitting = [(name, pair) for name, pair in every.items() if pair[1].shape == shape]
            return dict(fitting[: self.layers])
        made = {}
        for seed in range(self.layers):
            one = synth.family(
                self.n_models, self.row, self.col, self.rank, seed=seed, dtype=self.dtype
            )
            made[f"layer.{seed}"] = (one.base, one.merged)
        return made


def _sd15() -> Iterator[Case]:
    """Attention and feed-forward matrices of the UNet of Stable Diffusion 1.5."""
    for width in (320, 640, 1280):
        for row, col in ((width, width), (width, 768), (8 * width, width), (width, 4 * width)):
            extrapolate = row * col > 1280 * 1280
            yield Case("sd15", row, col, 5, 32, extrapolate=extrapolate)


def _mistral() -> Iterator[Case]:
    """Query, key, value and output of Mistral 7B: 128 layers of two shapes."""
    for n_models in (8, 12):
        for row, layers in ((1024, 2), (4096, 1)):
            yield Case("mistral7b", row, 4096, n_models, 64, 1000, layers, extrapolate=True)


def _scaling() -> Iterator[Case]:
    """One of models, rank and size varied, the others fixed."""
    for n_models in (3, 5, 8, 16):
        yield Case("scaling-n", 768, 768, n_models, 16, extrapolate=True)
    for rank in (4, 8, 16, 32, 64):
        yield Case("scaling-rank", 1024, 1024, 5, rank, extrapolate=True)
    for size in (256, 512, 1024, 2048, 4096):
        yield Case("scaling-size", size, size, 5, 16, layers=2, extrapolate=True)


FAMILIES: dict[str, tuple[Case, ...]] = {
    "tiny": (Case("tiny", 64, 48, 3, 4, steps=20, layers=2),),
    "vit": (Case("vit", 768, 768, 5, 16, layers=8),),
    "sd15": tuple(_sd15()),
    "sd15-1280": (Case("sd15", 1280, 1280, 5, 32, layers=4),),
    "mistral7b": tuple(_mistral()),
    "mistral7b-n8": tuple(case for case in _mistral() if case.n_models == 8),
    "minilm": (Case("minilm", 384, 384, 5, 16, layers=12, real="minilm-distinct"),),
    "smollm2": (Case("smollm2", 576, 576, 3, 16, layers=12, real="smollm2-sft"),),
    "dinov2": (Case("dinov2", 384, 384, 3, 16, layers=12, real="dinov2-digits"),),
    "scaling": tuple(_scaling()),
}
