"""Reads tensors of a checkpoint as NumPy arrays, whole or in pieces."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from jdetune.busy import COMPUTE, READ
from jdetune.checkpoint.files import opened
from jdetune.checkpoint.index import Checkpoint, TensorInfo
from jdetune.deferred import Deferred
from jdetune.errors import InputError, printable


def numpy_dtype(word: str) -> np.dtype:
    """NumPy dtype of a word such as ``bfloat16``.

    Raises:
      InputError: a word of the format that NumPy and ml_dtypes do not have.

    Example:
      >>> numpy_dtype("bfloat16").itemsize
      2
    """
    try:
        return np.dtype(getattr(ml_dtypes, word, word))
    except TypeError as error:
        raise InputError(
            f"dtype {printable(word)} is not known here. Save the model in fp32, fp16 or bf16."
        ) from error


def read_tensor(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """One tensor, in the dtype it is stored in.

    Args:
      checkpoint: an opened checkpoint.
      name: one of its tensors.

    Returns:
      The array; bfloat16 as ``ml_dtypes.bfloat16``.

    Raises:
      InputError: the file changed, shrank or vanished, or the dtype has no NumPy counterpart.
    """
    info = _info(checkpoint, name)
    array = empty(info.shape, _dtype(checkpoint, info), name)
    _read_into(checkpoint, info, array)
    return array


def read_slice(checkpoint: Checkpoint, name: str, index: int) -> np.ndarray:
    """Part of a tensor at one place of its first axis, read alone."""
    info = _info(checkpoint, name)
    size = info.read_bytes // info.shape[0]
    start = info.start + index * size
    part = dataclasses.replace(info, shape=info.shape[1:], whole=None, start=start, n_bytes=size)
    array = empty(part.shape, _dtype(checkpoint, part), name)
    _read_into(checkpoint, part, array)
    return array


def tensor_digest(checkpoint: Checkpoint, name: str, widen: bool = False) -> bytes:
    """SHA-256 of a tensor's bytes, read in pieces: ``digest`` of it, in little memory.

    Args:
      checkpoint: an opened checkpoint.
      name: one of its tensors, of any dtype.
      widen: take it as float32, to compare with another width.
    """
    info, total = _info(checkpoint, name), hashlib.sha256()
    with opened(checkpoint.root / info.file, info.stamp) as source:
        pieces = source.chunks(info.start, info.read_bytes)
        while (piece := _next(pieces, checkpoint)) is not None:
            with checkpoint.busy.doing(COMPUTE):
                if widen:
                    piece = raw_bytes(piece.view(numpy_dtype(info.dtype)).astype(np.float32))
                total.update(piece.data)
    return total.digest()


def raw_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of an array in C order, as a flat uint8 view or copy.

    Example:
      >>> raw_bytes(np.float32([[1.0]])).tolist()
      [0, 0, 128, 63]
    """
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def digest(array: np.ndarray) -> bytes:
    """SHA-256 of an array's bytes: two arrays of a shape and dtype are equal iff it is."""
    return hashlib.sha256(raw_bytes(array).data).digest()


def deferred(checkpoint: Checkpoint, name: str) -> Deferred:
    """A tensor of a model, read when it is looked at."""
    info = _info(checkpoint, name)
    read = functools.partial(read_tensor, checkpoint, name)
    return Deferred(_dtype(checkpoint, info), info.shape, read)


def _next(pieces: Iterator[np.ndarray], checkpoint: Checkpoint) -> np.ndarray | None:
    with checkpoint.busy.doing(READ):
        return next(pieces, None)


def _info(checkpoint: Checkpoint, name: str) -> TensorInfo:
    if name not in checkpoint.tensors:
        raise InputError(f"{checkpoint.path}: no tensor {printable(name)} in it.")
    return checkpoint.tensors[name]


def _dtype(checkpoint: Checkpoint, info: TensorInfo) -> np.dtype:
    """Its dtype, or an error that names file and tensor."""
    if not info.is_known:
        raise InputError(
            f"{checkpoint.root / info.file}: dtype {info.dtype} is not known here (tensor "
            f"{printable(info.name)}). Save the model in fp32, fp16 or bf16."
        )
    return numpy_dtype(info.dtype)


def empty(shape: tuple[int, ...], dtype: np.dtype, name: str) -> np.ndarray:
    """An array of a tensor's shape, or an error that says it does not fit."""
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError, OverflowError) as error:
        raise InputError(
            f"tensor {printable(name)} of shape {list(shape)} does not fit into memory. Leave it "
            "out with --exclude, or use a larger machine."
        ) from error


def _read_into(checkpoint: Checkpoint, info: TensorInfo, array: np.ndarray) -> None:
    """Fills a C-contiguous array with a tensor's bytes."""
    data = array.reshape(-1).view(np.uint8)
    if len(data) != info.read_bytes:
        raise InputError(
            f"{checkpoint.root / info.file}: tensor {printable(info.name)} has {info.read_bytes} "
            f"bytes, not the {len(data)} of its shape. Copy the file again."
        )
    file = checkpoint.root / info.file
    with checkpoint.busy.doing(READ), opened(file, info.stamp) as source:
        source.fill(info.start, data)
