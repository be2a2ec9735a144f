"""Cases that the benchmarks recover from: merged layers, their true base and their true updates."""

import dataclasses

import numpy as np

from benchmarks import families
from benchmarks.families import Description, Factors
from jdetune import synth

#: All sets of real adapters: two that the repository holds and four that are trained.
SETS = (
    *families.COMMITTED,
    "minilm-oneseed",
    "minilm-mixed",
    "dinov2-digits",
    "smollm2-sft",
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weight matrix of a case.

    Attributes:
      base: the truth, [row, col], in the dtype of its grid.
      merged: models as stored, [model, row, col].
      updates: true update of each model.
    """

    base: np.ndarray
    merged: np.ndarray
    updates: list[Factors]

    @property
    def ranks(self) -> list[int]:
        """True rank of every update."""
        return [one.right.shape[0] for one in self.updates]


@dataclasses.dataclass(frozen=True)
class Case:
    """Layers that are recovered together.

    Attributes:
      name: what tables call it.
      layers: by tensor name.
      description: recipes, size and angles of the updates; of all layers of the set.
      of: layers that the set has; a flag may have left some out.
    """

    name: str
    layers: dict[str, Layer]
    description: Description
    of: int

    @property
    def n_models(self) -> int:
        """Number of models."""
        return next(iter(self.layers.values())).merged.shape[0]

    @property
    def stack(self) -> dict[str, np.ndarray]:
        """Name to merged weights, as ``jdetune.recover`` takes them."""
        return {name: layer.merged for name, layer in self.layers.items()}

    @property
    def size(self) -> str:
        """Number of layers, and of how many if not of all."""
        count = len(self.layers)
        return str(count) if count == self.of else f"{count} of {self.of}"

    def text(self) -> str:
        """Name and description."""
        return f"{self.name}, n={self.n_models}, layers: {self.size}\n{self.description.text()}\n"


def spread_out(names: list[str], count: int | None) -> list[str]:
    """As many names at equal distances, the first and the last among them; all if None.

    Example:
      >>> spread_out(list("abcde"), 3)
      ['a', 'c', 'e']
    """
    if count is None or count >= len(names):
        return names
    places = np.linspace(0, len(names) - 1, count).round().astype(int)
    return [names[place] for place in places]


def trained(
    set_name: str,
    count: int,
    dtype: str = "float32",
    base_grid: str | None = None,
    layers: int | None = None,
) -> Case:
    """A case of real adapters, merged as PEFT does.

    Args:
      set_name: a set of ``benchmarks.families``.
      count: number of models.
      dtype: how merged models are stored.
      base_grid: dtype that the base is rounded to before merging; None leaves it in float32.
      layers: how many layers, at equal distances; all if None.

    Raises:
      FileNotFoundError: adapters are missing; says how to train them.
    """
    updates = families.factors(set_name, count)
    stacks = families.merged_stacks(set_name, count, dtype, base_grid)
    chosen = spread_out(list(stacks), layers)
    return Case(
        name=f"{set_name}, {_storage(dtype, base_grid)}",
        layers={name: Layer(*stacks[name], updates[name]) for name in chosen},
        description=families.describe(set_name, count),
        of=len(stacks),
    )


def _storage(dtype: str, base_grid: str | None) -> str:
    base = base_grid or "float32"
    return base if base == dtype else f"{base} base stored as {dtype}"


def synthetic(name: str, **arguments) -> Case:
    """A case of one layer from ``jdetune.synth.family``.

    Args:
      name: what tables call it.
      **arguments: of ``family``.
    """
    family = synth.family(**arguments)
    updates = [Factors(b, a, 1.0) for b, a in zip(family.left, family.right, strict=True)]
    said = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return single(name, f"jdetune.synth.family({said})", family.base, family.merged, updates)


def single(
    name: str, recipe: str, base: np.ndarray, merged: np.ndarray, updates: list[Factors]
) -> Case:
    """A case of one layer."""
    told = families.measured([recipe], {"weight": base.astype(np.float32)}, {"weight": updates})
    return Case(name, {"weight": Layer(base, merged, updates)}, told, 1)
