"""The layer axis over devices: each works on its own layers, and nothing is exchanged."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_LAYER = PartitionSpec("layer")


def layer_mesh(count: int) -> Mesh | None:
    """A mesh of one axis, ``layer``, over ``count`` devices of this process; None for one."""
    return _mesh(tuple(jax.local_devices()[:count])) if count > 1 else None


@functools.lru_cache(maxsize=4)
def _mesh(devices: tuple[Any, ...]) -> Mesh:
    return Mesh(np.array(devices), ("layer",), axis_types=(AxisType.Auto,))


def put(layers: Any, mesh: Mesh | None) -> Any:
    """Arrays with a leading layer axis on their devices; the axis is a multiple of the mesh."""
    return jax.device_put(layers, None if mesh is None else NamedSharding(mesh, _LAYER))


def over_layers(function: Callable, mesh: Mesh | None, *operands: Any) -> Any:
    """``function`` of every layer, on the device that holds it.

    Args:
      function: of the arrays of one layer, a pytree each.
      mesh: from ``layer_mesh``; None on a single device.
      operands: pytrees of arrays with a leading layer axis.

    Returns:
      What ``jax.vmap`` would; a single layer on a device has no batch axis inside.
    """

    def local(*operands: Any) -> Any:
        if jax.tree.leaves(operands)[0].shape[0] > 1:
            return jax.vmap(function)(*operands)
        one = jax.tree.map(lambda part: part.reshape(part.shape[1:]), operands)
        return jax.tree.map(lambda part: part.reshape(1, *part.shape), function(*one))

    if mesh is None:
        return local(*operands)
    # constants inside are the same on all devices, which loops would have to be told one by one
    mapped = jax.shard_map(local, mesh=mesh, in_specs=_LAYER, out_specs=_LAYER, check_vma=False)
    return mapped(*operands)
