"""Layers of LoWRA Bench that can be had offline: real adapters, and stand-ins made like them.

Real subsets are adapters of `benchmarks.train_loras` (or the committed ones) on the weights of a
real model. Stand-ins have the shapes of Stable Diffusion 1.5 and Mistral-7B, random bases, and
updates whose spectra, sizes and overlaps are those measured on a real subset.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np

from benchmarks import families, lora_cache
from jdetune.bench.layers import Layer, Lora, Source

COMMITTED = "minilm-committed"
#: Largest singular values that are measured of every update.
_PAIRS = 20


@dataclasses.dataclass(frozen=True)
class Likeness:
    """What stand-ins take over from real adapters.

    Attributes:
      subset: where it was measured.
      spectrum: singular values over the largest, by place from 0 to 1, mean of logarithms.
      ratio: rms(M) / rms(W), median.
      cols: cosines of the principal angles of two models' column spaces, mean over pairs.
      rows: the same of row spaces.
      rms: of the base's elements, median.
    """

    subset: str
    spectrum: tuple[float, ...]
    ratio: float
    cols: tuple[float, ...]
    rows: tuple[float, ...]
    rms: float


def committed() -> Source:
    """The adapters that the repository holds, on the real MiniLM."""
    name = "minilm-distinct"
    factors = families.factors(name)
    bases = families.base_weights(name, tuple(factors))
    layers = {
        layer: [Lora(f"{i:02d}", *_sized(one.left, one.right, one.scaling))
                for i, one in enumerate(updates)]
        for layer, updates in factors.items()
    }  # fmt: skip
    return _source(layers, bases, {"data": "committed adapters", "model": "all-MiniLM-L6-v2"})


def trained(name: str, quick: bool = False) -> Source:
    """A subset of the cache of trained adapters, on the weights of its real model."""
    subset = lora_cache.SUBSETS[name]
    folders = lora_cache.adapter_folders(name, quick=quick)
    module, params = lora_cache.base(subset.model)
    layers = {
        layer: [Lora(folder.name, *_sized(np.asarray(one.b), np.asarray(one.a), float(one.scaling)))
                for folder, one in zip(folders, updates, strict=True)]
        for layer, updates in lora_cache.factors(module, folders).items()
    }  # fmt: skip
    bases = {layer: np.asarray(params[layer]) for layer in layers}
    origin = {"data": "trained adapters", "model": subset.model, "about": subset.about}
    return _source(layers, bases, origin)


def real(name: str, quick: bool = False) -> Source:
    """A real subset by name."""
    return committed() if name == COMMITTED else trained(name, quick)


def _sized(left: np.ndarray, right: np.ndarray, scaling: float) -> tuple:
    """Rank, alpha, B and A."""
    rank = right.shape[0]
    return rank, scaling * rank, left.astype(np.float32), right.astype(np.float32)


def _source(
    layers: dict[str, list[Lora]], bases: dict[str, np.ndarray], origin: Mapping[str, object]
) -> Source:
    def read(wanted: Sequence[str]) -> Iterator[Layer]:
        chosen = set(wanted)
        for name, loras in layers.items():
            if name in chosen:
                yield Layer(name, np.asarray(bases[name], np.float32), tuple(loras))

    models = tuple(lora.name for lora in next(iter(layers.values())))
    return Source(tuple(sorted(layers, key=_in_order)), models, _ordered(read), origin)


def _in_order(name: str) -> tuple:
    return tuple((int(word), "") if word.isdigit() else (-1, word) for word in name.split("."))


def _ordered(read):
    """Layers in the order they are asked for."""

    def in_order(wanted: Sequence[str]) -> Iterator[Layer]:
        for name in wanted:
            yield from read([name])

    return in_order


def likeness(source: Source, subset: str, layers: Sequence[str]) -> Likeness:
    """Spectra, sizes and overlaps of real updates.

    Args:
      source: of the subset.
      subset: its name.
      layers: where to measure.
    """
    places = np.linspace(0, 1, 33)
    spectra, ratios, cols, rows, sizes = [], [], [], [], []
    for layer in source.read(layers):
        sizes.append(_rms(layer.base))
        spans = []
        for lora in layer.loras:
            scaled = np.float64(lora.alpha / lora.rank) * lora.left.astype(np.float64)
            q, r = np.linalg.qr(scaled)
            p, t = np.linalg.qr(lora.right.astype(np.float64).T)
            u, s, v = np.linalg.svd(r @ t.T)
            spans.append((q @ u, p @ v.T))
            ratios.append(np.linalg.norm(s) / np.sqrt(layer.base.size) / sizes[-1])
            log = np.log(np.maximum(s / s[0], 1e-12))
            spectra.append(np.interp(places, np.linspace(0, 1, len(s)), log))
        for first, second in list(combinations(range(len(spans)), 2))[:_PAIRS]:
            for found, side in ((cols, 0), (rows, 1)):
                cosines = np.linalg.svd(spans[first][side].T @ spans[second][side])[1]
                found.append(np.interp(places, np.linspace(0, 1, len(cosines)), cosines))
    return Likeness(
        subset,
        tuple(np.exp(np.mean(spectra, 0)).tolist()),
        float(np.median(ratios)),
        tuple(np.clip(np.mean(cols, 0), 0, 1).tolist()),
        tuple(np.clip(np.mean(rows, 0), 0, 1).tolist()),
        float(np.median(sizes)),
    )


def stand_in(
    name: str, shapes: dict[str, tuple[int, int]], rank: int, like: Likeness, models: int = 15
) -> Source:
    """Random layers of given shapes with updates like real ones; made anew when they are read."""

    def read(wanted: Sequence[str]) -> Iterator[Layer]:
        for layer in wanted:
            place = list(shapes).index(layer)
            yield _made(layer, shapes[layer], rank, like, models, np.random.default_rng([7, place]))

    origin = {
        "data": "stand-in: random bases, updates like those of a real subset",
        "shapes": name,
        "like": like.subset,
    }
    return Source(tuple(shapes), tuple(f"{i:02d}" for i in range(models)), read, origin)


def _made(
    name: str,
    shape: tuple[int, int],
    rank: int,
    like: Likeness,
    models: int,
    rng: np.random.Generator,
) -> Layer:
    base = (like.rms * rng.standard_normal(shape)).astype(np.float32)
    at, places = np.linspace(0, 1, rank), np.linspace(0, 1, len(like.spectrum))
    values = np.interp(at, places, like.spectrum)
    values *= like.ratio * like.rms * np.sqrt(base.size) / np.linalg.norm(values)
    spans = [
        _overlapping(side, rank, np.interp(at, places, cosines), models, rng)
        for side, cosines in zip(shape, (like.cols, like.rows), strict=True)
    ]
    root = np.sqrt(values)
    loras = tuple(
        Lora(f"{i:02d}", rank, float(rank), (u * root).astype(np.float32),
             (root[:, None] * v.T).astype(np.float32))
        for i, (u, v) in enumerate(zip(*spans, strict=True))
    )  # fmt: skip
    return Layer(name, base, loras)


def _overlapping(
    side: int, rank: int, cosines: np.ndarray, models: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Orthonormal bases, any two of them at about these cosines; in random order of direction.

    Random spaces overlap by themselves: what is over that comes from directions in common.
    """
    chance = np.linalg.svd(
        np.linalg.qr(rng.standard_normal((side, rank)))[0].T
        @ np.linalg.qr(rng.standard_normal((side, rank)))[0]
    )[1]
    excess = np.where(cosines > chance, np.clip(cosines, 0, 0.9999), 0.0)
    common = np.linalg.qr(rng.standard_normal((side, rank)))[0]
    found = []
    for _ in range(models):
        own = rng.standard_normal((side, rank))
        own = np.linalg.qr(own - common @ (common.T @ own))[0]
        mixed = common * np.sqrt(excess) + own * np.sqrt(1 - excess)
        turn = np.linalg.qr(rng.standard_normal((rank, rank)))[0]
        found.append(np.linalg.qr(mixed)[0] @ turn)
    return found


def _rms(matrix: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(matrix, dtype=np.float64))))
