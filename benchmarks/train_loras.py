"""Trains the adapters of LoWRA Bench's real subsets in Flax and Optax, many at once.

    python -m benchmarks.train_loras
    python -m benchmarks.train_loras --subset=dinov2,minilm-same --count=5
    python -m benchmarks.train_loras --quick

writes PEFT folders CACHE/lowra/SUBSET/00, 01, ... in float32 with `recipe.json` (CACHE/lowra-quick
with --quick). An adapter that is there is not trained again; a stopped run goes on with the next
ones. Which adapters are trained side by side changes them by rounding only: data and first factors
come from each adapter's own seed.
"""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
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

from benchmarks import fit_loras, lora_data, lora_losses, real_models  # noqa: E402
from benchmarks.lora_cache import adapter_folders, subset_folder  # noqa: E402
from benchmarks.lora_recipes import TRAININGS, Training  # noqa: E402
from jdetune import models  # noqa: E402
from jdetune.checkpoint import save_json, save_safetensors  # noqa: E402
from jdetune.models.names import canonical_module  # noqa: E402

#: Adapters that are trained side by side: as many as fit a few GiB.
AT_ONCE = {"minilm": 15, "dinov2": 15, "smollm2": 5}
#: Examples that the loss before and after is of.
CHECKED = {"minilm": 64, "dinov2": 64, "smollm2": 8}
#: Steps of a compiled call.
STEPS_AT_ONCE = 4
QUICK = {"count": 5, "steps": 8}


@dataclasses.dataclass(frozen=True)
class Model:
    """A real model, ready to be fine-tuned.

    Attributes:
      module: its architecture.
      params: its weights.
      modules: path of a linear layer here to its module's name in transformers.
      tokenizer: or None.
      origin: where the weights are from.
    """

    module: Any
    params: models.Params
    modules: dict[str, str]
    tokenizer: Any
    origin: str


def load_model(name: str) -> Model:
    """A model of `real_models`, in Flax."""
    theirs, tokenizer, origin = real_models.load(name)
    tensors = {key: value.detach().numpy() for key, value in theirs.state_dict().items()}
    module = models.build(theirs.config.to_dict(), tensors)
    paths = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    modules = {canonical_module(module, path): path for path in paths}
    return Model(module, models.load_params(module, tensors), modules, tokenizer, origin)


def ranks_of(subset: Training, paths: Sequence[str], seed: int) -> dict[str, int]:
    """Rank of every layer of one adapter; where they are mixed, a third differ from the rest."""
    if isinstance(subset.rank, int):
        return dict.fromkeys(paths, subset.rank)
    rng = np.random.default_rng(seed)
    ranks = dict.fromkeys(paths, int(rng.choice(subset.rank)))
    for path in rng.choice(list(paths), len(paths) // 3, replace=False):
        ranks[str(path)] = int(rng.choice(subset.rank))
    return ranks


def first_factors(
    subset: Training, module: Any, index: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """Factors that an adapter starts from, padded to one rank, and its ranks."""
    seed = subset.seed + index
    targets = subset.targets if isinstance(subset.targets, str) else list(subset.targets)
    paths = list(models.linear_layers(module, targets))
    ranks = ranks_of(subset, paths, seed)
    width = subset.rank if isinstance(subset.rank, int) else max(subset.rank)
    key = jax.random.key(subset.seed if subset.one_init else seed)
    drawn = models.init_lora(module, key, width, targets)
    cut = {p: jnp.where(jnp.arange(width)[:, None] < ranks[p], f.a, 0) for p, f in drawn.items()}
    return {p: models.Lora(cut[p], drawn[p].b, drawn[p].scaling) for p in paths}, ranks


def examples(subset: Training, model: Model, index: int) -> lora_data.Examples:
    """What one adapter is trained on."""
    task = index % subset.tasks
    if subset.kind == "images":
        return lora_data.image_task(task)
    encode = lambda text: model.tokenizer(text)["input_ids"]  # noqa: E731
    if subset.kind == "texts":
        cut = {"truncation": True, "max_length": lora_data.TEXT_TOKENS}
        return lora_data.text_task(task, lambda text: model.tokenizer(text, **cut)["input_ids"])
    # preferences go on with the share of the corpus that the adapter was tuned on
    seed = (TRAININGS[subset.start].seed if subset.start else subset.seed) + index
    end = model.tokenizer.eos_token_id
    return lora_data.questions(seed, encode, end, mismatched=subset.kind == "dpo")


def train(
    name: str,
    subset: Training,
    model: Model,
    indices: Sequence[int],
    start: Sequence[Path],
    say: Any,
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Trains adapters side by side.

    Args:
      name: of the subset.
      subset: how they are trained.
      model: their base.
      indices: their numbers.
      start: folder of the adapter that each goes on from, where the subset has such.
      say: told of every few steps.

    Returns:
      Recipe and factors, path to (A, B), of each.
    """
    began = time.perf_counter()
    firsts = [first_factors(subset, model.module, index) for index in indices]
    if start:
        firsts = [
            (models.load_lora(model.module, folder), ranks)
            for folder, (_, ranks) in zip(start, firsts, strict=True)
        ]
    data = [examples(subset, model, index) for index in indices]
    recipe = fit_loras.Recipe(subset.steps, subset.lr)
    loras = models.stack_adapters([factors for factors, _ in firsts])
    trainable: dict[str, Any] = {"lora": loras}
    if subset.kind in ("images", "texts"):
        width = model.module.config.hidden_size
        trainable["head"] = lora_losses.first_heads(len(indices), width, lora_data.CLASSES)
    loss = lora_losses.loss_of(subset.kind, model.module)
    checks = _stacked([one.check(CHECKED[subset.model]) for one in data])
    reference = None
    if subset.kind == "dpo":
        reference = partial(lora_losses.reference, model.module, model.params, loras)
        checks = reference(checks)
    before = lora_losses.every(loss, trainable, checks, model.params)
    rngs = [np.random.default_rng(subset.seed + index) for index in indices]
    state, losses = fit_loras.start(recipe, trainable), []
    for done in range(0, subset.steps, STEPS_AT_ONCE):
        steps = []
        for _ in range(min(STEPS_AT_ONCE, subset.steps - done)):
            drawn = [one.draw(rng, subset.batch) for one, rng in zip(data, rngs, strict=True)]
            steps.append(_stacked(drawn) if reference is None else reference(_stacked(drawn)))
        trainable, state, values = fit_loras.advance(
            recipe, loss, trainable, state, _stacked(steps), model.params
        )
        losses.append(np.asarray(values))
        say(done + len(steps), float(losses[-1].mean()))
    after = lora_losses.every(loss, trainable, checks, model.params)
    seconds = time.perf_counter() - began
    found = []
    for place, (index, (_, ranks)) in enumerate(zip(indices, firsts, strict=True)):
        told = {
            "subset": name,
            "index": index,
            "model": model.origin,
            "task": data[place].name,
            "data": data[place].data,
            "ranks": sorted(set(ranks.values())),
            "targets": subset.targets,
            "seed": subset.seed + index,
            "one_init": subset.one_init,
            "start": subset.start,
            "steps": subset.steps,
            "batch": subset.batch,
            "lr": subset.lr,
            "optimizer": "AdamW, weight decay 0.01, lr falls to 0, gradient norm at most 1",
            "loss_before": float(before[place]),
            "loss_after": float(after[place]),
            "side_by_side": len(indices),
            "seconds_of_all": round(seconds, 1),
            "versions": {"jax": jax.__version__, "numpy": np.__version__},
        }
        factors = {
            path: (np.asarray(f.a[place])[: ranks[path]], np.asarray(f.b[place])[:, : ranks[path]])
            for path, f in trainable["lora"].items()
        }
        found.append((told, factors))
    return found


def write(folder: Path, model: Model, hub_id: str, recipe: dict[str, Any], factors: Any) -> None:
    """Writes a PEFT adapter beside its place, then renames: a folder that exists is whole."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    named = {model.modules[path]: pair for path, pair in factors.items()}
    tensors = {}
    for module, (a, b) in named.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b)
    save_safetensors(part / "adapter_model.safetensors", tensors)
    ranks = {module: len(a) for module, (a, _) in named.items()}
    common = max(ranks.values())
    pattern = {module: rank for module, rank in ranks.items() if rank != common}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if isinstance(model.module, models.Llama) else None,
        "base_model_name_or_path": hub_id,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(named),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    save_json(part / "adapter_config.json", config)
    save_json(part / "recipe.json", recipe)
    part.rename(folder)


def _stacked(parts: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *values: np.stack(values), *parts)


def _same_recipe(folder: Path, subset: Training, index: int) -> None:
    """Refuses to go on beside adapters that were made in another way."""
    told = json.loads((folder / "recipe.json").read_text())
    wanted = {"steps": subset.steps, "batch": subset.batch, "seed": subset.seed + index}
    wanted |= {"targets": json.loads(json.dumps(subset.targets)), "lr": subset.lr}
    if isinstance(subset.rank, int):
        wanted["ranks"] = [subset.rank]
    other = {key: told.get(key) for key, value in wanted.items() if told.get(key) != value}
    if other:
        raise app.UsageError(
            f"{folder} was trained with {other}; choose another --cache or remove it."
        )


def run(name: str, subset: Training, quick: bool, cache: str | None) -> list[dict[str, Any]]:
    """Trains what a subset lacks, and returns all recipes."""
    folder = subset_folder(name, cache, quick)
    folder.mkdir(parents=True, exist_ok=True)
    places = [folder / f"{index:02d}" for index in range(subset.count)]
    for index, place in enumerate(places):
        if place.exists():
            _same_recipe(place, subset, index)
    todo = [index for index, place in enumerate(places) if not place.exists()]
    starts: list[Path] = []
    if subset.start and todo:
        starts = adapter_folders(subset.start, cache, quick, subset.count)
    if todo:
        model = load_model(subset.model)
        hub_id = real_models.SOURCES[subset.model].hub_id
        size = AT_ONCE[subset.model]
        for at in range(0, len(todo), size):
            some = todo[at : at + size]
            label = f"{name} {some[0]:02d}-{some[-1]:02d}"
            say = partial(_say, label, subset.steps, time.perf_counter())
            for recipe, factors in train(
                name, subset, model, some, [starts[i] for i in some] if starts else [], say
            ):
                write(places[recipe["index"]], model, hub_id, recipe, factors)
    return [json.loads((place / "recipe.json").read_text()) for place in places]


def _say(what: str, steps: int, began: float, done: int, loss: float) -> None:
    left = (time.perf_counter() - began) / done * (steps - done)
    told = f"{what}: step {done} of {steps}, loss {loss:.3f}, {left:.0f} s left"
    print(told, file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    """Trains the subsets and prints one line an adapter."""
    values = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unexpected: {' '.join(argv[1:])}")
    unknown = set(values.subset) - set(TRAININGS)
    if unknown:
        raise app.UsageError(f"--subset is of {', '.join(TRAININGS)}; got {', '.join(unknown)}")
    given = {key: getattr(values, key) for key in ("count", "rank", "steps", "seed")}
    given["targets"] = tuple(values.targets) if values.targets else None
    changes = (QUICK if values.quick else {}) | {k: v for k, v in given.items() if v is not None}
    began = time.perf_counter()
    print("| adapter | task | ranks | seed | steps | held-out loss before | after |")
    print("|---|---|---|---|---|---|---|")
    for name in values.subset:
        start = time.perf_counter()
        for r in run(
            name, dataclasses.replace(TRAININGS[name], **changes), values.quick, values.cache
        ):
            ranks = ", ".join(map(str, r["ranks"]))
            print(
                f"| {name}/{r['index']:02d} | {r['task']} | {ranks} | {r['seed']} | {r['steps']} |"
                f" {r['loss_before']:.3f} | {r['loss_after']:.3f} |",
                flush=True,
            )
        print(f"\n{name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    print(f"all: {time.perf_counter() - began:.0f} s")


def define_flags() -> None:
    """The flags of this command."""
    flags.DEFINE_list("subset", list(TRAININGS), f"Of {', '.join(TRAININGS)}.")
    flags.DEFINE_integer("count", None, "Adapters of a subset.", lower_bound=1)
    flags.DEFINE_integer("rank", None, "Rank of every layer.", lower_bound=1)
    flags.DEFINE_list("targets", None, "Last words of the layers' names.")
    flags.DEFINE_integer("seed", None, "Seed of adapter 0.")
    flags.DEFINE_integer("steps", None, "Training steps.", lower_bound=1)
    flags.DEFINE_string("cache", None, "Folder of adapters; $JDETUNE_CACHE if not given.")
    flags.DEFINE_bool("quick", False, "Few adapters, few steps, in a folder of their own.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
