"""Synthetic families that no constant of jdetune was chosen on: shapes, ranks, spectra, angles."""

from collections.abc import Iterator

import numpy as np

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.families import Factors, merge

#: Arguments of ``jdetune.synth.family`` but for the seed.
GENERIC = (
    {"n_models": 3, "row": 256, "col": 640, "rank": 8, "decay": 1.0},
    {"n_models": 5, "row": 768, "col": 320, "rank": 24, "decay": 0.0},
    {"n_models": 4, "row": 300, "col": 300, "rank": [2, 8, 16, 24], "decay": 6.0},
    {"n_models": 6, "row": 512, "col": 256, "rank": [1, 32, 8, 8, 16, 4]},
    {"n_models": 3, "row": 450, "col": 450, "rank": 5, "base_std": 0.1, "update_rms": 1e-2},
    {"n_models": 8, "row": 512, "col": 512, "rank": 4, "dtype": "bfloat16", "update_rms": 5e-4},
    {"n_models": 3, "row": 640, "col": 256, "rank": 16, "dtype": "bfloat16", "update_rms": 2e-3},
    {"n_models": 5, "row": 384, "col": 896, "rank": 12, "dtype": "float16", "decay": 2.0},
    {"n_models": 3, "row": 512, "col": 512, "rank": 16, "dtype": "float16", "update_rms": 3e-4},
    {"n_models": 4, "row": 700, "col": 350, "rank": 20, "dtype": "bfloat16", "decay": 0.0},
)
SEEDS = (101, 102)
#: Angles in radians between directions that all models nearly share.
ANGLES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)


def generic() -> Iterator[Case]:
    """Families in general position."""
    for number, arguments in enumerate(GENERIC):
        for seed in SEEDS:
            yield cases.synthetic(f"generic {number}, seed {seed}", **arguments, seed=seed)


def nearly_shared() -> Iterator[Case]:
    """Families whose models nearly share their row spaces, or one direction of either side."""
    for angle in ANGLES:
        for count in (3, 5):
            yield near(angle, count, seed=201, whole=True)
            yield near(angle, count, seed=202, whole=False)
    for angle in ANGLES[:2]:
        yield near(angle, 5, seed=203, whole=True, dtype="bfloat16")


def near(
    angle: float,
    n_models: int,
    seed: int,
    whole: bool,
    dtype: str = "float32",
    shape: tuple[int, int] = (320, 448),
    rank: int = 10,
) -> Case:
    """One family with near-shared directions.

    Args:
      angle: between each model's direction and the one that all share, in radians.
      n_models: number of models.
      seed: of NumPy's generator.
      whole: all directions of the rows; else the strongest one of rows and of columns.
      dtype: storage dtype of base and models.
      shape: of the weight.
      rank: of every update.
    """
    rng = np.random.default_rng(seed)
    base = (0.02 * rng.standard_normal(shape)).astype(np.float32)
    stored = base.astype(cases.synth.DTYPES[dtype])
    row, col = (_orthonormal(rng, side, rank) for side in shape)
    values = np.exp(-2 * np.arange(rank) / rank)
    values *= 1e-3 * np.sqrt(base.size) / np.linalg.norm(values)
    updates = []
    for _ in range(n_models):
        u, v = (_orthonormal(rng, side, rank) for side in shape)
        if whole:
            v = _tilted(col, v, angle)
        else:
            u[:, :1], v[:, :1] = _tilted(row[:, :1], u[:, :1], angle), _tilted(col, v, angle)[:, :1]
        left, right = u * np.sqrt(values), np.sqrt(values)[:, None] * v.T
        updates.append(Factors(left.astype(np.float32), right.astype(np.float32), 1.0))
    merged = np.stack([merge(stored, one.update(), dtype) for one in updates])
    which = "row spaces" if whole else "one row and one column"
    name = f"{which} {angle:g} rad apart, {dtype}"
    recipe = f"{n_models} models, {shape[0]}x{shape[1]}, rank {rank}, seed {seed}: {name}"
    return cases.single(name, recipe, stored, merged, updates)


def _orthonormal(rng: np.random.Generator, side: int, rank: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((side, rank)))[0]


def _tilted(shared: np.ndarray, own: np.ndarray, angle: float) -> np.ndarray:
    """Directions at an angle to shared ones, towards each model's own."""
    return np.cos(angle) * shared + np.sin(angle) * own
