"""Trains real LoRA adapters with PEFT, for benchmarks to merge and take apart again.

    python -m benchmarks.train_adapters --set=minilm-oneseed

writes PEFT folders CACHE/SET/00, 01, ... with the weights in float32 and `recipe.json`. An adapter
that is there is never trained again; a stopped run goes on with the next one.
"""

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import app, flags

from benchmarks import real_models, tasks
from benchmarks.families import cache_folder

RANKS = (4, 8, 16, 32)
SEED = 42


@dataclasses.dataclass(frozen=True)
class AdapterSet:
    """How the adapters of a set are made.

    Attributes:
      model: a key of `real_models.SOURCES`.
      count: adapters made by default.
      targets: PEFT's `target_modules`: names, or one regular expression.
      rank: rank of every layer, or None for ranks drawn from `RANKS`.
      one_seed: every adapter starts from the same `lora_A`.
      steps: training steps.
      lr: learning rate of AdamW at the first step; it falls linearly to zero.
      first_seed: seed of adapter 0.
    """

    model: str
    count: int
    targets: list[str] | str
    rank: int | None
    one_seed: bool
    steps: int
    lr: float
    first_seed: int


SETS = {
    "minilm-oneseed": AdapterSet("minilm", 6, ["query", "value"], 16, True, 80, 1e-3, 1000),
    "minilm-mixed": AdapterSet(
        "minilm", 8, r"encoder\.layer\.\d+\..*(query|key|value|dense)", None, False, 100, 1e-3, 2000
    ),
    "dinov2-digits": AdapterSet("dinov2", 8, ["q_proj", "v_proj"], 16, False, 100, 1e-3, 3000),
    "smollm2-sft": AdapterSet("smollm2", 8, ["q_proj", "v_proj"], 16, False, 80, 1e-3, 4000),
}
BATCH = 32
LORA_NAMES = {"q_proj": "query", "v_proj": "value"}

_SET = flags.DEFINE_enum("set", None, list(SETS), "Which adapters to train.")
_COUNT = flags.DEFINE_integer("count", None, "How many; the set's own number if not given.")
_STEPS = flags.DEFINE_integer("steps", None, "Training steps; the set's own number if not given.")
_CACHE = flags.DEFINE_string("cache", None, "Folder of adapters; $JDETUNE_CACHE if not given.")


def train(set_name: str, index: int, folder: Path, steps: int | None = None) -> dict[str, Any]:
    """Trains one adapter and writes it, unless it is there.

    Args:
      set_name: a key of `SETS`.
      index: number of the adapter; chooses task and seed.
      folder: where the set's adapters are.
      steps: training steps, the set's own number if None.

    Returns:
      The recipe.
    """
    out = folder / f"{index:02d}"
    if (out / "recipe.json").exists():
        return json.loads((out / "recipe.json").read_text())
    spec = SETS[set_name]
    base, tokenizer, origin = real_models.load(spec.model)
    seed = SEED if spec.one_seed else spec.first_seed + index
    torch.manual_seed(seed)
    task = _task(spec.model, index, tokenizer)
    model, config = _wrap(base, spec, index, seed)
    fit = _fit(model, task, spec, steps or spec.steps, spec.first_seed + index)
    ranks = sorted({config.r, *config.rank_pattern.values()})
    recipe = {
        "set": set_name,
        "index": index,
        "model": origin,
        "task": task.name,
        "data": task.data,
        "seed": seed,
        "data_seed": spec.first_seed + index,
        "targets": spec.targets,
        "ranks": ranks,
        "optimizer": "AdamW, weight decay 0.01, lr falls linearly to 0, gradient norm at most 1",
        "batch": BATCH,
        "lr": spec.lr,
        **fit,
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "peft", "transformers")},
    }
    if not fit["loss_after"] < fit["loss_before"]:
        raise RuntimeError(f"{set_name}/{index:02d}: the loss did not fall: {fit}")
    _write(model, recipe, out)
    return recipe


def _task(model: str, index: int, tokenizer: Any) -> tasks.Task:
    if model == "dinov2":
        return tasks.digit_task(index)
    if model == "smollm2":
        return tasks.language_task(index, tokenizer)
    return tasks.text_task(index, tokenizer)


def _wrap(base: Any, spec: AdapterSet, index: int, seed: int) -> tuple[Any, Any]:
    """The PEFT model and its config; scaling is 1 in every layer."""
    from peft import LoraConfig, get_peft_model

    pattern = {} if spec.rank else _mixed_ranks(base, spec, index)
    rank = spec.rank or RANKS[index % len(RANKS)]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_present(base, spec.targets),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        base_model_name_or_path=real_models.SOURCES[spec.model].hub_id,
    )
    torch.manual_seed(seed)  # right before the factors are drawn: one seed, one lora_A
    return get_peft_model(base, config), config


def _present(base: Any, targets: list[str] | str) -> list[str] | str:
    """Target names as this version of transformers has them."""
    if isinstance(targets, str):
        return targets
    leaves = {name.rsplit(".", 1)[-1] for name, _ in base.named_modules()}
    return [name if name in leaves else LORA_NAMES[name] for name in targets]


def _mixed_ranks(base: Any, spec: AdapterSet, index: int) -> dict[str, int]:
    """A third of the layers have a rank of their own; the rest have their model's."""
    rng = np.random.default_rng(spec.first_seed + index)
    assert isinstance(spec.targets, str)
    layers = [n for n, _ in base.named_modules() if re.fullmatch(spec.targets, n)]
    own = rng.choice(layers, len(layers) // 3, replace=False)
    return {str(name): int(rng.choice(RANKS)) for name in sorted(own)}


def _fit(model: Any, task: tasks.Task, spec: AdapterSet, steps: int, seed: int) -> dict[str, Any]:
    """Trains in place; losses are of the same 128 examples, drawn apart from training."""
    rng, held_out = np.random.default_rng(seed), np.random.default_rng(seed + 500)
    checks = [task.draw(held_out, BATCH) for _ in range(4)]
    weights = [p for p in model.parameters() if p.requires_grad]
    weights += list(task.head.parameters()) if task.head is not None else []
    optimizer = torch.optim.AdamW(weights, lr=spec.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.eval()  # no dropout
    before, start = _mean_loss(model, task, checks), time.perf_counter()
    for step in range(steps):
        loss = task.loss(model, task.draw(rng, BATCH))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            spent = time.perf_counter() - start
            print(f"  {task.name}: step {step} loss {loss.item():.4f} {spent:.0f} s", flush=True)
    return {
        "steps": steps,
        "loss_before": before,
        "loss_after": _mean_loss(model, task, checks),
        "seconds": round(time.perf_counter() - start, 1),
    }


@torch.no_grad()
def _mean_loss(model: Any, task: tasks.Task, batches: list[tasks.Batch]) -> float:
    return float(np.mean([task.loss(model, batch).item() for batch in batches]))


def _write(model: Any, recipe: dict[str, Any], out: Path) -> None:
    """Writes beside, then renames: a folder that exists is whole."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, save_embedding_layers=False)
    (part / "README.md").unlink(missing_ok=True)
    (part / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    part.rename(out)


def main(argv: list[str]) -> None:
    """Trains a set and prints one line an adapter."""
    if len(argv) > 1 or _SET.value is None:
        raise app.UsageError(f"--set is one of {', '.join(SETS)}; nothing else is expected")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder = cache_folder(_CACHE.value) / _SET.value
    folder.mkdir(parents=True, exist_ok=True)
    print("| adapter | task | ranks | seed | steps | loss before | after | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for index in range(_COUNT.value or SETS[_SET.value].count):
        r = train(_SET.value, index, folder, _STEPS.value)
        ranks = ", ".join(map(str, r["ranks"]))
        print(
            f"| {_SET.value}/{index:02d} | {r['task']} | {ranks} | {r['seed']} | {r['steps']} |"
            f" {r['loss_before']:.3f} | {r['loss_after']:.3f} | {r['seconds']} |",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
