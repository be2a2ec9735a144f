"""Writing in a thread while the next is worked on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jdetune.busy import WRITE, Busy


class WriteBehind:
    """Writes in a thread while the next group is solved; one waits to be written at most."""

    def __init__(self, busy: Busy) -> None:
        """Starts the thread."""
        self._busy, self._pool = busy, ThreadPoolExecutor(1)
        self._last: Future | None = None

    def write(self, function: Callable, *arguments: Any) -> None:
        """Hands in what is to be written; raises what went wrong with the last."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(self._run, function, *arguments)

    def _run(self, function: Callable, *arguments: Any) -> None:
        with self._busy.doing(WRITE):
            function(*arguments)

    def __enter__(self) -> "WriteBehind":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._pool.shutdown()
        if kind is None and self._last is not None:
            self._last.result()
