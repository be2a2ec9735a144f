"""Merged weights as stacks: validation, grouping by shape, duplicates."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import ml_dtypes  # noqa: F401 - lets NumPy know bfloat16 by name
import numpy as np

from jdetune.types import STORAGE_DTYPES, Array


@dataclasses.dataclass(frozen=True)
class Group:
    """Same-shaped layers of one dtype.

    Attributes:
      names: name of each layer, in the order of the input.
      shape: (model, row, col) of each layer.
      dtype: dtype of the arrays by name.
      storage: dtype that each model was rounded to.
    """

    names: tuple[str, ...]
    shape: tuple[int, int, int]
    dtype: str
    storage: tuple[str, ...]


def check_layer(name: str, stack: Array) -> None:
    """Raises ValueError unless ``stack`` is [model, row, col] of a storage dtype.

    Example:
      >>> import numpy as np
      >>> check_layer("w", np.zeros((3, 2, 2), np.float32))
    """
    if not isinstance(stack, np.ndarray | jax.Array):
        raise ValueError(
            f"{name}: expected a NumPy or JAX array [model, row, col], got {type(stack).__name__}"
        )
    if stack.ndim != 3:
        raise ValueError(f"{name}: expected axes [model, row, col], got shape {stack.shape}")
    if 0 in stack.shape:
        raise ValueError(f"{name}: empty axis in shape {stack.shape}")
    if str(stack.dtype) not in STORAGE_DTYPES:
        raise ValueError(
            f"{name}: dtype {stack.dtype} is not one that models are stored in "
            f"({', '.join(STORAGE_DTYPES)}); pass the weights as they were stored"
        )


def as_mapping(stack: Array | Mapping[str, Array]) -> dict[str, Array]:
    """Any accepted input as a mapping of layer names to [model, row, col].

    A 3-D array is one layer named ``weight``, a 4-D array layers named ``layer[0]`` and so on.

    Raises:
      ValueError: shape, dtype or type that cannot be a stack; models differ in number.
    """
    if isinstance(stack, Mapping):
        layers = dict(stack)
        if not layers:
            raise ValueError("the stack is empty: no tensor names")
    elif not isinstance(stack, np.ndarray | jax.Array):
        raise ValueError(
            "expected an array [model, row, col] or [layer, model, row, col], or a mapping of "
            f"names to [model, row, col]; got {type(stack).__name__}"
        )
    elif stack.ndim == 4:
        if stack.shape[0] == 0:
            raise ValueError(f"the stack is empty: shape {stack.shape}")
        layers = {f"layer[{index}]": stack[index] for index in range(stack.shape[0])}
    elif stack.ndim == 3:
        layers = {"weight": stack}
    else:
        raise ValueError(
            f"expected axes [model, row, col] or [layer, model, row, col], got shape {stack.shape}"
        )
    for name, layer in layers.items():
        check_layer(name, layer)
    counts = {name: layer.shape[0] for name, layer in layers.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"every tensor needs the same models; the model axes are {counts}")
    return layers


def group_layers(layers: Mapping[str, Array]) -> list[Group]:
    """Groups of layers with one shape, dtype and storage, in order of first appearance.

    Example:
      >>> import numpy as np
      >>> a, b = np.zeros((3, 2, 4), np.float32), np.zeros((3, 4, 4), np.float32)
      >>> [group.names for group in group_layers({"q": a, "k": b, "v": a})]
      [('q', 'v'), ('k',)]
    """
    members: dict[tuple, list[str]] = {}
    for name, layer in layers.items():
        key = (layer.shape, str(layer.dtype), storage_dtypes(layer))
        members.setdefault(key, []).append(name)
    return [
        Group(tuple(names), (shape[0], shape[1], shape[2]), dtype, storage)
        for (shape, dtype, storage), names in members.items()
    ]


def storage_dtypes(stack: Array) -> tuple[str, ...]:
    """The narrowest dtype that holds each model exactly: what it was rounded to.

    Models that were merged in 16 bits and saved in 32 carry the rounding error of 16 bits.

    Example:
      >>> import numpy as np
      >>> storage_dtypes(np.float32([[[1.0]], [[1.001]]]))
      ('bfloat16', 'float32')
    """
    return tuple(_narrowest(model) for model in stack)


def _narrowest(model: Array) -> str:
    own = str(model.dtype)
    for name in STORAGE_DTYPES[: STORAGE_DTYPES.index(own) : -1]:
        with np.errstate(over="ignore"):
            sample = model[:1]
            if bool((sample.astype(name).astype(own) == sample).all()) and bool(
                (model.astype(name).astype(own) == model).all()
            ):
                return name
    return own


def narrowest(stack: Array, storage: Sequence[str] | None = None) -> Array:
    """The stack in the storage dtype of its models, if they have one in common."""
    found = storage_dtypes(stack) if storage is None else storage
    narrower = len(set(found)) == 1 and found[0] != str(stack.dtype)
    return stack.astype(found[0]) if narrower else stack


def distinct_models(layers: Mapping[str, Array]) -> tuple[int, ...]:
    """Indices of models that differ from every earlier one in at least one layer.

    Example:
      >>> import numpy as np
      >>> w = np.arange(3, dtype=np.float32)[:, None, None]
      >>> distinct_models({"w": w[[0, 1, 0, 2]]})
      (0, 1, 3)
    """
    n_models = next(iter(layers.values())).shape[0]
    kept: list[int] = []
    for model in range(n_models):
        if not any(same_model(layers, model, other) for other in kept):
            kept.append(model)
    return tuple(kept)


def same_model(layers: Mapping[str, Array], a: int, b: int) -> bool:
    """Whether two models are equal in every layer; a NaN equals a NaN."""

    def equal(x: Array, y: Array) -> bool:
        return bool(((x == y) | ((x != x) & (y != y))).all())

    # most models differ in their first row already
    rows = (slice(1), slice(None))
    return all(equal(layer[a][s], layer[b][s]) for s in rows for layer in layers.values())
