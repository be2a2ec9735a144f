"""Watching without the parent: directions from a base recovered from the merged models alone.

The models of `backdoors` of one seed, six backdoored and three benign, are merged and stored in
float32 or bfloat16; `jdetune.recover` gets these nine and nothing else. Monitors use directions of
the true update, of the recovered one, and of the raw weights, which need no base either.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jdetune
from benchmarks.tables import Check, at_most
from benchmarks.watch import backdoors, scoring
from benchmarks.watch.figures import bars
from benchmarks.watch.scoring import gathered, percent
from jdetune import models, watch
from jdetune.models import Params

#: Backdoored models that are watched; all nine are what the base is recovered from.
KINDS = ("token, payload", "conjunction, payload", "phrase, payload")
STORED = ("float32", "bfloat16")
METHODS = ("update", "recovered", "raw weights")


def stored(params: Params, dtype: str) -> dict[str, np.ndarray]:
    """Weights as a release has them."""
    kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    return {name: np.asarray(array).astype(kind) for name, array in params.items()}


def overlap(found: watch.Directions, truth: watch.Directions) -> float:
    """Least cosine of a true direction with the recovered span of its matrix."""
    worst = 1.0
    for layer in range(truth.values.shape[0]):
        for matrix in {name for name, _ in truth.slots}:
            mine, own = (
                np.asarray(d.vectors[layer], np.float64)[[m == matrix for m, _ in d.slots]]
                for d in (found, truth)
            )
            inside = np.linalg.norm(own @ np.linalg.pinv(mine) @ mine, axis=1)
            worst = min(worst, float(inside[np.linalg.norm(own, axis=1) > 0].min()))
    return worst


def run(quick: bool, seeds: int, say: Callable[[str], None], cache: Path) -> dict[str, Any]:
    """The experiment.

    Args:
      quick: fewer inputs.
      seeds: as in `backdoors`, whose trained models are used.
      say: told of every row.
      cache: folder for trained models that several experiments use.
    """
    calibrated, tested = (2000, 500) if quick else (backdoors.CALIBRATED, 500)
    rows: dict[str, list[Any]] = {dtype: [] for dtype in STORED}
    for seed in range(seeds):
        made = backdoors.family(seed, cache)
        for dtype, own in rows.items():
            merged = [
                stored(models.merge_lora(made.params, lora), dtype) for lora in made.loras.values()
            ]
            tuned = [
                name
                for name in merged[0]
                if merged[0][name].ndim == 2 and "embed" not in name and "head" not in name
            ]
            found = jdetune.recover({n: np.stack([m[n] for m in merged]) for n in tuned})
            assert isinstance(found, jdetune.Recoveries)
            say(f"seed {seed}, {dtype}: {found}")
            for index, kind in enumerate(made.loras):
                if kind not in KINDS:
                    continue
                params = {n: jnp.asarray(a.astype(np.float32)) for n, a in merged[index].items()}
                monitors = {
                    "update": watch.directions(made.loras[kind], backdoors.TOP_K),
                    "recovered": watch.directions(found, backdoors.TOP_K, model=index),
                    "raw weights": watch.directions(params, backdoors.TOP_K),
                }
                sets, _ = backdoors.sets_of(
                    made.module, params, made.triggers[kind], calibrated, tested, seed
                )
                looked = scoring.look(made.module, params, monitors, sets, seed)
                own.append(
                    {
                        "kind": kind,
                        "seed": seed,
                        "ok": bool(found.ok),
                        "overlap": overlap(monitors["recovered"], monitors["update"]),
                        "methods": {m: scoring.rates(looked.scores(m)) for m in METHODS},
                    }
                )
                shares = {m: own[-1]["methods"][m]["paper"]["attack"]["share"] for m in METHODS}
                say(f"seed {seed}, {dtype}, {kind}: {shares}, overlap {own[-1]['overlap']:.6f}")
    settings = {
        **dataclasses.asdict(backdoors.SIZE), "seeds": seeds, "calibrated": calibrated,
        "tested": tested, "top_k": backdoors.TOP_K,
    }  # fmt: skip
    return {"settings": settings, "rows": rows}


def _share(row: dict[str, Any], name: str, margin: str, of: str) -> float:
    return row["methods"][name][margin][of]["share"]


def _loss(row: dict[str, Any], margin: str, name: str) -> float:
    return _share(row, "update", margin, "attack") - _share(row, name, margin, "attack")


def tables(result: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """What the rows say, as tables by title."""
    lines = []
    for dtype, rows in result["rows"].items():
        for name in METHODS:
            cells = [dtype, name]
            for of in ("attack", "clean", "decoy"):
                figure = gathered(rows, partial(_share, name=name, margin="paper", of=of))
                cells.append(percent(figure, 2))
            for margin in ("paper", "tuned"):
                cells.append(percent(gathered(rows, partial(_loss, margin=margin, name=name)), 2))
            lines.append(cells)
    head = ["stored", "directions of", "attacks", "clean", "decoys", "lost", "lost, tuned margin"]
    return {"Flagged shares, and true positives lost against the true update": (head, lines)}


def checks(result: dict[str, Any]) -> list[Check]:
    """Less than one percentage point should be lost."""
    found = []
    for dtype, rows in result["rows"].items():
        loss = gathered(rows, partial(_loss, margin="paper", name="recovered"))["mean"]
        found.append(at_most(f"{dtype}: true positives lost", loss, 0.01))
    return found


def draw(result: dict[str, Any], figure: Any) -> None:
    """Bars of flagged attacks."""
    for axes, (dtype, rows) in zip(figure.subplots(1, 2), result["rows"].items(), strict=True):
        groups = {
            of: [gathered(rows, partial(_share, name=n, margin="paper", of=of)) for n in METHODS]
            for of in ("attack", "decoy", "clean")
        }
        bars(axes, METHODS, groups)
        axes.set(ylabel="flagged share", ylim=(0, 1.05))
        axes.set_title(f"Nine merged models stored in {dtype}")
