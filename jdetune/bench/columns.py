"""Columns of parquet files that nobody vouches for, as matrices and scalars."""

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from jdetune.errors import InputError, printable

#: Elements of a matrix at most: four times the largest of a 7B model.
MAX_ELEMENTS = 2**28
#: Nested lists of a weight at most: a convolution's four axes.
_MAX_AXES = 4


def library(part: str = "pyarrow") -> Any:
    """The pyarrow package, or a module of it.

    Raises:
      InputError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(part)
    except ImportError as error:
        raise InputError(
            "parquet files need the package pyarrow: pip install 'jdetune[bench]', or "
            "pip install pyarrow."
        ) from error


def text(array: Any, column: str, path: Path) -> str:
    """A column's only value, as text that can be a name."""
    value = array[0].as_py()
    if not isinstance(value, str) or not value.strip() or len(value) > 1000:
        raise _bad(path, column, "is not a name")
    return value


def number(array: Any, column: str, path: Path) -> float:
    """A column's only value, as a finite number."""
    value = array[0].as_py()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _bad(path, column, f"is {printable(value)}, not a finite number")
    return float(value)


def matrix(array: Any, column: str, path: Path) -> np.ndarray:
    """A column's only value, a nested list of floats, as float32 of that shape.

    Args:
      array: Arrow array of one row.
      column: its name.
      path: the file.

    Raises:
      InputError: ragged, empty, missing values, no floats, NaN or infinity.
    """
    types = library().types
    shape: list[int] = []
    array = getattr(array, "storage", array)
    while _is_list(types, array.type):
        if array.null_count or len(shape) == _MAX_AXES:
            raise _bad(path, column, "has missing rows or too many axes")
        if types.is_fixed_size_list(array.type):
            sizes = {array.type.list_size} if len(array) else set()
        else:
            sizes = set(np.diff(array.offsets.to_numpy()).tolist())
        if len(sizes) != 1 or 0 in sizes:
            raise _bad(path, column, "is ragged or empty, not a matrix")
        shape.append(sizes.pop())
        array = array.flatten()
    if len(shape) < 2 or not types.is_floating(array.type) or array.null_count:
        raise _bad(path, column, f"is {printable(array.type)} in {len(shape)} lists, not a matrix")
    values = array.to_numpy(zero_copy_only=False).astype(np.float32)
    if not np.isfinite(values).all():
        raise _bad(path, column, "holds NaN or infinity")
    return values.reshape(shape)


def check_type(kind: Any, column: str, path: Path) -> None:
    """Refuses a weight column whose type is no nested list of floats."""
    types, depth = library().types, 0
    kind = getattr(kind, "storage_type", kind)
    while _is_list(types, kind):
        kind, depth = kind.value_type, depth + 1
    if not types.is_floating(kind) or not 2 <= depth <= _MAX_AXES:
        raise _bad(path, column, f"is {printable(kind)} in {depth} nested lists, not a matrix")


def _is_list(types: Any, kind: Any) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _bad(path: Path, column: str, what: str) -> InputError:
    return InputError(
        f"{path}: column {printable(column)} {what}. It is not LoWRA Bench as published; download "
        "it again, and do not use it if you do not trust where it is from."
    )
