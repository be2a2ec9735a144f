"""Writes what needs no solving into the files of the base while the rest is solved.

Offsets in a file depend on which of its tensors get a base, and in which dtype: both are guessed.
Where a guess is wrong, the file is written anew when all is known, so no result depends on it.
"""

import contextlib
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jdetune.busy import WRITE
from jdetune.checkpoint.manifest import Plan, TensorPlan
from jdetune.checkpoint.reader import deferred, numpy_dtype
from jdetune.checkpoint.shapes import smaller_side
from jdetune.checkpoint.stream import Begun
from jdetune.checkpoint.writer import begin_shard
from jdetune.deferred import Deferred
from jdetune.distributed import Processes
from jdetune.errors import JdetuneError
from jdetune.products import full_template, share_of_files

#: Differing matrices with a smaller side are taken for heads that were trained whole.
HEAD = 32


@contextlib.contextmanager
def writing_ahead(
    plan: Plan, folder: Path, processes: Processes, limit: int
) -> Iterator[dict[str, Begun]]:
    """Writes in a thread until the block is left; what it wrote is there after it.

    Args:
      plan: what is done with every tensor.
      folder: where the files are kept, on the disk of the base to be.
      processes: who writes along; each begins the files that are its own.
      limit: bytes of a tensor, held in memory; larger ones wait.

    Yields:
      Files of the base that are begun, by the template's name of each; complete after the block.
    """
    begun: dict[str, Begun] = {}
    if not plan.groups:
        yield begun
        return
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(_begin_files, plan, folder, processes, limit, stop, begun)
        try:
            yield begun
        finally:
            stop.set()
        work.result()


def drop(begun: dict[str, Begun]) -> None:
    """Removes files that are not gone on with: they take up the room of those to be written."""
    for file in begun.values():
        file.path.unlink(missing_ok=True)
    begun.clear()


def _begin_files(
    plan: Plan,
    folder: Path,
    processes: Processes,
    limit: int,
    stop: threading.Event,
    begun: dict[str, Begun],
) -> None:
    template = full_template(plan, {t.name: t.source for t in plan.tensors})
    planned = {tensor.name: tensor for tensor in plan.tensors}
    mine = share_of_files(template, plan, processes)

    def is_ready(name: str) -> bool:
        tensor = planned[name]
        size = math.prod(tensor.shape) * numpy_dtype(tensor.dtype).itemsize
        return tensor.source is not None and size <= limit and not stop.is_set()

    def get_tensor(name: str) -> Deferred | None:
        return guess(plan, planned[name], planned) if name in planned else None

    for file in mine:
        if isinstance(file, str) and not stop.is_set():
            # of all processes' files, not of this one's: they share the folder
            path = folder / f"{template.files.index(file):05d}.safetensors"
            try:
                with plan.checkpoints[0].busy.doing(WRITE):
                    begun[file] = begin_shard(template, path, file, get_tensor, is_ready)
            except (JdetuneError, OSError):  # goes wrong again, and is said, when it is written
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


def guess(plan: Plan, tensor: TensorPlan, planned: dict[str, TensorPlan]) -> Deferred | None:
    """What the base will most likely hold of a tensor; not to be read where it is to be solved."""
    if tensor.source is not None:
        return deferred(plan.checkpoints[tensor.source], tensor.name)
    solved = planned[tensor.tied_to] if tensor.tied_to else tensor
    if solved.action != "recover" or smaller_side(solved.info) < HEAD:
        return None
    return Deferred(numpy_dtype(solved.dtype), tensor.shape, _unknown)


def _unknown() -> np.ndarray:
    raise AssertionError("a tensor that is not solved yet was read")
