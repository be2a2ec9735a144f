"""LoRA as an overlay: adapters beside the weights, one or many at once."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdetune.checkpoint import read_adapter
from jdetune.errors import InputError
from jdetune.linalg import matmul
from jdetune.models.layers import Lora
from jdetune.models.names import Model, canonical_module
from jdetune.models.params import Params, layout, put

#: Path of a linear layer, as the weights' names have it, to its factors.
Adapter = Mapping[str, Lora]


def linear_layers(module: Model, targets: str | Sequence[str] | None = None) -> dict[str, Any]:
    """Linear layers by path, with the shape [out, in] of their weight.

    Args:
      module: the model.
      targets: as PEFT's ``target_modules``: last words of paths, or one regular expression for
        the whole path; every linear layer if None.

    Returns:
      Path to shape, in the order of the model's tree.

    Raises:
      InputError: nothing is a target.
    """
    found = {
        name.removesuffix(".weight"): shape
        for name, (_, shape) in layout(module).items()
        if name.endswith(".weight") and len(shape) == 2 and "embed" not in name
    }
    if isinstance(targets, str):
        found = {path: shape for path, shape in found.items() if re.fullmatch(targets, path)}
    elif targets is not None:
        ends = tuple(targets)
        found = {p: s for p, s in found.items() if any(p == e or p.endswith(f".{e}") for e in ends)}
    if not found:
        raise InputError(f"no linear layer of {type(module).__name__} is a target: {targets}")
    return found


def init_lora(
    module: Model,
    key: Array,
    rank: int,
    targets: str | Sequence[str] | None = None,
    scaling: float = 1.0,
) -> dict[str, Lora]:
    r"""New factors as PEFT draws them: A uniform in :math:`\pm 1/\sqrt{in}`, B zero.

    Args:
      module: the model.
      key: JAX random key; ``jax.vmap`` over keys makes many adapters.
      rank: of every layer.
      targets: see `linear_layers`.
      scaling: PEFT's ``lora_alpha / r``.

    Returns:
      Path to factors.
    """
    shapes = linear_layers(module, targets)
    keys = jax.random.split(key, len(shapes))
    adapter = {}
    for k, (path, (out, width)) in zip(keys, shapes.items(), strict=True):
        a = jax.random.uniform(k, (rank, width), jnp.float32, -1, 1) * width**-0.5
        adapter[path] = Lora(a, jnp.zeros((out, rank), jnp.float32), scaling)
    return adapter


def load_lora(module: Model, path: str | Path) -> dict[str, Lora]:
    """Factors of a PEFT adapter folder.

    Args:
      module: the model that it is for.
      path: the folder.

    Raises:
      InputError: not a LoRA adapter, or one of another model, or one that keeps modules whole.
    """
    adapter = read_adapter(path)
    if adapter.saved:
        raise InputError(
            f"{path}: it keeps {', '.join(sorted(adapter.saved)[:3])} whole (modules_to_save). "
            "Merge it with `jdetune merge` and load the merged model."
        )
    found = {
        canonical_module(module, name.removesuffix(".weight")): Lora(
            jnp.asarray(update.right), jnp.asarray(update.left), update.scaling
        )
        for name, update in adapter.updates.items()
    }
    check_lora(module, found)
    return found


def stack_adapters(adapters: Iterable[Adapter]) -> dict[str, Lora]:
    """Many adapters of the same layers as one, with a leading axis; smaller ranks end in zeros.

    Scalings that differ are moved into B.
    """
    every = list(adapters)
    if any(set(one) != set(every[0]) for one in every):
        raise InputError("adapters of different layers cannot be stacked; add zeros for the rest.")
    stacked = {}
    for path in every[0]:
        pairs = [one[path] for one in every]
        scaling = pairs[0].scaling if len({pair.scaling for pair in pairs}) == 1 else None
        rank = max(pair.a.shape[0] for pair in pairs)
        rows = [jnp.pad(pair.a, ((0, rank - len(pair.a)), (0, 0))) for pair in pairs]
        cols = [
            jnp.pad(pair.b, ((0, 0), (0, rank - pair.b.shape[1])))
            * (pair.scaling if scaling is None else 1.0)
            for pair in pairs
        ]
        stacked[path] = Lora(jnp.stack(rows), jnp.stack(cols), 1.0 if scaling is None else scaling)
    return stacked


def merge_lora(params: Params, adapter: Adapter) -> Params:
    """Weights with the updates added, in float32: W + scaling * B A."""
    merged = dict(params)
    for path, pair in adapter.items():
        update = pair.scaling * matmul(pair.b, pair.a)
        merged[f"{path}.weight"] = merged[f"{path}.weight"] + update
    return merged


def check_lora(module: Model, adapter: Adapter) -> None:
    """Refuses factors that no layer of the model takes.

    Raises:
      InputError: names the layer and both shapes.
    """
    shapes = linear_layers(module)
    for path, pair in adapter.items():
        if path not in shapes:
            raise InputError(f"{path}: no linear layer of {type(module).__name__} has this name.")
        out, width = shapes[path]
        (rank, a_width), (b_out, b_rank) = np.shape(pair.a), np.shape(pair.b)
        if (b_out, a_width, b_rank) != (out, width, rank):
            raise InputError(
                f"{path}: factors [{rank}, {a_width}] and [{b_out}, {b_rank}] do not fit the "
                f"weight [{out}, {width}]."
            )


def lora_tree(module: Model, adapter: Adapter) -> dict[str, Any]:
    """Factors as the module's own tree."""
    check_lora(module, adapter)
    places, tree = layout(module), {}
    for path, pair in adapter.items():
        put(tree, (*places[f"{path}.weight"][0][:-1], "factors"), pair)
    return tree
