"""What an outsider can know of an adapter: the products B A, whatever factors they came in."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jdetune.errors import InputError
from jdetune.leak.denoiser import Adapter
from jdetune.linalg import matmul
from jdetune.models.layers import Lora
from jdetune.models.params import Params
from jdetune.types import Array


def products(adapter: Adapter) -> Float[Array, "*tune layer row col"]:
    r"""The updates :math:`s\,B A` of all layers, which have one shape.

    They do not change when factors are refactored, A to Q A and B to B Q^-1.

    Args:
      adapter: path to factors, with any leading axes.

    Raises:
      InputError: the layers have several shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> products({"q": Lora(jnp.ones((1, 2)), jnp.ones((3, 1)), 0.5)}).shape
      (1, 3, 2)
    """
    every = [pair.scaling * matmul(pair.b, pair.a) for pair in adapter.values()]
    if len({one.shape for one in every}) != 1:
        raise InputError("layers of several shapes cannot be read together; adapt fewer of them.")
    return jnp.stack(every, axis=-3)


def factored(updates: Mapping[str, np.ndarray], rank: int) -> dict[str, Lora]:
    r"""Factors of dense updates, balanced, by truncated SVD: nearest of that rank.

    Args:
      updates: path to [*tune, row, col].
      rank: of the factors.
    """
    found = {}
    for path, dense in updates.items():
        left, values, right = np.linalg.svd(np.asarray(dense, np.float64), full_matrices=False)
        root = np.sqrt(values[..., :rank])
        a = (root[..., None] * right[..., :rank, :]).astype(np.float32)
        b = (left[..., :rank] * root[..., None, :]).astype(np.float32)
        found[path] = Lora(jnp.asarray(a), jnp.asarray(b))
    return found


def merged(params: Params, adapter: Adapter) -> Params:
    """Weights with one adapter's updates added, in float32."""
    found = dict(params)
    for path, pair in adapter.items():
        found[f"{path}.weight"] = params[f"{path}.weight"] + pair.scaling * matmul(pair.b, pair.a)
    return found
