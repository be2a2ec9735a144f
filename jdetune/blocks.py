"""Blocks of rows: what is made of all models' matrices exists for some rows at a time on CPU.

Memory that is written for the first time costs more there than the arithmetic, and matrices that
are never whole take no room.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jdetune import linalg

#: Rows of a block, at least: products with fewer are slow.
PRODUCT_ROWS = 256


class Each(NamedTuple):
    """Matrices that ``by_rows`` cuts model by model, for ``linalg.sum_each`` and ``map_each``.

    XLA on CPU reads a part of a part several times slower than a part.
    """

    matrices: Array


def by_rows(
    function: Callable[[Any], tuple[Any, Any]], rows: Any, least: int = PRODUCT_ROWS
) -> tuple[Any, Any]:
    """Sums over blocks of rows, and arrays put together from them.

    Args:
      function: of ``rows`` cut to some rows. What it returns first is added up over the blocks,
        what it returns second is put together.
      rows: arrays whose axis before the last is the rows, some perhaps in an ``Each``.
      least: rows of a block, at least.

    Returns:
      Sums and arrays, as ``function`` of all rows returns them.

    Example:
      >>> import jax.numpy as jnp
      >>> total, doubled = by_rows(lambda x: (x.sum(), 2 * x), jnp.ones((3, 2)))
      >>> float(total), doubled.shape
      (6.0, (3, 2))
    """
    leaves = jax.tree.leaves(rows)
    row = leaves[0].shape[-2]
    size = linalg.row_block(row, max(leaf.size for leaf in leaves) // row, least)

    def some(index: Array) -> Any:
        def cut(part: Array | Each) -> linalg.PerModel:
            if isinstance(part, Each) and size == row:
                return part.matrices
            if isinstance(part, Each):
                n_models, _, col = part.matrices.shape
                starts = ((jnp.int32(i), index * size, jnp.int32(0)) for i in range(n_models))
                ones = (lax.dynamic_slice(part.matrices, at, (1, size, col)) for at in starts)
                return tuple(one[0] for one in ones)
            return lax.dynamic_slice_in_dim(part, index * size, size, part.ndim - 2)

        return function(jax.tree.map(cut, rows, is_leaf=lambda part: isinstance(part, Each)))

    if size == row:
        return some(jnp.int32(0))

    def advance(carry: tuple[Any, Any], index: Array) -> tuple[tuple[Any, Any], None]:
        def put(whole: Array, part: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(whole, part, index * size, part.ndim - 2)

        sums, parts = some(index)
        return (jax.tree.map(jnp.add, carry[0], sums), jax.tree.map(put, carry[1], parts)), None

    def whole(part: jax.ShapeDtypeStruct) -> Array:
        *before, _, last = part.shape
        return lax.empty((*before, row, last), part.dtype)

    sums, parts = jax.eval_shape(some, jnp.int32(0))
    zeros = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), sums)
    start = zeros, jax.tree.map(whole, parts)
    return lax.scan(advance, start, jnp.arange(row // size, dtype=jnp.int32))[0]
