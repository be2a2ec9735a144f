"""What the adapters of LoWRA Bench's real subsets have learned, on examples kept apart.

    python -m benchmarks.lora_scores
    python -m benchmarks.lora_scores --subset=dinov2 --examples=128

prints a score of every adapter beside that of the model it starts from: the share of images or
texts whose class is that of the nearest class mean (heads are thrown away after training, and this
needs none), the share of an answer's tokens that are the likeliest one, and the share of pairs in
which preference training raised the true answer more than the other one, counted from 0.5.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jdetune.cli.main import prepare_environment

if __name__ == "__main__":  # before JAX starts
    prepare_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402

from benchmarks import lora_data, lora_losses, train_loras  # noqa: E402
from benchmarks.lora_cache import adapter_folders  # noqa: E402
from benchmarks.lora_recipes import TRAININGS  # noqa: E402
from benchmarks.tables import table  # noqa: E402
from jdetune import models  # noqa: E402
from jdetune.models.evaluate import final_activations  # noqa: E402

#: Examples in a batch.
BATCH = 16


@dataclasses.dataclass(frozen=True)
class Score:
    """What one adapter has learned.

    Attributes:
      index: of the adapter.
      task: that it was trained on.
      before: score of the model that training started from.
      after: score with the adapter.
    """

    index: int
    task: str
    before: float
    after: float


#: (module, base's weights, factors, factors at the start) and examples to scores before and after.
Measure = Callable[[Any, Any, Any, Any, lora_data.Examples, int], tuple[float, float]]


def scores(
    name: str, model: train_loras.Model, cache: str | None, quick: bool, size: int
) -> list[Score]:
    """Scores of the adapters that are there.

    Args:
      name: of the subset.
      model: its base.
      cache: of adapters.
      quick: those of ``--quick``.
      size: examples of each adapter, all kept apart from training.
    """
    training = TRAININGS[name]
    folders = adapter_folders(name, cache, quick)
    recipes = [_recipe(folder) for folder in folders]
    own = _padded(model.module, folders)
    first, seeds = [_zeros(one) for one in own], [None] * len(own)
    if training.start:
        starts = [folder.parent.with_name(training.start) / folder.name for folder in folders]
        first, seeds = _padded(model.module, starts), [_recipe(s)["seed"] for s in starts]
    measure = _MEASURES[training.kind]
    found = []
    for recipe, factors, start, seed in zip(recipes, own, first, seeds, strict=True):
        index = recipe["index"]
        drawn = dataclasses.replace(training, seed=recipe["seed"] - index)
        data = train_loras.examples(drawn, model, index, seed)
        before, after = measure(model.module, model.params, factors, start, data, size)
        found.append(Score(index, recipe["task"], before, after))
    return found


def _recipe(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "recipe.json").read_text())


def _padded(module: Any, folders: list[Path]) -> list[dict[str, models.Lora]]:
    """Factors of adapters, all of one rank, so that one program runs them."""
    stacked = models.stack_adapters([models.load_lora(module, folder) for folder in folders])
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(len(folders))]


def _zeros(factors: dict[str, models.Lora]) -> dict[str, models.Lora]:
    return jax.tree.map(jnp.zeros_like, factors)


def nearest_mean(
    module: Any, params: Any, own: Any, start: Any, data: lora_data.Examples, size: int
) -> tuple[float, float]:
    """Share of examples whose class mean, of twice as many others, is the nearest one."""
    known, asked = data.draw(np.random.default_rng(1), 2 * size), data.check(size)

    def share(lora: Any) -> float:
        seen, new = (_vectors(module, params, lora, batch) for batch in (known, asked))
        names = np.unique(known["label"])
        means = np.stack([seen[known["label"] == label].mean(0) for label in names])
        nearest = np.argmin(((new[:, None] - means) ** 2).sum(-1), axis=1)
        return float(np.mean(names[nearest] == asked["label"]))

    return share(start), share(own)


def _vectors(module: Any, params: Any, lora: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    names = ("pixels",) if "pixels" in batch else ("ids", "mask")
    parts = [
        final_activations(module, params, *(values[n] for n in names), lora=lora)
        for values in _batches(batch)
    ]
    return np.concatenate([np.asarray(part) for part in parts])


def likeliest(
    module: Any, params: Any, own: Any, start: Any, data: lora_data.Examples, size: int
) -> tuple[float, float]:
    """Share of the answers' tokens that the model holds the likeliest one."""
    asked = data.check(size)

    def share(lora: Any) -> float:
        hits = [np.asarray(_hits(module, params, lora, part)) for part in _batches(asked)]
        return float(np.concatenate(hits)[asked["answered"][:, 1:]].mean())

    return share(start), share(own)


@partial(jax.jit, static_argnums=0)
def _hits(module: Any, params: Any, lora: Any, batch: Any) -> jax.Array:
    logits = models.run(module, params, batch["ids"], batch["mask"], lora=lora).logits
    return jnp.argmax(logits[:, :-1], axis=-1) == batch["ids"][:, 1:]


def preferred(
    module: Any, params: Any, own: Any, start: Any, data: lora_data.Examples, size: int
) -> tuple[float, float]:
    """Share of pairs in which the true answer gained more than the other; 0.5 at the start."""
    gains = [
        np.asarray(_likelihoods(module, params, own, part))
        - np.asarray(_likelihoods(module, params, start, part))
        for part in _batches(data.check(size))
    ]
    better, worse = np.concatenate(gains).T
    return 0.5, float(np.mean((better > worse) + 0.5 * (better == worse)))


@partial(jax.jit, static_argnums=0)
def _likelihoods(module: Any, params: Any, lora: Any, batch: Any) -> jax.Array:
    return lora_losses.likelihoods(module, params, lora, batch)


def _batches(values: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    rows = len(next(iter(values.values())))
    return [
        {name: array[at : at + BATCH] for name, array in values.items()}
        for at in range(0, rows, BATCH)
    ]


_MEASURES: dict[str, Measure] = {
    "images": nearest_mean,
    "texts": nearest_mean,
    "sft": likeliest,
    "dpo": preferred,
}


def main(argv: list[str]) -> None:
    """Prints one line an adapter, and the mean of each subset."""
    values = flags.FLAGS
    unknown = set(values.subset) - set(TRAININGS)
    if len(argv) > 1 or unknown:
        raise app.UsageError(f"--subset is of {', '.join(TRAININGS)}; nothing else is expected")
    base: dict[str, train_loras.Model] = {}
    for name in values.subset:
        kind = TRAININGS[name].model
        base[kind] = base.get(kind) or train_loras.load_model(kind)
        found = scores(name, base[kind], values.cache, values.quick, values.examples)
        rows = [[f"{s.index:02d}", s.task, f"{s.before:.3f}", f"{s.after:.3f}"] for s in found]
        means = [np.mean([getattr(s, part) for s in found]) for part in ("before", "after")]
        rows.append(["mean", "", *(f"{mean:.3f}" for mean in means)])
        print(f"{name}\n\n{table(['adapter', 'task', 'before', 'after'], rows)}\n", flush=True)


def define_flags() -> None:
    """The flags of this command."""
    flags.DEFINE_list("subset", list(TRAININGS), f"Of {', '.join(TRAININGS)}.")
    flags.DEFINE_integer("examples", 64, "Examples of each adapter.", lower_bound=BATCH)
    flags.DEFINE_string("cache", None, "Folder of adapters; $JDETUNE_CACHE if not given.")
    flags.DEFINE_bool("quick", False, "Adapters that --quick trained.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
