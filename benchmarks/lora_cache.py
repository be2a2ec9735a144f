"""Where the LoWRA adapters are kept: subsets, folders, the models that they belong to.

    CACHE/lowra/SUBSET/00 to 14     PEFT adapters, each with recipe.json
    CACHE/lowra/base/MODEL          config.json, model.safetensors and tokenizer, float32

``--quick`` adapters are in CACHE/lowra-quick. `benchmarks.train_loras` makes them all.
"""

import dataclasses
import os
import shutil
from pathlib import Path

from benchmarks import real_models
from jdetune.models import Model, Params, load, load_lora
from jdetune.models.layers import Lora

COUNT = 15
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
#: Every linear layer of a BERT block.
BERT_LINEAR = r"encoder\.layer\.\d+\..*(query|key|value|dense)"


@dataclasses.dataclass(frozen=True)
class Subset:
    """A family of adapters of one real model.

    Attributes:
      name: of the subset.
      model: a key of `real_models.SOURCES`.
      rank: of every layer, or the ranks that are drawn from.
      targets: as PEFT's ``target_modules``, by jdetune's names.
      about: what differs between its adapters, in words.
    """

    name: str
    model: str
    rank: int | tuple[int, ...]
    targets: tuple[str, ...] | str
    about: str


_QV = ("query", "value")
SUBSETS = {
    one.name: one
    for one in (
        # 3 * 32 = 96 of the 192 rows of k and v. 64 would fill them with three models: nothing
        # would be left over to tell an update's directions from rounding.
        Subset("smollm2-sft", "smollm2", 32, ATTENTION, "random 80% of one corpus each"),
        Subset("smollm2-dpo", "smollm2", 32, ATTENTION, "DPO that goes on from each SFT"),
        Subset("dinov2", "dinov2", 16, _QV, "one image task each"),
        Subset("minilm-distinct", "minilm", 16, _QV, "one text task each"),
        Subset("minilm-same", "minilm", 16, _QV, "one task, batches of their own"),
        Subset("minilm-oneseed", "minilm", 16, _QV, "one text task each, one initial A"),
        Subset("minilm-mixed", "minilm", (4, 8, 16, 32), BERT_LINEAR, "ranks of their own"),
    )
}


def cache_root(given: str | Path | None = None, quick: bool = False) -> Path:
    """Folder of all subsets: in the one given, else $JDETUNE_CACHE, else ~/.cache/jdetune."""
    default = os.environ.get("JDETUNE_CACHE") or Path.home() / ".cache" / "jdetune"
    return Path(given or default).expanduser() / ("lowra-quick" if quick else "lowra")


def subset_folder(name: str, cache: str | Path | None = None, quick: bool = False) -> Path:
    """Folder of a subset's adapters."""
    return cache_root(cache, quick) / SUBSETS[name].name


def adapter_folders(
    name: str, cache: str | Path | None = None, quick: bool = False, count: int | None = None
) -> list[Path]:
    """Whole adapters of a subset, in order.

    Args:
      name: a key of `SUBSETS`.
      cache: the cache; the default one if None.
      quick: those of ``--quick``.
      count: the first so many; all that are there if None.

    Raises:
      FileNotFoundError: fewer are there, or none; says how to train them.
    """
    found = sorted(p.parent for p in subset_folder(name, cache, quick).glob("[0-9]*/recipe.json"))
    if not found or len(found) < (count or 0):
        wanted = "no" if count is None else f"{len(found)} of {count}"
        flags = f" --cache={cache}" * bool(cache) + " --quick" * quick
        raise FileNotFoundError(
            f"{name}: {wanted} adapters in {subset_folder(name, cache, quick)}; train them: "
            f"python -m benchmarks.train_loras --subset={name}{flags}"
        )
    return found[:count]


def base_folder(model: str, cache: str | Path | None = None) -> Path:
    """Folder of a base model as transformers saves it; converted at the first call.

    Args:
      model: a key of `real_models.SOURCES`.
      cache: the cache; the default one if None.

    Raises:
      ModuleNotFoundError: the package that ships the model is missing; says how to install it.
    """
    weights = real_models.weights_file(model)
    if weights.name == "model.safetensors":
        return weights.parent
    folder = cache_root(cache) / "base" / model
    if not folder.exists():
        theirs, tokenizer, _ = real_models.load(model)
        part = folder.with_name(f"{model}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        theirs.hf_quantizer = None  # the weights are plain float32 now
        theirs.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        part.rename(folder)
    return folder


def base(model: str, cache: str | Path | None = None) -> tuple[Model, Params]:
    """The Flax module of a base model and its float32 weights by tensor name."""
    return load(base_folder(model, cache))


def factors(module: Model, folders: list[Path]) -> dict[str, list[Lora]]:
    """Factors of adapters by the name of the base's tensor (``....weight``), one an adapter."""
    every = [load_lora(module, folder) for folder in folders]
    return {f"{path}.weight": [one[path] for one in every] for path in every[0]}
