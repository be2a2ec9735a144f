"""Compares tensors of several checkpoints by kind and by digest."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from jdetune.checkpoint.index import FLOATS, Checkpoint, TensorInfo
from jdetune.checkpoint.reader import tensor_digest
from jdetune.distributed import Processes

#: Threads that read and digest tensors at a time.
READERS = 4
#: A digest a model of shape and values; None where the tensor is missing.
Marks = Sequence[bytes | None]


def entries(checkpoints: Sequence[Checkpoint], name: str) -> list[TensorInfo | None]:
    """A tensor's entry in the headers of every model, None where it is missing."""
    return [c.tensors.get(name) for c in checkpoints]


def is_common(checkpoints: Sequence[Checkpoint], name: str) -> bool:
    """Whether all models have the tensor in one shape, as floats of any width or in one dtype."""
    infos = entries(checkpoints, name)
    kinds = {(i.shape, "float" if i.dtype in FLOATS else i.dtype) if i else None for i in infos}
    return None not in kinds and len(kinds) == 1


def all_marks(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    progress: Callable[[int, int], None] | None,
    processes: Processes,
) -> dict[str, Marks]:
    """Digests by tensor name, in the order of the names; every process reads its share."""
    infos = [next(i for i in entries(checkpoints, name) if i is not None) for name in names]
    mine = processes.share([math.prod(info.shape) for info in infos])
    own: dict[str, list[str | None]] = {}

    def marks_of(index: int) -> Marks:
        return _marks(checkpoints, names[index])

    pool = ThreadPoolExecutor(READERS)  # one reads while another digests
    try:
        found_marks = pool.map(marks_of, mine)
        for done, (index, marks) in enumerate(zip(mine, found_marks, strict=True)):
            own[names[index]] = [None if mark is None else mark.hex() for mark in marks]
            if progress is not None:
                progress(done + 1, len(mine))
    finally:
        pool.shutdown(cancel_futures=True)
    found: dict[str, list[str | None]] = {}
    for part in processes.exchange(own):
        found.update(part)
    return {n: tuple(None if m is None else bytes.fromhex(m) for m in found[n]) for n in names}


def _marks(checkpoints: Sequence[Checkpoint], name: str) -> Marks:
    """A digest a model of shape and values; None where the tensor is missing."""
    infos = entries(checkpoints, name)
    dtypes = {info.dtype for info in infos if info is not None}
    widen = len(dtypes) > 1 and dtypes <= set(FLOATS)
    marks: list[bytes | None] = []
    for checkpoint, info in zip(checkpoints, infos, strict=True):
        if info is None:
            marks.append(None)
        else:
            kind = "float32" if widen else info.dtype
            mark = tensor_digest(checkpoint, name, widen and info.dtype != kind)
            marks.append(f"{info.shape}{kind}".encode() + mark)
    return tuple(marks)


def first_equal(keys: Sequence[tuple]) -> tuple[int, ...]:
    """For every key, the index of the first that equals it."""
    first: dict[tuple, int] = {}
    return tuple(first.setdefault(key, i) for i, key in enumerate(keys))
