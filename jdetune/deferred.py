"""Arrays that stay on disk until they are looked at."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Deferred:
    """An array that is read when it is looked at, and not kept.

    Attributes:
      dtype: of its elements.
      shape: its shape.
      read: gives the array.

    Example:
      >>> import numpy as np
      >>> later = Deferred(np.dtype("float32"), (2,), lambda: np.ones(2, np.float32))
      >>> np.asarray(later).sum(), later[0]
      (2.0, 1.0)
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The array; always a copy of what is stored."""
        array = self.read()
        return array if dtype is None else array.astype(dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """A part of the array."""
        return self.read()[index]

    def __len__(self) -> int:
        """Length of the first axis."""
        return self.shape[0]
