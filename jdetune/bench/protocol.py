"""The protocol: random subsets of the models, repeats, every method on every layer."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdetune.bench import methods
from jdetune.bench.layers import Layer, Source, depth_of, kind_of, merge
from jdetune.bench.ledger import NAME, Key, Ledger
from jdetune.errors import InputError

#: Called with a stage, cells done and cells in all.
Progress = Callable[[str, int, int], None]
#: Called with a cell and the base that was estimated, as stored.
Keep = Callable[[Key, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
      subset: name of the subset.
      layers: names of the layers.
      counts: numbers of models n.
      repeats: random subsets for each n, fewer where there are not so many.
      methods: keys of ``methods.TITLES``.
      steps: of the paper's solver.
      merge_dtype: how models are stored.
      seed: of the random subsets.
    """

    subset: str
    layers: tuple[str, ...]
    counts: tuple[int, ...]
    repeats: int = 10
    methods: tuple[str, ...] = methods.DEFAULT
    steps: int = 300
    merge_dtype: str = "float32"
    seed: int = 0


def draw_subsets(n_models: int, count: int, repeats: int, seed: int) -> list[tuple[int, ...]]:
    """Different random subsets of n models, without replacement; the same for every layer.

    Args:
      n_models: how many there are.
      count: n.
      repeats: how many subsets; all there are if fewer.
      seed: of the draw.

    Example:
      >>> len(draw_subsets(15, 15, 10, 0)), draw_subsets(15, 3, 1, 0) == draw_subsets(15, 3, 1, 0)
      (1, True)
    """
    rng = np.random.default_rng([seed, count])
    wanted = min(repeats, math.comb(n_models, count))
    found: list[tuple[int, ...]] = []
    while len(found) < wanted:
        one = tuple(sorted(rng.choice(n_models, count, replace=False).tolist()))
        if one not in found:
            found.append(one)
    return found


def check(settings: Settings, source: Source) -> None:
    """Refuses what cannot be run on these layers.

    Raises:
      InputError: unknown layers or methods, or more models than there are.
    """
    total = len(source.models)
    wrong = [n for n in settings.counts if not 2 <= n <= total]
    if wrong:
        raise InputError(f"n = {wrong[0]}: the data have {total} models. Give --n of 2 to {total}.")
    unknown = [name for name in settings.methods if name not in methods.TITLES]
    if unknown:
        raise InputError(f"no method {unknown[0]!r}. Give some of {', '.join(methods.TITLES)}.")
    missing = sorted(set(settings.layers) - set(source.names))
    if missing:
        raise InputError(f"no layer {missing[0]!r} in the data. Name layers that it has.")


def keys(settings: Settings, n_models: int) -> Iterator[tuple[Key, tuple[int, ...]]]:
    """All cells with their models, layer by layer."""
    drawn = {n: draw_subsets(n_models, n, settings.repeats, settings.seed) for n in settings.counts}
    for layer in settings.layers:
        for n, subsets in drawn.items():
            for repeat, models in enumerate(subsets):
                for method in settings.methods:
                    yield Key(layer, n, repeat, method), models


def run(
    source: Source,
    settings: Settings,
    out: Path,
    progress: Progress | None = None,
    overwrite: bool = False,
    keep: Keep | None = None,
) -> list[dict[str, Any]]:
    """Runs what is not yet known and returns all cells, in order.

    Args:
      source: the layers.
      settings: what to run.
      out: folder of the ledger.
      progress: called after every cell.
      overwrite: begin anew where the ledger has other settings.
      keep: called with every estimate, before its cell is on disk.

    Raises:
      InputError: the settings do not fit the data.
      OutputError: the ledger belongs to another run.
    """
    check(settings, source)
    same = {
        "subset": settings.subset,
        "merge_dtype": settings.merge_dtype,
        "seed": settings.seed,
        "steps": settings.steps,
        "models": list(source.models),
        **source.origin,
    }
    ledger = Ledger(out / NAME, same, overwrite)
    every = list(keys(settings, len(source.models)))
    open_ = {key for key, _ in every if key not in ledger.cells}
    done, total = len(every) - len(open_), len(every)
    seen: set[tuple] = set()
    if progress is not None:
        progress(settings.subset, done, total)
    todo = dict.fromkeys(key.layer for key, _ in every if key in open_)
    for layer in source.read(list(todo)):
        own = [(key, models) for key, models in every if key.layer == layer.name and key in open_]
        for cell in _cells(layer, own, settings, seen, keep):
            ledger.add(cell)
            done += 1
            if progress is not None:
                progress(settings.subset, done, total)
    return [ledger.cells[key] for key, _ in every]


def _cells(
    layer: Layer,
    own: Sequence[tuple[Key, tuple[int, ...]]],
    settings: Settings,
    seen: set[tuple],
    keep: Keep | None,
) -> Iterator[dict[str, Any]]:
    """Cells of one layer; models are merged once for all methods."""
    merged_of: tuple[int, ...] | None = None
    base = merged = np.zeros((0, 0), np.float32)
    for key, models in own:
        if models != merged_of:
            base, merged = merge(layer, models, settings.merge_dtype)
            merged_of = models
        ranks = [layer.loras[model].rank for model in models]
        task = methods.Task(base, merged, max(ranks), settings.steps, key.repeat)
        # the first call of a program compiles, or loads what was compiled before
        program = (key.method, merged.shape, max(ranks))
        found = methods.run(key.method, task)
        estimate = found.pop("base", None)
        if keep is not None and estimate is not None:
            keep(key, estimate)
        yield {
            **key._asdict(),
            "models": list(models),
            "kind": kind_of(layer.name),
            "depth": depth_of(layer.name),
            "shape": list(base.shape),
            "true_ranks": ranks,
            **found,
            "first_call": program not in seen,
        }
        seen.add(program)
