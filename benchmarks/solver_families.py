"""Shapes that the solver is timed on, and their layers: made ones, real ones, ones on a device."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.families import merged_stacks
from jdetune import linalg, synth

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


@dataclasses.dataclass(frozen=True)
class Resident:
    """Layers of one kind and shape that an accelerator holds."""

    name: str
    row: int
    col: int
    layers: int
    n_models: int = 8
    rank: int = 64


#: The attention of Mistral 7B: 128 matrices.
RESIDENT = (
    Resident("query", 4096, 4096, 32),
    Resident("key", 1024, 4096, 32),
    Resident("value", 1024, 4096, 32),
    Resident("output", 4096, 4096, 32),
)
RESIDENT_SMALL = (
    Resident("query", 64, 48, 3, n_models=3, rank=4),
    Resident("key", 64, 48, 2, n_models=3, rank=4),
)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Layers that are solved together, on the device.

    Attributes:
      group: which matrices they are.
      seeds: of the layers.
      merged: [layer, model, row, col].
    """

    group: Resident
    seeds: range
    merged: jax.Array


def make(group: Resident, seed: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Base [row, col] and merged models [model, row, col] of one layer; pure.

    The singular values of the updates fall as in ``jdetune.synth``, whose sizes are taken.
    """
    row, col, rank = group.row, group.col, group.rank
    keys = jax.random.split(jax.random.key(seed), 3)
    base = (0.02 * jax.random.normal(keys[0], (row, col), jnp.float32)).astype(dtype)
    values = jnp.exp(-3 * jnp.arange(rank, dtype=jnp.float32) / rank)
    values = values * (1e-3 / jnp.sqrt(jnp.sum(jnp.square(values))))

    def one(model: jax.Array) -> jax.Array:
        left = jax.random.normal(jax.random.fold_in(keys[1], model), (row, rank), jnp.float32)
        right = jax.random.normal(jax.random.fold_in(keys[2], model), (rank, col), jnp.float32)
        return (base.astype(jnp.float32) + linalg.matmul(left * values, right)).astype(dtype)

    return base, jax.lax.map(one, jnp.arange(group.n_models, dtype=jnp.int32))


def make_chunks(groups: tuple[Resident, ...], size: int, dtype: str) -> list[Chunk]:
    """All layers of all groups, in chunks, on the device."""
    found, start = [], 0
    for group in groups:

        def merged(seed: jax.Array, group: Resident = group) -> jax.Array:
            return make(group, seed, dtype)[1]

        several = jax.jit(lambda seeds, merged=merged: jax.lax.map(merged, seeds))
        for first in range(start, start + group.layers, size):
            seeds = range(first, min(first + size, start + group.layers))
            found.append(Chunk(group, seeds, several(jnp.asarray(seeds, jnp.int32))))
        start += group.layers
    return found


def _sd15() -> Iterator[Case]:
    """Attention and feed-forward matrices of the UNet of Stable Diffusion 1.5."""
    for width in (320, 640, 1280):
        for row, col in ((width, width), (width, 768), (8 * width, width), (width, 4 * width)):
            extrapolate = row * col > 1280 * 1280
            yield Case("sd15", row, col, 5, 32, extrapolate=extrapolate)


def _mistral() -> Iterator[Case]:
    """Query, key, value and output of Mistral 7B: 128 layers of two shapes."""
    for n_models in (8, 12):
        for row, layers in ((1024, 6), (4096, 4)):
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
