"""The releases: a real model with real adapters, defended in every way that `jdetune.defend` has.

MiniLM's attention matrices get real adapters; its MLP matrices, which these adapters leave alone,
get random updates of rank `MLP_RANK` with falling spectra and the size of the real ones, so that
what is done to an MLP meets updates there too.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from benchmarks import families, real_models
from jdetune import defend, models
from jdetune.defend.coordinates import Change
from jdetune.defend.places import Kind
from jdetune.defend.release import Grid

#: As that of the real adapters in `minilm-same`: matrices of one rank share programs.
MLP_RANK = 32
#: Models that are released, however many of them are looked at.
MODELS = 8
#: The block of the forms that look at one only.
BLOCK = 3
#: The singular values of a random update fall by this power of e over its rank.
_DECAY = 3.0
Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Family:
    """A base and its fine-tunes.

    Attributes:
      module: the architecture.
      base: the true base, all tensors.
      models: the fine-tunes, merged, all tensors.
      targets: matrices that were fine-tuned.
      real: those of them with real adapters.
      sizes: name of a target to the mean rms of its updates.
      rank: of the real updates.
      rows: as many leading rows of a matrix are recovered; all if None. Any rows of a matrix are a
        matrix with an update of at most that rank, and matrices of one shape share one program.
    """

    module: models.Model
    base: Tensors
    models: list[Tensors]
    targets: tuple[str, ...]
    real: tuple[str, ...]
    sizes: dict[str, float]
    rank: int
    rows: int | None = None


@dataclasses.dataclass(frozen=True)
class Release:
    """Defended models.

    Attributes:
      models: as the attacker has them, all tensors.
      changes: of the first model's coordinates: the base that is recovered is in these.
    """

    models: list[Tensors]
    changes: tuple[Change, ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """A defence.

    Attributes:
      name: in words.
      defend: makes the release.
      counters: what the attacker does before recovery: "align", "across".
      quick: whether the quick form has it.
    """

    name: str
    defend: Callable[[Family], Release]
    counters: tuple[str, ...] = ()
    quick: bool = True


def family(set_name: str, one_block: bool = False, count: int = MODELS) -> Family:
    """MiniLM with the adapters of a set.

    Args:
      set_name: a set of `benchmarks.families` on MiniLM.
      one_block: one block only, and of its MLP as many units of the first matrix as the model is
        wide; all units are published, and aligned.
      count: models.
    """
    module, params = models.load(real_models.weights_file("minilm").parent)
    base = {name: np.asarray(array) for name, array in params.items()}
    wanted = (BLOCK,) if one_block else range(module.config.num_hidden_layers)
    factors = {
        name: found
        for name, found in families.factors(set_name, count).items()
        if any(name.startswith(f"encoder.layer.{block}.") for block in wanted)
    }
    updates = {name: [one.update() for one in found] for name, found in factors.items()}
    size = float(np.mean([_rms(one) for found in updates.values() for one in found]))
    for place in defend.places(module):
        if place.kind == "order" and any(f".{block}." in place.name for block in wanted):
            for axis in place.axes:
                if base[axis.name].ndim == 2 and not (one_block and axis.dual):
                    seed = [*axis.name.encode()]
                    updates[axis.name] = _random(base[axis.name].shape, count, size, seed)
    tunes = [
        base | {name: families.merge(base[name], found[i]) for name, found in updates.items()}
        for i in range(count)
    ]
    sizes = {name: float(np.mean([_rms(one) for one in found])) for name, found in updates.items()}
    rank = next(iter(factors.values()))[0].right.shape[0]
    rows = module.config.hidden_size if one_block else None
    return Family(module, base, tunes, tuple(updates), tuple(factors), sizes, rank, rows)


def cases() -> list[Case]:
    """Every defence, none first."""
    turned = partial(_changed, kinds=("order", "mix"), spread=1.0)
    mixed = partial(_changed, kinds=("order", "mix"), spread=4.0)
    return [
        Case("none", lambda of: Release(of.models)),
        Case("order of MLP units", partial(_changed, kinds=("order",), spread=1.0), ("align",)),
        Case("heads rotated, units reordered", turned, ("align",)),
        Case("common direction, 0.1 of the update", partial(_common, share=0.1), ("across",)),
        Case(
            "common direction, 0.1; heads rotated, units reordered",
            lambda of: turned(dataclasses.replace(of, models=_common(of, share=0.1).models)),
            ("align", "across"),
            quick=False,
        ),
        Case("dense noise, 0.01 of the update", partial(_noise, share=0.01)),
        Case("dense noise, 1 of the update", partial(_noise, share=1.0)),
        Case("int8, a scale a row", partial(_rounded, grid="int8")),
        Case("residual of rank 128, 0.1 of the update", partial(_ranked, rank=128, share=0.1)),
        Case("heads mixed (values 1/4 to 4), units reordered", mixed, ("align",)),
        Case("common direction, 1 of the update", partial(_common, share=1.0), ("across",), False),
        Case("bfloat16", partial(_rounded, grid="bfloat16")),
        Case(
            "heads rotated, units reordered, bfloat16",
            lambda of: _rounded(turned(of), of.targets, grid="bfloat16"),
            ("align",),
            quick=False,
        ),
        Case(
            "residual of rank 64, 0.1 of the update",
            partial(_ranked, rank=64, share=0.1),
            quick=False,
        ),
    ]


def _each(of: Family, change: Callable[[np.ndarray, str, int], np.ndarray]) -> list[Tensors]:
    """Every target's stack [model, row, col] sent through a defence."""
    found = [dict(model) for model in of.models]
    for seed, name in enumerate(of.targets):
        stack = change(np.stack([model[name] for model in of.models]), name, seed)
        for model, array in zip(found, stack, strict=True):
            model[name] = array
    return found


def _noise(of: Family, share: float) -> Release:
    return Release(
        _each(of, lambda stack, name, seed: defend.dense_noise(stack, share * of.sizes[name], seed))
    )


def _ranked(of: Family, rank: int, share: float) -> Release:
    return Release(
        _each(
            of,
            lambda stack, name, seed: defend.rank_residual(
                stack, rank, share * of.sizes[name], seed
            ),
        )
    )


def _common(of: Family, share: float) -> Release:
    return Release(
        _each(
            of,
            lambda stack, name, seed: defend.common_direction(stack, share * of.sizes[name], seed),
        )
    )


def _rounded(
    of: Family | Release, targets: Sequence[str] | None = None, grid: Grid = "int8"
) -> Release:
    """Targets of every model rounded to fewer bits."""
    names = of.targets if isinstance(of, Family) else targets or ()
    found = [m | {n: defend.lower_precision(m[n], grid) for n in names} for m in of.models]
    return Release(found, () if isinstance(of, Family) else of.changes)


def _changed(of: Family, kinds: Sequence[Kind], spread: float) -> Release:
    """Every model in coordinates of its own, the first too."""
    pairs = [
        defend.change_coordinates(of.module, model, seed, kinds, spread)
        for seed, model in enumerate(of.models)
    ]
    return Release([release for release, _ in pairs], pairs[0][1])


def truth(of: Family, release: Release) -> Tensors:
    """What is to be recovered: the true base in the coordinates of the first release."""
    base = defend.moved(of.base, release.changes)
    return {name: base[name][: of.rows] for name in of.targets}


def _random(
    shape: tuple[int, ...], count: int, rms: float, seed: Sequence[int]
) -> list[np.ndarray]:
    rng, (row, col) = np.random.default_rng(seed), shape
    values = np.exp(-_DECAY * np.arange(MLP_RANK) / MLP_RANK)
    found = []
    for _ in range(count):
        left, right = rng.standard_normal((row, MLP_RANK)), rng.standard_normal((MLP_RANK, col))
        update = np.matmul(left * values, right)
        found.append((update * (rms / _rms(update))).astype(np.float32))
    return found


def _rms(update: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(update, dtype=np.float64))))


def stacks(of: Family, tensors: Sequence[Mapping[str, np.ndarray]]) -> Tensors:
    """Name of a target to [model, row, col]."""
    return {name: np.stack([model[name][: of.rows] for model in tensors]) for name in of.targets}


def completed(model: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> Tensors:
    """A model with what was found in place of its leading rows."""
    return dict(model) | {
        name: np.concatenate([part, model[name][len(part) :].astype(part.dtype)])
        for name, part in found.items()
    }
