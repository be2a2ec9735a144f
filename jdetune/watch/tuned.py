"""A fine-tuned model out of the folder that `jdetune recover` wrote."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jdetune.checkpoint import open_checkpoint, read_adapter, read_tensor
from jdetune.checkpoint.index import read_json
from jdetune.errors import InputError, NotOneBaseError
from jdetune.models.names import Model, canonical, is_unused
from jdetune.models.params import Params, build, load_params
from jdetune.report_check import is_whole
from jdetune.watch.names import writer


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A fine-tuned model and what it is made of.

    Attributes:
      name: of the model.
      module: its architecture.
      params: its weights, base and update together.
      update: tensor name, as in `jdetune.models`, to factors.
      folder: of the base, where the tokenizer is.
      missing: matrices that write to the residual stream and were not recovered.
    """

    name: str
    module: Model
    params: Params
    update: dict[str, tuple[np.ndarray, np.ndarray]]
    folder: Path
    missing: tuple[str, ...]


def load_tuned(out: str | Path, model: str) -> Tuned:
    """Reads base and adapter of one model.

    Args:
      out: folder of `jdetune recover`.
      model: name of the model, or its number in the report, from 0.

    Raises:
      InputError: the folder or the model cannot be used; says why.
      NotOneBaseError: nothing was recovered there.
    """
    out = Path(out)
    report = read_json(out / "report.json")
    if not is_whole(report):
        raise InputError(f"{out}: report.json is none of `jdetune recover`. Give its OUT folder.")
    if not report["summary"]["base_written"]:
        raise NotOneBaseError(f"{out}: no base was recovered there, so there is nothing to watch.")
    name = _name(out, report, model)
    base = open_checkpoint(out / "base")
    adapter = read_adapter(out / "adapters" / name, base)
    tensors: dict[str, Any] = {key: read_tensor(base, key) for key in base.tensors}
    tensors |= adapter.saved
    module = build(base.config, tensors)
    params = load_params(module, tensors)
    for key, pair in adapter.updates.items():
        own = canonical(module, key)
        if own in params:
            added = np.float32(pair.scaling) * np.matmul(pair.left, pair.right)
            params[own] = params[own] + jnp.asarray(added.reshape(params[own].shape))
        elif not is_unused(module, own):
            raise InputError(f"{out}: the update of {key} has no place in the model.")
    update = {
        canonical(module, key): (pair.left * np.float32(pair.scaling), pair.right)
        for key, pair in adapter.updates.items()
    }
    missing = tuple(
        entry["name"]
        for entry in report["tensors"]
        if entry["status"] in ("failed", "skipped") and writer(entry["name"]) is not None
    )
    return Tuned(name, module, params, update, out / "base", missing)


def _name(out: Path, report: dict[str, Any], model: str) -> str:
    names = [entry["name"] for entry in report["inputs"]]
    if model not in names and model.isdecimal() and int(model) < len(names):
        model = names[int(model)]
    if model not in names:
        raise InputError(
            f"{out}: no model {model!r}; there are {', '.join(names)}, or 0 to {len(names) - 1}."
        )
    entry = report["inputs"][names.index(model)]
    if entry.get("duplicate_of"):
        model = entry["duplicate_of"]
    if not (out / "adapters" / model).is_dir():
        raise InputError(
            f"{out}: has no PEFT adapter of {model}. Recover again with --adapter_format=peft."
        )
    return model
