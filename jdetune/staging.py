"""Host memory for merged weights that a CPU backend reads in place.

A layer's models are copied into pages that are there already: fresh ones, which XLA would copy them
into, cost several times the copy itself. XLA reads an array in place if it is aligned.
"""

import threading
from collections.abc import Sequence

import numpy as np

#: Bytes that XLA aligns arrays to.
ALIGNMENT = 64


class Staging(threading.local):
    """A buffer for each thread, of the size of what it held last."""

    def __init__(self) -> None:
        """Starts with nothing."""
        self._room = np.empty(0, np.uint8)

    def fill(self, stacks: Sequence[np.ndarray]) -> np.ndarray:
        """Copies same-shaped arrays side by side; valid until the thread calls again.

        Args:
          stacks: [model, row, col] each, of one shape and dtype.

        Returns:
          [layer, model, row, col], aligned.

        Example:
          >>> Staging().fill([np.zeros((3, 2, 4), np.float32)]).shape
          (1, 3, 2, 4)
        """
        n_bytes = sum(stack.nbytes for stack in stacks)
        if len(self._room) != n_bytes + ALIGNMENT:
            self._room = np.empty(n_bytes + ALIGNMENT, np.uint8)
        start = -self._room.ctypes.data % ALIGNMENT
        room = self._room[start : start + n_bytes].view(stacks[0].dtype)
        room = room.reshape(len(stacks), *stacks[0].shape)
        for place, stack in zip(room, stacks, strict=True):
            np.copyto(place, stack)
        return room
