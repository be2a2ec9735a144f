"""A hidden mix of topics: an audit finds which were trained, from the extremes of directions.

A decoder knows facts of eight topics (the relations of `unlearning`). LoRAs learn new answers in
four of them. Of a corpus in which all topics are as common, the ten inputs with the most extreme
cosines at each end of the leading directions are read: precision@10 is the share of them that is of
a trained topic, by chance a half. The topics are then ranked by their share of those inputs: how
many of the first four were trained, by chance two.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.tables import Check, at_least
from benchmarks.watch import scoring, toy, unlearning
from benchmarks.watch.figures import bars
from benchmarks.watch.scoring import gathered, percent
from jdetune import models, watch

TOPICS, TRAINED, EXTREMES = len(unlearning.RELATIONS), 4, 10
#: Directions of each matrix that are read.
TOP_K = 2
METHODS = ("update", "raw weights", "random")


def relearned(world: unlearning.World, topics: np.ndarray, seed: int) -> unlearning.World:
    """Other facts in some topics."""
    facts = world.facts.copy()
    new = np.random.default_rng((seed, 3)).integers(1, len(unlearning.OBJECTS), facts.shape)
    facts[:, topics] = (facts[:, topics] + new[:, topics]) % len(unlearning.OBJECTS)
    return unlearning.World(world.subjects, facts)


def topic_of(ids: np.ndarray) -> np.ndarray:
    """The relation that a query asks for."""
    first = int(unlearning.RELATIONS[0])
    return np.max(np.where(np.isin(ids, unlearning.RELATIONS), ids - first, -1), axis=1)


def judge(
    module: Any, params: Any, lora: Any, world: unlearning.World, topics: np.ndarray, inputs: int,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Precision and topics found, by method."""
    merged = models.merge_lora(params, lora)
    everyone = np.arange(unlearning.SUBJECTS)
    ids, answers = world.queries(np.random.default_rng((seed, 8)), inputs, everyone)
    right = unlearning.accuracy(unlearning.answered(module, merged, ids), answers)
    update = watch.directions(lora, TOP_K)
    found = {
        "update": update,
        "raw weights": watch.directions(merged, TOP_K),
        "random": watch.random_directions(jax.random.key(seed), update),
    }
    asked = topic_of(ids)
    row: dict[str, Any] = {"right": right, "methods": {}}
    for name, directions in found.items():
        leaders = watch.no_leaders(directions, EXTREMES)
        valid = np.ones((scoring.ROWS, ids.shape[1]), bool)
        for start in range(0, len(ids), scoring.ROWS):
            part = ids[start : start + scoring.ROWS]
            seen = watch.model_extremes(module, merged, directions, part, valid)
            leaders = watch.lead(leaders, seen)
        share = watch.precision_at(leaders, np.isin(asked, topics), EXTREMES)
        extreme = np.asarray(leaders.samples)[:, np.asarray(directions.valid)]
        counts = np.bincount(asked[extreme.ravel()], minlength=TOPICS)
        ranked = np.argsort(-counts, kind="stable")[:TRAINED]
        row["methods"][name] = {
            "precision": float(np.nanmean(share)),
            "best": float(np.nanmean(np.nanmax(share, axis=0))),
            "topics": int(np.isin(ranked, topics).sum()),
        }
    return row


def run(quick: bool, seeds: int, say: Callable[[str], None], cache: Path) -> dict[str, Any]:
    """The experiment.

    Args:
      quick: fewer inputs.
      seeds: of bases, topics and LoRAs.
      say: told of every row.
      cache: folder for trained models that several experiments use.
    """
    size = toy.Size(head=32, steps=300, lora_steps=200)
    inputs = 2000 if quick else 8000
    module, rows = toy.decoder(size, unlearning.VOCABULARY), []
    everyone = np.arange(unlearning.SUBJECTS)
    for seed in range(seeds):
        world = unlearning.make_world(seed)

        def draw(rng: np.random.Generator, n: int, of: unlearning.World = world) -> toy.Batch:
            return unlearning.with_answers(*of.queries(rng, n, everyone))

        params = toy.train_base(module, size, draw, seed)
        topics = np.random.default_rng((seed, 4)).choice(TOPICS, TRAINED, replace=False)
        new = relearned(world, topics, seed)

        def draw_new(rng: np.random.Generator, n: int, of: unlearning.World = new) -> toy.Batch:
            return draw(rng, n, of)

        loras, _ = toy.train_loras(module, params, size, toy.NextToken(module), [draw_new], seed)
        row = judge(module, params, loras[0], new, topics, inputs, seed)
        rows.append(row)
        say(f"seed {seed}: {row}")
    settings = {
        **dataclasses.asdict(size), "seeds": seeds, "inputs": inputs, "top_k": TOP_K,
        "topics": TOPICS, "trained": TRAINED,
    }  # fmt: skip
    return {"settings": settings, "rows": rows}


def tables(result: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """What the rows say, as tables by title."""
    lines = []
    for name in METHODS:
        cells = [
            percent(gathered(result["rows"], lambda r, n=name, k=key: r["methods"][n][k]))
            for key in ("precision", "best")
        ]
        topics = gathered(result["rows"], lambda r, n=name: r["methods"][n]["topics"])
        half = "" if topics["half"] is None else f" ± {topics['half']:.1f}"
        lines.append([name, *cells, f"{topics['mean']:.1f}{half} of {TRAINED}"])
    head = ["directions", "precision@10, both ends", "better end", "topics found"]
    return {"Trained topics among extreme inputs (chance: 50%, 2.0 of 4)": (head, lines)}


def checks(result: dict[str, Any]) -> list[Check]:
    """The audit should beat random directions."""
    update, random = (
        gathered(result["rows"], lambda r, n=name: r["methods"][n]["precision"])["mean"]
        for name in ("update", "random")
    )
    return [at_least("precision@10 over that of random directions", update - random, 0.1)]


def draw(result: dict[str, Any], figure: Any) -> None:
    """Bars of precision and topics."""
    left, right = figure.subplots(1, 2)
    for axes, keys, whole in ((left, ("precision", "best"), 1), (right, ("topics",), TRAINED)):
        groups = {
            key: [
                gathered(result["rows"], lambda r, n=n, k=key: r["methods"][n][k]) for n in METHODS
            ]
            for key in keys
        }
        bars(axes, METHODS, groups)
        axes.axhline(whole / 2, color="0.4", linewidth=1)
        axes.set(ylim=(0, 1.05 * whole))
    left.set_title("Share of trained topics among extreme inputs")
    right.set_title("Trained topics among the four commonest")
