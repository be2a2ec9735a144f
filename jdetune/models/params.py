"""Weights of a model: a plain dict from tensor name to array, and where each goes in the module."""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jdetune.checkpoint import Checkpoint, open_checkpoint, read_tensor
from jdetune.errors import InputError
from jdetune.models.bert import Bert
from jdetune.models.config import bert_config, llama_config, vit_config
from jdetune.models.hooks import Hooks
from jdetune.models.llama import Llama
from jdetune.models.names import Model, canonical, is_unused
from jdetune.models.vit import ViT

#: Tensor name to float32 array, in PyTorch's orientation [out, in].
Params = dict[str, Array]


def layout(module: Model) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Tensor name to its path in the module's own tree and its shape."""
    plain: Any = module.clone(hooks=Hooks(), remat=False)
    return _layout(plain)


@cache
def _layout(module: Any) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), *module.example()))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [tuple(str(key.key) for key in path) for path, _ in leaves]
    return {".".join(p): (p, leaf.shape) for p, (_, leaf) in zip(paths, leaves, strict=True)}


def build(config: Mapping[str, Any], names: Iterable[str] = (), **known: Any) -> Model:
    """The module that a config.json describes.

    Args:
      config: its contents.
      names: tensor names of the checkpoint; a classifier's head is built if it is among them.
      **known: further arguments of the module.

    Raises:
      InputError: no model of this kind can be run.

    Example:
      >>> build({"model_type": "bert"}).config.hidden_size
      768
    """
    has_head = any(name == "classifier.weight" for name in names)
    labels = len(config.get("id2label") or (0, 0)) if has_head else 0
    match config.get("model_type"):
        case "bert":
            return Bert(bert_config(config, labels), **known)
        case "vit" | "dinov2":
            return ViT(vit_config(config, labels), **known)
        case "llama" | "mistral":
            return Llama(llama_config(config), **known)
    raise InputError(
        f"model_type {config.get('model_type')!r} cannot be run; bert, vit, dinov2, llama and "
        "mistral can."
    )


def load(path: str | Path) -> tuple[Model, Params]:
    """Reads a model from a Hugging Face folder.

    Args:
      path: folder with config.json and safetensors weights, such as ``recover`` writes.

    Returns:
      The module and its weights in float32.

    Raises:
      InputError: the model cannot be run, or tensors are missing or have no place in it.
    """
    checkpoint = open_checkpoint(path)
    module = build(checkpoint.config, checkpoint.tensors)
    return module, load_params(module, _Lazy(checkpoint))


class _Lazy(Mapping[str, np.ndarray]):
    """Tensors of a checkpoint, read when they are asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> np.ndarray:
        return read_tensor(self._checkpoint, name)

    def __iter__(self):
        return iter(self._checkpoint.tensors)

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)


def load_params(module: Model, tensors: Mapping[str, Any]) -> Params:
    """Weights from a checkpoint's tensors.

    Args:
      module: the model.
      tensors: name to array of any float dtype; names of every spelling in `names`.

    Returns:
      jdetune's name to float32 array.

    Raises:
      InputError: tensors are missing, have another shape or no place; names them.
    """
    places = layout(module)
    own = {canonical(module, name): name for name in tensors}
    missing = [name for name in places if name not in own]
    unknown = [own[n] for n in own if n not in places and not is_unused(module, n)]
    if missing or unknown:
        raise InputError(
            f"{type(module).__name__}: missing tensors: {_few(missing)}; tensors without a place: "
            f"{_few(unknown)}. Check that config.json belongs to these weights."
        )
    params = {}
    for name, (_, shape) in places.items():
        array = np.asarray(tensors[own[name]])
        if array.shape != shape:
            raise InputError(f"{own[name]}: shape {array.shape}, but config.json says {shape}.")
        params[name] = jnp.asarray(array.astype(np.float32))
    return params


def init_params(module: Model, key: Array) -> Params:
    """Random weights of a new model: normal with standard deviation 0.02, norms one, biases zero.

    Args:
      module: the model.
      key: JAX random key.
    """
    tree = jax.jit(lambda k: module.init(k, *module.example()))(key)["params"]
    return {name: _at(tree, path) for name, (path, _) in layout(module).items()}


def to_hf(module: Model, params: Params, like: Iterable[str]) -> dict[str, np.ndarray]:
    """Weights under the names that a checkpoint has, those that the model does not use left out.

    Args:
      module: the model.
      params: its weights.
      like: tensor names of the checkpoint; a tied head is written if it is among them.

    Returns:
      Name to float32 array.
    """
    found = {}
    for name in like:
        own = canonical(module, name)
        if own == "lm_head.weight" and own not in params:
            own = "model.embed_tokens.weight"
        if own in params:
            found[name] = np.asarray(params[own])
    return found


def to_tree(module: Model, params: Mapping[str, Any]) -> dict[str, Any]:
    """Weights as the module's own tree, for ``module.apply({"params": tree}, ...)``.

    Raises:
      InputError: the names are not the module's.
    """
    places = layout(module)
    if set(places) != set(params):
        raise InputError(
            f"{type(module).__name__}: missing tensors: {_few(set(places) - set(params))}; without "
            f"a place: {_few(set(params) - set(places))}. Make them with load_params."
        )
    tree: dict[str, Any] = {}
    for name, (path, _) in places.items():
        put(tree, path, params[name])
    return tree


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Sets a leaf of nested dicts."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more if names else "none"
