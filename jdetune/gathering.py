"""Gathers what came of single matrices into results a tensor: stacks, tied heads, small heads."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from jdetune.checkpoint.plan import Plan, TensorPlan, slice_plans
from jdetune.checkpoint.reader import numpy_dtype
from jdetune.checkpoint.shapes import smaller_side
from jdetune.remerge import together
from jdetune.report import TensorResult, matrices
from jdetune.status import Status

_SMALL = (
    "as small as the updates' ranks allow, so nothing says whether it was trained whole: it is "
    "taken for that, and each adapter keeps its own copy"
)


def results_of(plan: Plan, solved: Mapping[str, TensorResult]) -> list[TensorResult]:
    """What came of every tensor.

    Args:
      plan: what was planned.
      solved: result of every matrix that was to be recovered.
    """
    whole = {tensor.name: _of_tensor(tensor, solved) for tensor in plan.tensors}
    judged = judge_heads(list(whole.values()))
    whole = {result.plan.name: result for result in judged}
    return [_of_tied(whole[tensor.name], whole) for tensor in plan.tensors]


def judge_heads(results: Sequence[TensorResult]) -> list[TensorResult]:
    """Calls a failed matrix too small to tell low rank from full rank each model's own.

    A head of four classes has rank four at most; beside updates of rank 16, it was trained whole as
    a rule (PEFT's ``modules_to_save``).
    """
    good = [r for r in matrices(results) if r.status == "recovered" and r.recovery is not None]
    top = max((int(np.max(r.recovery.ranks)) for r in good if r.recovery is not None), default=0)
    codes = (Status.NOT_LOW_RANK, Status.RANK_TOO_LARGE)
    return [
        dataclasses.replace(r, status="per_model", reason=_SMALL, base_dtype=None)
        if r.status == "failed"
        and r.code in codes
        and not r.parts
        # three ranks must fit
        and smaller_side(r.plan.info) < 3 * top
        else r
        for r in results
    ]


def _of_tensor(tensor: TensorPlan, solved: Mapping[str, TensorResult]) -> TensorResult:
    """A tensor's result from those of its matrices."""
    if tensor.action != "recover":
        dtype = tensor.dtype if tensor.source is not None else None
        return TensorResult(plan=tensor, status=tensor.action, base_dtype=dtype)
    names = list(slice_plans(tensor))
    return solved[names[0]] if names == [tensor.name] else _of_stack(tensor, solved, names)


def _of_stack(
    tensor: TensorPlan, solved: Mapping[str, TensorResult], names: Sequence[str]
) -> TensorResult:
    """A stack's result: it has a base where every slice has one."""
    parts = tuple(solved[name] for name in names)
    bad = [part for part in parts if part.status != "recovered"]
    said = [f"{part.plan.name}: {part.reason}" for part in (bad or parts) if part.reason]
    more = f" (and {len(said) - 1} more of its {len(parts)} slices)" if len(said) > 1 else ""
    text = "; ".join(filter(None, [tensor.reason, said[0] + more if said else None]))
    dtypes = [numpy_dtype(part.base_dtype) for part in parts if part.base_dtype]
    merged = [part.remerged for part in parts if part.remerged is not None]
    return TensorResult(
        plan=tensor,
        status="failed" if bad else "recovered",
        method=parts[0].method,
        remerged=None if bad else tuple(map(together, zip(*merged, strict=True))),
        seconds=sum(part.seconds or 0.0 for part in parts),
        reason=text or None,
        base_dtype=None if bad else str(functools.reduce(wider, dtypes)),
        parts=parts,
    )


def wider(first: np.dtype, second: np.dtype) -> np.dtype:
    """The narrowest dtype that holds both: float32 for float16 and bfloat16.

    Example:
      >>> wider(np.dtype("float16"), np.dtype("float16"))
      dtype('float16')
    """
    return first if first == second else np.dtype(np.float32)


def _of_tied(result: TensorResult, results: Mapping[str, TensorResult]) -> TensorResult:
    """A tied tensor's result is that of the tensor that it is tied to."""
    if result.plan.tied_to is None:
        return result
    other = results[result.plan.tied_to]
    if other.status == "skipped":
        plan = dataclasses.replace(result.plan, reason=other.plan.reason)
        return dataclasses.replace(other, plan=plan)
    return dataclasses.replace(other, plan=result.plan, reason=result.plan.reason, seconds=None)
