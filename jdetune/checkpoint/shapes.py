"""Tensors as the matrices that are solved: convolutions flattened, stacks of experts cut apart."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from jdetune.checkpoint.index import FLOATS, Checkpoint, TensorInfo
from jdetune.checkpoint.reader import deferred, empty, numpy_dtype, read_slice, read_tensor
from jdetune.deferred import Deferred

#: Smallest side that low-rank updates of three models fit into.
MIN_SIDE = 3
#: Longest side of a one-dimensional kernel; a last axis beyond it is a matrix's column.
MAX_KERNEL = 15
_STACKED = re.compile(r"experts|(^|[._])moe([._]|$)")
_CONV = re.compile(r"conv")
_SLICE = re.compile(r"(.*)\[(\d+)\]")


@dataclasses.dataclass(frozen=True)
class View:
    """How a tensor is taken as matrices.

    Attributes:
      kind: ``matrix``, ``conv`` ([out, in, *kernel] as [out, in * kernel]) or ``stack``
        ([slice, row, col], a matrix each).
      row: rows of each matrix.
      col: its columns.
      slices: number of matrices of a stack, None where the tensor is one matrix.
      reason: what a tensor of three axes was taken for, and why.
    """

    kind: str
    row: int
    col: int
    slices: int | None = None
    reason: str | None = None


def view_of(info: TensorInfo) -> View | None:
    """The matrices of a tensor; None where it is no float tensor of two axes or more.

    Also None where a side is too small for updates of low rank in three models: what differs there
    is kept like a vector.

    Three axes can be a convolution [out, in, kernel] or a stack [expert, row, col]. The name
    decides where it says so; else a short odd last axis is a kernel.

    Example:
      >>> view_of(TensorInfo("conv.weight", "", "float32", (8, 4, 3, 3)))
      View(kind='conv', row=8, col=36, slices=None, reason=None)
      >>> view_of(TensorInfo("mlp.experts.up", "", "float32", (4, 16, 8))).slices
      4
    """
    shape = info.shape
    if info.dtype not in FLOATS or len(shape) < 2 or 0 in shape:
        return None
    view = _any_view(info)
    return view if min(view.row, view.col) >= MIN_SIDE else None


def _any_view(info: TensorInfo) -> View:
    shape = info.shape
    if len(shape) == 2:
        return View("matrix", shape[0], shape[1])
    stacked, why = _is_stack(info.name, shape)
    if stacked:
        lead = math.prod(shape[:-2])
        return View(
            "stack", shape[-2], shape[-1], lead, f"taken for {lead} stacked matrices: {why}"
        )
    reason = f"taken for a convolution: {why}" if len(shape) == 3 else None
    return View("conv", shape[0], math.prod(shape[1:]), None, reason)


def _is_stack(name: str, shape: tuple[int, ...]) -> tuple[bool, str]:
    """Whether a tensor of three axes or more is a stack of matrices, and what says so."""
    words = name.lower()
    if _STACKED.search(words):
        return True, "its name speaks of experts"
    if len(shape) > 3:
        return False, "it has a kernel of two axes or more"
    if _CONV.search(words):
        return False, "its name says so"
    kernel = math.prod(shape[-1:])
    if kernel % 2 == 1 and kernel <= MAX_KERNEL:
        return False, f"its last axis of {kernel} is as short as a kernel"
    return True, f"its last axis of {kernel} is no kernel's"


def smaller_side(info: TensorInfo) -> int:
    """The smaller side of a tensor's matrices, which no rank exceeds; 0 where it has none."""
    view = view_of(info)
    return 0 if view is None else min(view.row, view.col)


def units(info: TensorInfo) -> tuple[str, ...]:
    """Names of a tensor's matrices: its own, or one a slice.

    Example:
      >>> units(TensorInfo("experts.up", "", "float32", (2, 16, 8)))
      ('experts.up[0]', 'experts.up[1]')
    """
    view = view_of(info)
    if view is None or view.slices is None:
        return (info.name,)
    return tuple(unit_name(info.name, index) for index in range(view.slices))


def unit_name(name: str, index: int) -> str:
    """Name of one matrix of a stack."""
    return f"{name}[{index}]"


def locate(tensors: Mapping[str, object], unit: str) -> tuple[str, int | None]:
    """Tensor that a matrix belongs to, and its place there (None: it is all of it).

    Example:
      >>> locate({"up": 0}, "up[3]"), locate({"up[3]": 0}, "up[3]")
      (('up', 3), ('up[3]', None))
    """
    found = _SLICE.fullmatch(unit)
    if unit in tensors or found is None or found[1] not in tensors:
        return unit, None
    return found[1], int(found[2])


def read_matrix(checkpoint: Checkpoint, unit: str) -> np.ndarray:
    """One matrix of a checkpoint, [row, col], in the dtype it is stored in.

    Args:
      checkpoint: an opened checkpoint.
      unit: name of a tensor, or of one matrix of a stack.
    """
    name, index = locate(checkpoint.tensors, unit)
    view = view_of(checkpoint.tensors[name])
    assert view is not None, f"{name} is no matrix"
    if index is None:
        return read_tensor(checkpoint, name).reshape(view.row, view.col)
    shape = checkpoint.tensors[name].shape
    first, rest = divmod(index, math.prod(shape[1:-2]))
    part = read_slice(checkpoint, name, first)
    return part.reshape(-1, view.row, view.col)[rest]


def whole_of(checkpoint: Checkpoint, name: str) -> Deferred:
    """A tensor as it is in the file, with the rows that are not compared; read when looked at."""
    info = checkpoint.tensors[name]
    if info.whole is not None:
        full = dataclasses.replace(info, shape=info.whole, whole=None)
        checkpoint = dataclasses.replace(checkpoint, tensors={name: full})
    return deferred(checkpoint, name)


def read_stack(checkpoints: Sequence[Checkpoint], unit: str) -> np.ndarray:
    """One matrix of all models, [model, row, col]; float32 holds dtypes that differ."""
    name, _ = locate(checkpoints[0].tensors, unit)
    view = view_of(checkpoints[0].tensors[name])
    assert view is not None, f"{name} is no matrix"
    dtypes = {checkpoint.tensors[name].dtype for checkpoint in checkpoints}
    dtype = numpy_dtype(dtypes.pop()) if len(dtypes) == 1 else np.dtype(np.float32)
    stack = empty((len(checkpoints), view.row, view.col), dtype, unit)
    for model, checkpoint in enumerate(checkpoints):
        stack[model] = read_matrix(checkpoint, unit)
    return stack


def matrices(array: np.ndarray, view: View) -> np.ndarray:
    """An array as its matrices, [slice, row, col]; a tensor that is one matrix has one slice."""
    return array.reshape(view.slices or 1, view.row, view.col)
