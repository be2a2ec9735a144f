"""What a recovery returns: pytrees of arrays, one entry a layer."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jdetune.deferred import Deferred
from jdetune.status import Status
from jdetune.types import Array

#: Large arrays; the pipeline's stay on disk.
if TYPE_CHECKING:
    Large: TypeAlias = Array
else:
    Large = Array | Deferred


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapters:
    """LoRA factors of every update: ``update = left @ right``.

    Balanced (both carry the square root of the singular values), the entry of largest magnitude in
    each column of ``left`` positive, zero past each model's rank.

    Attributes:
      left: B, [*layer, model, row, rank], float32, units of the weights' square root.
      right: A, [*layer, model, rank, col], float32.
    """

    left: Float[Large, "*layer model row rank"]
    right: Float[Large, "*layer model rank col"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recovery:
    """Base weights and updates recovered from a stack of merged weights.

    The layer axis is there only if the stack had one. Numbers that a solver does not know are NaN.

    Attributes:
      base: the base, in the dtype of its grid (``jdetune.exact``), which is that of the stack or
        a narrower one; NaN where the status has no base. Layers whose grids differ come in the
        dtype of the stack.
      ranks: rank of each model's update.
      adapters: the updates as factors.
      status: ``jdetune.Status`` code, 0 is success.
      predicted_error: log10 of the mean squared error expected of ``base`` (no ground truth used).
      exact_fraction: estimated share of elements equal to the base, bit for bit.
      amplification: factor by which rounding noise is amplified.
      certain: elements of the base for which one grid point is left.
      stats: solver's own figures, each with the layer axis: ``residual_ratio`` (rms of the residual
        over rms of the rounding error, about 1 where the updates explain everything) and others.
    """

    base: Float[Large, "*layer row col"]
    ranks: Int[Array, "*layer model"]
    adapters: Adapters
    status: Int[Array, "*layer"]
    predicted_error: Float[Array, "*layer"]
    exact_fraction: Float[Array, "*layer"]
    amplification: Float[Array, "*layer"]
    certain: Bool[Large, "*layer row col"]
    stats: dict[str, Any]

    @property
    def ok(self) -> bool:
        """True if every layer's status is OK."""
        return not np.any(np.asarray(self.status))

    def layer(self, index: int) -> "Recovery":
        """The recovery of one layer, without the layer axis."""
        return jax.tree.map(lambda x: x[index, ...], self)


class Recoveries(Mapping[str, Recovery]):
    """Recoveries by tensor name, as ``recover`` returns them for a mapping.

    Example:
      >>> len(Recoveries({}))
      0
    """

    def __init__(self, layers: Mapping[str, Recovery]) -> None:
        """Keeps the recoveries in the order of the mapping."""
        self._layers = dict(layers)

    def __getitem__(self, name: str) -> Recovery:
        """The recovery of one tensor."""
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        """Names, in the order they were handed in."""
        return iter(self._layers)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._layers)

    def __repr__(self) -> str:
        """A count, not the arrays."""
        bad = sum(not recovery.ok for recovery in self.values())
        return f"Recoveries({len(self)} tensors, {bad} not OK)"

    @property
    def ok(self) -> bool:
        """True if every tensor's status is OK."""
        return all(recovery.ok for recovery in self.values())

    @property
    def base(self) -> dict[str, Array]:
        """Name to base weights."""
        return {name: recovery.base for name, recovery in self.items()}

    @property
    def ranks(self) -> dict[str, Array]:
        """Name to the ranks of all models."""
        return {name: recovery.ranks for name, recovery in self.items()}

    @property
    def status(self) -> dict[str, Status]:
        """Name to status."""
        return {name: Status(int(recovery.status)) for name, recovery in self.items()}


jax.tree_util.register_pytree_with_keys(
    Recoveries,
    lambda tree: (
        [(jax.tree_util.DictKey(name), recovery) for name, recovery in tree.items()],
        tuple(tree),
    ),
    lambda names, layers: Recoveries(dict(zip(names, layers, strict=True))),
)
