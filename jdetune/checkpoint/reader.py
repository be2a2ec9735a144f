"""Reads single tensors of a checkpoint as NumPy arrays."""

import hashlib

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jdetune.checkpoint.index import Checkpoint
from jdetune.errors import InputError


def numpy_dtype(word: str) -> np.dtype:
    """NumPy dtype of a word such as ``bfloat16``.

    Example:
      >>> numpy_dtype("bfloat16").itemsize
      2
    """
    return np.dtype(getattr(ml_dtypes, word, word))


def read_tensor(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """One tensor, in the dtype it is stored in.

    Args:
      checkpoint: an opened checkpoint.
      name: one of its tensors.

    Returns:
      The array; bfloat16 as ``ml_dtypes.bfloat16``.

    Raises:
      InputError: the file changed or its dtype has no NumPy counterpart.
    """
    info = checkpoint.tensors[name]
    path = checkpoint.root / info.file
    try:
        with safe_open(path, framework="np") as handle:
            return handle.get_tensor(info.stored_name)
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: tensor {name} cannot be read ({error}). Copy the file again, or leave the "
            "tensor out with --exclude."
        ) from error


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
