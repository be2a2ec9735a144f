"""Solves layers in which single models do not belong or are damaged, from the other models.

Nothing is done where the ordinary solve succeeds. What was done is said in a layer's ``stats``:
``base_group`` is, for each model, 0 if the base was solved from it, ``DAMAGED`` if it is not finite
everywhere but has an update, ``NO_UPDATE`` if too much of it is not finite, and else the number of
the group of models that it shares another base with. A layer that fails may have groups too.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np

from jdetune.damage import finite_models, own_update
from jdetune.foreign import labels, solvable, split_by_base
from jdetune.groups import LayerResult, failed
from jdetune.stack import narrowest
from jdetune.status import Status
from jdetune.types import Array

#: Solves finite same-shaped layers in order.
Run: TypeAlias = Callable[[Sequence[Array]], Iterator[LayerResult]]

NO_UPDATE, DAMAGED = -1, -2
#: What a layer may fail with if one of its models has another base.
SUSPICIOUS = (Status.NOT_LOW_RANK, Status.RANK_TOO_LARGE)


def solve_group(
    stacks: Sequence[Array], run: Run, dtype: jnp.dtype, low_rank: bool = True
) -> Iterator[LayerResult]:
    """Solves same-shaped layers; models that do not belong are left out, layer by layer.

    Args:
      stacks: [model, row, col] each, three models or more, of one shape and dtype.
      run: the ordinary solve.
      dtype: dtype of the algebra.
      low_rank: whether the ordinary solve tells what is not low rank, so that strangers are found.

    Yields:
      One result a layer, with ``base_group`` in its ``stats``.
    """
    finite = [finite_models(stack) for stack in stacks]
    whole = [stack for stack, good in zip(stacks, finite, strict=True) if good.all()]
    batch = run(whole) if whole else iter(())
    known: set[tuple[int, ...]] = set()
    for stack, good in zip(stacks, finite, strict=True):
        if not good.all():
            yield _without_damaged(np.asarray(stack), good, run, dtype, low_rank)
            continue
        # groups that made the ordinary solve fail will do so again: such layers go without it,
        # and then one by one
        result = _by_base(stack, run, known) if known else None
        if result is None:
            result = next(run([stack])) if known else next(batch)
            result = _one_base(stack, result, run, low_rank)
            if result.status in (Status.OK, Status.NOT_LOW_RANK) and group_of(result).any():
                known.add(tuple(group_of(result).tolist()))
        yield result


def group_of(result: LayerResult) -> np.ndarray:
    """The models' ``base_group``."""
    return np.asarray(result.stats["base_group"]).astype(np.int32)


def _one_base(stack: Array, result: LayerResult, run: Run, low_rank: bool) -> LayerResult:
    """The ordinary result, or one without the models of other bases if that explains a failure."""
    result = _labelled(result, np.zeros(stack.shape[0], np.int32))
    if not low_rank or result.status not in SUSPICIOUS:
        return result
    again = _by_base(stack, run)
    if again is None or again.status.has_base:
        return again or result
    return _labelled(result, group_of(again))


def _by_base(
    stack: Array, run: Run, known: set[tuple[int, ...]] | None = None
) -> LayerResult | None:
    """A solve without strangers, or a refusal; None if there is one base, or no known groups."""
    split = split_by_base(stack)
    groups = labels(split)
    if len(split) == 1 or (known is not None and tuple(groups.tolist()) not in known):
        return None
    if not solvable(split):
        return _labelled(failed(stack, Status.NOT_LOW_RANK), groups)
    kept = np.flatnonzero(groups == 0)
    return _labelled(_expand(_subset(stack, kept, run), kept, len(groups)), groups)


def _without_damaged(
    stack: np.ndarray, good: np.ndarray, run: Run, dtype: jnp.dtype, low_rank: bool
) -> LayerResult:
    """Solves from the finite models; then the others' updates from what is finite of them."""
    kept, groups = np.flatnonzero(good), np.zeros(len(good), np.int32)
    if len(kept) < 3:
        return _labelled(failed(stack, Status.NON_FINITE), groups)
    result = _one_base(stack[kept], _subset(stack, kept, run), run, low_rank)
    groups[kept] = group_of(result)
    result = _expand(result, kept, len(good))
    if result.status.has_base:
        for model in np.flatnonzero(~good):
            base = np.asarray(result.base).astype(stack.dtype)
            update = own_update(stack[model], base, dtype)
            groups[model] = NO_UPDATE if update is None else DAMAGED
            if update is not None:
                result = _with_update(result, int(model), *update)
    return _labelled(result, groups)


def _subset(stack: Array, kept: np.ndarray, run: Run) -> LayerResult:
    """The ordinary solve of some models; they may be rounded to fewer bits than all are."""
    return next(run([narrowest(np.asarray(stack)[kept])]))


def _expand(result: LayerResult, kept: np.ndarray, n_models: int) -> LayerResult:
    """Rank 0 and no update for the models that were not solved."""

    def scatter(values: np.ndarray) -> np.ndarray:
        full = np.zeros((n_models, *values.shape[1:]), values.dtype)
        full[kept] = values
        return full

    return result._replace(
        left=scatter(result.left), right=scatter(result.right), ranks=scatter(result.ranks)
    )


def _with_update(
    result: LayerResult, model: int, left: np.ndarray, right: np.ndarray
) -> LayerResult:
    rank = left.shape[1]
    room = max(rank - result.left.shape[2], 0)
    lefts = np.pad(result.left, ((0, 0), (0, 0), (0, room)))
    rights = np.pad(result.right, ((0, 0), (0, room), (0, 0)))
    lefts[model, :, :rank], rights[model, :rank] = left, right
    ranks = result.ranks.copy()
    ranks[model] = rank
    return result._replace(left=lefts, right=rights, ranks=ranks)


def _labelled(result: LayerResult, groups: np.ndarray) -> LayerResult:
    return result._replace(stats={**result.stats, "base_group": groups.astype(np.float32)})
