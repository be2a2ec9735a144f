"""Reads PEFT adapter folders and merges them as PEFT does."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jdetune.checkpoint import peft_layout as layout
from jdetune.checkpoint.adapters import CONFIG_NAME, WEIGHTS_NAME
from jdetune.checkpoint.index import Checkpoint, open_checkpoint, read_json
from jdetune.checkpoint.peft_tensors import nesting, unstack
from jdetune.checkpoint.reader import read_tensor
from jdetune.checkpoint.shapes import unit_name
from jdetune.errors import InputError

PICKLED_NAME = "adapter_model.bin"
#: Characters of a key of ``rank_pattern``.
_MAX_KEY = 1000
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
}


@dataclasses.dataclass(frozen=True)
class LoraUpdate:
    """One tensor's factors: the update is ``scaling * left @ right``, in the tensor's own shape.

    Attributes:
      left: [row, rank], float32, unscaled.
      right: [rank, col], float32.
      scaling: ``alpha / r`` as the config says for this module.
    """

    left: Float[np.ndarray, "row rank"]
    right: Float[np.ndarray, "rank col"]
    scaling: float


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A whole adapter.

    Attributes:
      updates: matrix name to factors: a tensor's, or ``NAME[i]`` of a stack.
      saved: tensor name to the copy that replaces it (``modules_to_save``).
      config: adapter_config.json.
    """

    updates: Mapping[str, LoraUpdate]
    saved: Mapping[str, np.ndarray]
    config: Mapping[str, Any]


def load_adapter(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Factors of an adapter by tensor name, scale folded into the left one.

    Args:
      path: PEFT adapter folder.

    Returns:
      Tensor name to (scaling * B [row, rank], A [rank, col]), float32, in the tensor's own
      orientation.
    """
    updates = read_adapter(path).updates
    return {
        name: (update.left * np.float32(update.scaling), update.right)
        for name, update in updates.items()
    }


def read_adapter(path: str | Path, base: Checkpoint | None = None) -> Adapter:
    """Reads a PEFT LoRA adapter, honouring r, lora_alpha, both patterns and use_rslora.

    Args:
      path: PEFT adapter folder.
      base: the model that it belongs to; says how stacked experts are oriented, and under which
        names tensors are stored that transformers renames when it loads them.

    Raises:
      InputError: not a LoRA adapter, or one whose update is not a product (DoRA), or damaged.
    """
    path = Path(path)
    config, model_config = _read_config(path), {} if base is None else base.config
    stored = {layout.loaded_name(n, model_config): n for n in (base.tensors if base else ())}
    pickled = path / PICKLED_NAME
    checkpoint = open_checkpoint(pickled if _only(pickled) else path / WEIGHTS_NAME)
    parts: dict[str, dict[str, np.ndarray]] = {}
    saved: dict[str, np.ndarray] = {}
    for key in checkpoint.tensors:
        array = read_tensor(checkpoint, key)
        name = key.removeprefix(layout.PREFIX)
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
        if suffix is None:
            saved[stored.get(name, name)] = array
        else:
            module = name.removesuffix(suffix)
            parts.setdefault(module, {})[_SUFFIXES[suffix]] = array.astype(np.float32)
    stacked = _stacked_names(config, parts)
    updates: dict[str, LoraUpdate] = {}
    for module, found in parts.items():
        if module in stacked:
            pairs = _stack_updates(stacked[module], found, config, path, model_config)
            updates.update(pairs)
        else:
            name = f"{module}.weight"
            updates[stored.get(name, name)] = _update(module, found, config, path)
    return Adapter(updates, saved, config)


def merge_peft(
    base: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    scaling: float = 1.0,
    dtype: np.dtype | None = None,
    rounding: str = "R1",
    product: Callable[[np.ndarray, np.ndarray], np.ndarray] = np.matmul,
) -> np.ndarray:
    r"""Merges by PEFT's default rule, :math:`RN_t(fl_{32}(W + fl_{32}(s \cdot fl_{32}(BA))))`.

    R2 rounds the update to t before it is added (``safe_merge=True``), R3 the product BA as well
    (16-bit adapters on a GPU).

    Args:
      base: W, [row, col].
      left: B, [row, rank].
      right: A, [rank, col].
      scaling: s.
      dtype: t; the base's own if None.
      rounding: rule of the merge, R1 to R3 (``jdetune.noise.ROUNDINGS``).
      product: float32 matrix product; another sums in another order.

    Returns:
      Merged weights in dtype t; infinite where they overflow it.

    Example:
      >>> merge_peft(np.float16([[1.0]]), np.float32([[0.5]]), np.float32([[2.0]]), 0.5)
      array([[1.5]], dtype=float16)
    """
    kind = base.dtype if dtype is None else dtype
    update = product(left.astype(np.float32), right.astype(np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        if rounding == "R3":
            update = update.astype(kind).astype(np.float32)
        update = np.float32(scaling) * update
        if rounding in ("R2", "R3"):
            update = update.astype(kind).astype(np.float32)
        return (base.astype(np.float32) + update).astype(kind)


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG_NAME).is_file():
        raise InputError(f"{path}: no {CONFIG_NAME} in it. Give a PEFT adapter folder.")
    config = read_json(path / CONFIG_NAME)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise InputError(f"{path / CONFIG_NAME}: only plain LoRA adapters can be read, not DoRA.")
    numbers = [config.get(key, 8) for key in ("r", "lora_alpha")]
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = {} if config.get(key) is None else config[key]
        if not isinstance(pattern, dict) or not all(map(_is_usable, pattern)):
            raise InputError(
                f"{path / CONFIG_NAME}: {key} is not a mapping of module names, or of simple "
                "regular expressions for them. Write the modules' names out."
            )
        numbers += pattern.values()
    if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        raise InputError(f"{path / CONFIG_NAME}: r, lora_alpha or a pattern of them is no number.")
    targets = config.get("target_parameters")
    if targets is not None and not (isinstance(targets, list) and _are_text(targets)):
        raise InputError(
            f"{path / CONFIG_NAME}: target_parameters is not a list of names. Copy it again."
        )
    return config


def _are_text(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _only(pickled: Path) -> bool:
    """Whether the weights are there as a pickle alone, which is refused with a remedy."""
    return pickled.exists() and not pickled.with_name(WEIGHTS_NAME).exists()


def _is_usable(key: str) -> bool:
    """Whether it is a regular expression, and none that could take for ever."""
    try:
        re.compile(key)
    except (re.error, RecursionError, OverflowError):
        return False
    repeats = len(re.findall(r"[*+{]", key))
    return len(key) <= _MAX_KEY and repeats <= 2 and not re.search(r"\)[*+{]", key)


def _update(
    module: str, found: Mapping[str, np.ndarray], config: Mapping[str, Any], path: Path
) -> LoraUpdate:
    pair = next(
        (
            (found[a], found[b])
            for a, b in (("A", "B"), ("embedding_A", "embedding_B"))
            if a in found and b in found
        ),
        None,
    )
    if pair is None:
        raise InputError(f"{path}: module {module} has only one of its factors. Copy it again.")
    down, up = pair  # [rank, in], [out, rank]; of convolutions also axes of a kernel
    if down.ndim > 2 and up.ndim == down.ndim and set(up.shape[2:]) == {1}:
        down, up = down.reshape(len(down), -1), up.reshape(len(up), -1)
    if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1]:
        raise InputError(
            f"{path}: factors of {module} have shapes {down.shape} and {up.shape}, not [rank, in] "
            "and [out, rank]. Copy the adapter again."
        )
    scaling = _scaling(module, down.shape[0], config)
    conv1d = bool(config.get("fan_in_fan_out")) and leaf_is_conv1d(module)
    if "embedding_A" in found or conv1d:
        return LoraUpdate(down.T, up.T, scaling)
    return LoraUpdate(up, down, scaling)


def _scaling(module: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _stacked_names(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, str]:
    """Module path of factors, as stored, to the parameter of a stack (``target_parameters``)."""
    names: dict[str, str] = {}
    parents: dict[str, list[str]] = {}
    for name in config.get("target_parameters") or ():
        parents.setdefault(layout.module_of(name), []).append(name)
    for parent, own in parents.items():
        for name, depth in (nesting(own) or {}).items():
            ending = parent + ".base_layer" * depth
            for module in modules:
                if module == ending or module.endswith("." + ending):
                    root = module.removesuffix(".base_layer" * depth)
                    names[module] = f"{root}.{layout.leaf_of(name)}"
    return names


def _stack_updates(
    name: str,
    found: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    path: Path,
    model_config: Mapping[str, Any],
) -> dict[str, LoraUpdate]:
    """Updates of stacked experts, one a slice; their number follows from the rank in the config."""
    rank = _pattern(config.get("rank_pattern"), name, config.get("r", 8))
    if "A" not in found or "B" not in found or rank < 1 or len(found["A"]) % int(rank):
        raise InputError(f"{path}: factors of {name} do not fit rank {rank:g}. Copy it again.")
    down, up = found["A"], found["B"]
    count, scaling = len(down) // int(rank), _scaling(name, int(rank), config)
    pairs = unstack(down, up, count, layout.is_transposed(model_config))
    return {unit_name(name, i): LoraUpdate(b, a, scaling) for i, (b, a) in enumerate(pairs)}


def leaf_is_conv1d(module: str) -> bool:
    """Whether a module of a fan-in-fan-out adapter stores [in, out]."""
    return layout.kind_of(module, {"model_type": "gpt2"}) is layout.Kind.CONV1D


def _pattern(pattern: Mapping[str, float | int] | None, module: str, default: float | int) -> float:
    """PEFT's rule: the first key that ends the module path, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return float(default)
