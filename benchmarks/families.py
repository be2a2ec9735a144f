"""Families of merged models from real adapters: the stacks that benchmarks recover from.

    python -m benchmarks.families minilm-oneseed 5

prints recipes, the size of the updates and how near the models' spaces lie to each other. Sets are
those that `benchmarks.train_adapters` trains and two that the repository holds: `minilm-distinct`
and `minilm-same`.
"""

import dataclasses
import json
import os
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import app
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_DATA = Path(__file__).parent.parent / "tests" / "data"
COMMITTED = {
    "minilm-distinct": _DATA / "distinct_tasks_r16",
    "minilm-same": _DATA / "same_task_r32",
}


@dataclasses.dataclass(frozen=True)
class Factors:
    """One update: M = scaling * (left @ right), as PEFT has it.

    Attributes:
      left: B [row, rank], float32.
      right: A [rank, col], float32.
      scaling: alpha / rank.
    """

    left: np.ndarray
    right: np.ndarray
    scaling: float

    def update(self) -> np.ndarray:
        """M as PEFT computes it: product and scaling each rounded to float32."""
        return (self.left @ self.right) * np.float32(self.scaling)


@dataclasses.dataclass(frozen=True)
class Description:
    """What a benchmark says about its family.

    Attributes:
      recipes: one line a model.
      ratio: rms(M) / rms(W) of every layer and model, [layer, model].
      ranks: of every layer and model, [layer, model].
      col_angle: smallest principal angle of two models' column spaces, degrees, [layer].
      row_angle: the same of row spaces.
    """

    recipes: list[str]
    ratio: np.ndarray
    ranks: np.ndarray
    col_angle: np.ndarray
    row_angle: np.ndarray

    def text(self) -> str:
        """Recipes and figures in a few lines."""

        def spread(values: np.ndarray, unit: str = "") -> str:
            low, mid, high = np.min(values), np.median(values), np.max(values)
            return f"{low:.3g} to {high:.3g}{unit} (median {mid:.3g}{unit})"

        found = sorted(set(self.ranks.ravel().tolist()))
        return "\n".join(
            [
                *self.recipes,
                f"{len(self.ratio)} layer(s), ranks {', '.join(map(str, found))}",
                f"rms(M)/rms(W): {spread(self.ratio)}",
                f"smallest principal angle, column spaces: {spread(self.col_angle, ' deg')}",
                f"smallest principal angle, row spaces: {spread(self.row_angle, ' deg')}",
            ]
        )


def cache_folder(given: str | None = None) -> Path:
    """Where adapters are kept: as given, else $JDETUNE_CACHE, else ~/.cache/jdetune/adapters."""
    default = os.environ.get("JDETUNE_CACHE") or Path.home() / ".cache" / "jdetune" / "adapters"
    return Path(given or default).expanduser()


def set_folder(set_name: str) -> Path:
    """Folder of a set's adapters, committed or trained."""
    if set_name in COMMITTED:
        return COMMITTED[set_name]
    return cache_folder() / set_name


def adapter_folders(set_name: str, count: int | None = None) -> list[Path]:
    """The first `count` adapters of a set.

    Raises:
      FileNotFoundError: fewer are there; says how to train them.
    """
    folder = set_folder(set_name)
    found = sorted(p.parent for p in folder.glob("[0-9][0-9]/adapter_model.safetensors"))
    if not found or len(found) < (count or 0):
        make = f"python -m benchmarks.train_adapters --set={set_name}"
        raise FileNotFoundError(f"{set_name}: {len(found)} of {count} adapters; train: {make}")
    return found[:count]


def read_adapter(folder: Path) -> dict[str, Factors]:
    """Factors of a PEFT adapter by the name of the base's tensor, each with its own scaling."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    factors = {}
    for key in sorted(tensors):
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        left = tensors[key.replace("lora_A", "lora_B")].astype(np.float32)
        right = tensors[key].astype(np.float32)
        alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
        scaling = alpha / right.shape[0]
        factors[f"{module}.weight"] = Factors(left, right, scaling)
    return factors


def factors(set_name: str, count: int | None = None) -> dict[str, list[Factors]]:
    """True updates by tensor name, one a model."""
    models = [read_adapter(folder) for folder in adapter_folders(set_name, count)]
    return {name: [model[name] for model in models] for name in models[0]}


def base_weights(set_name: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Float32 weights of the set's base model, by the names that the model in memory has.

    Models that take long to convert are kept beside the adapters after the first time.
    """
    from benchmarks import real_models

    if set_name.startswith("minilm"):
        path = real_models.weights_file("minilm")
    else:
        path = _converted(set_name.partition("-")[0])
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in names}


def _converted(model: str) -> Path:
    """The linear layers of a converted model, as safetensors in the cache."""
    from benchmarks import real_models

    real_models.weights_file(model)  # says what to install
    path = cache_folder() / "base" / f"{model}.safetensors"
    if not path.exists():
        state = real_models.load(model)[0].state_dict()
        kept = {n: v.numpy() for n, v in state.items() if v.ndim == 2 and "embed" not in n}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(
            {n: np.ascontiguousarray(v) for n, v in kept.items() if n != "lm_head.weight"}, part
        )
        part.rename(path)
    return path


def merge(base: np.ndarray, update: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """PEFT's default rule R1: the sum in float32, rounded once to the stored dtype."""
    return (base.astype(np.float32) + update).astype(DTYPES[dtype])


def merged_stacks(
    set_name: str,
    count: int | None = None,
    dtype: str = "float32",
    base_grid: str | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """True bases and merged models of a set.

    Args:
      set_name: a trained set, "minilm-distinct" or "minilm-same".
      count: how many models, the first ones; all if None.
      dtype: how merged models are stored: "float32", "float16" or "bfloat16".
      base_grid: dtype that the base is rounded to before merging; None leaves it in float32.

    Returns:
      Tensor name to (base [row, col] in `base_grid`, merged [model, row, col] in `dtype`).
    """
    updates = factors(set_name, count)
    stacks = {}
    for name, weights in base_weights(set_name, tuple(updates)).items():
        base = weights.astype(DTYPES[base_grid or "float32"])
        models = [merge(base, one.update(), dtype) for one in updates[name]]
        stacks[name] = (base, np.stack(models))
    return stacks


@cache
def describe(set_name: str, count: int | None = None) -> Description:
    """Recipes, size of the updates and principal angles of a family."""
    updates = factors(set_name, count)
    bases = base_weights(set_name, tuple(updates))
    recipes = [_recipe(folder) for folder in adapter_folders(set_name, count)]
    return measured(recipes, bases, updates)


def measured(
    recipes: list[str], bases: dict[str, np.ndarray], updates: dict[str, list[Factors]]
) -> Description:
    """Size and principal angles of given updates.

    Args:
      recipes: what to say of how the updates came about.
      bases: true base by tensor name.
      updates: true updates by tensor name, one a model.
    """
    ratio = [[_rms(one.update()) / _rms(bases[n]) for one in u] for n, u in updates.items()]
    ranks = [[one.right.shape[0] for one in u] for u in updates.values()]
    cols = [_least_angle([one.left for one in u]) for u in updates.values()]
    rows = [_least_angle([one.right.T for one in u]) for u in updates.values()]
    return Description(recipes, *(np.array(v) for v in (ratio, ranks, cols, rows)))


def _rms(matrix: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(matrix, dtype=np.float64))))


def _least_angle(spans: list[np.ndarray]) -> float:
    """Smallest principal angle of any two column spans in degrees; the sine shows tiny ones."""
    bases = [np.linalg.qr(span.astype(np.float64))[0] for span in spans]
    sines = [
        np.linalg.norm(small - big @ (big.T @ small), -2)
        for one, two in combinations(bases, 2)
        for big, small in [sorted((one, two), key=lambda b: -b.shape[1])]
    ]
    return float(np.degrees(np.arcsin(np.clip(min(sines), 0, 1)))) if sines else 90.0


def _recipe(folder: Path) -> str:
    path = folder / "recipe.json"
    if not path.exists():
        return f"{folder.parent.name}/{folder.name}: committed adapter, see tests/data/README.md"
    r = json.loads(path.read_text())
    return (
        f"{r['set']}/{r['index']:02d}: {r['task']}; ranks {r['ranks']}, seed {r['seed']},"
        f" {r['steps']} steps of {r['batch']}, lr {r['lr']};"
        f" loss {r['loss_before']:.3f} to {r['loss_after']:.3f}"
    )


def main(argv: list[str]) -> None:
    """Describes a family."""
    if len(argv) not in (2, 3):
        raise app.UsageError("python -m benchmarks.families SET [MODELS]")
    print(describe(argv[1], int(argv[2]) if len(argv) > 2 else None).text())


if __name__ == "__main__":
    app.run(main)
