"""How long a run reads, writes and computes, where these overlap in several threads."""

import contextlib
import threading
import time
from collections.abc import Iterator

READ, WRITE, COMPUTE = "read", "write", "compute"
#: Reading or writing.
TRANSFER = "transfer"


class Busy:
    """Seconds in which at least one thread was at something.

    Example:
      >>> busy = Busy()
      >>> with busy.doing(READ), busy.doing(READ):
      ...     pass
      >>> busy.seconds(READ) == busy.seconds(TRANSFER) < 1.0, busy.seconds(COMPUTE)
      (True, 0.0)
    """

    def __init__(self) -> None:
        """Starts with nothing done."""
        self._lock = threading.Lock()
        kinds = (READ, WRITE, COMPUTE, TRANSFER)
        self._active: dict[str, int] = dict.fromkeys(kinds, 0)
        self._since: dict[str, float] = dict.fromkeys(kinds, 0.0)
        self._total: dict[str, float] = dict.fromkeys(kinds, 0.0)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Counts the time inside; threads that do the same at a time count once."""
        kinds = (what, TRANSFER) if what in (READ, WRITE) else (what,)
        with self._lock:
            now = time.monotonic()
            for kind in kinds:
                if not self._active[kind]:
                    self._since[kind] = now
                self._active[kind] += 1
        try:
            yield
        finally:
            with self._lock:
                now = time.monotonic()
                for kind in kinds:
                    self._active[kind] -= 1
                    if not self._active[kind]:
                        self._total[kind] += now - self._since[kind]

    def seconds(self, what: str) -> float:
        """Seconds so far, without what goes on now."""
        return self._total[what]
