"""Recovers a case and scores every layer against the truth and against the ceiling.

The ceiling is what the elements' likelihood gives when the true updates are known: rounding alone
decides it, and no method that looks at one element at a time can do better.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jdetune
from benchmarks.cases import Case, Layer
from benchmarks.families import Factors
from jdetune import exact, grids, linalg, snap
from jdetune.certificate import verdict
from jdetune.metrics import LOG_MSE_FLOOR, exact_fraction, log_mse
from jdetune.noise import as_merged, merge_variance
from jdetune.solvers.pairs import noise_scales
from jdetune.solvers.refit import shift_to
from jdetune.solvers.relative import units_of, view
from jdetune.stack import narrowest


@dataclasses.dataclass(frozen=True)
class Certainty:
    """A base and the elements of it that are called certain, against the truth.

    Attributes:
      exact: share of elements equal to the truth, bit for bit and dtype included.
      certain: share of elements called certain.
      certain_of_exact: share of the exact elements that are called certain.
      certain_count: number of elements called certain.
      certain_wrong: number of those that are wrong.
      sign_of_zero: number of wrong elements that are zeros of the other sign; nothing can tell.
    """

    exact: float
    certain: float
    certain_of_exact: float
    certain_count: int
    certain_wrong: int
    sign_of_zero: int


@dataclasses.dataclass(frozen=True)
class Score:
    """One recovered layer against the truth.

    Attributes:
      name: of the tensor.
      status: ``jdetune.Status``.
      dtype: of the recovered base.
      elements: of the base.
      found: the recovered base and its certain elements.
      ceiling: the same with the true updates; None where it was not asked for.
      exact_estimate: exact fraction as predicted.
      error: log10 of the mean squared error; NaN without a base.
      predicted: the same as predicted.
      ranks: as found.
      true_ranks: of the updates.
      amplification: of the rounding noise, as predicted.
      stats: scalars that the solver reported.
    """

    name: str
    status: jdetune.Status
    dtype: str
    elements: int
    found: Certainty
    ceiling: Certainty | None
    exact_estimate: float
    error: float
    predicted: float
    ranks: list[int]
    true_ranks: list[int]
    amplification: float
    stats: dict[str, float]

    @property
    def has_base(self) -> bool:
        """Whether anything came back."""
        return self.status.has_base

    @property
    def verdict(self) -> str:
        """The certificate in words."""
        return verdict(self.status, self.exact_estimate, self.amplification)


def score(case: Case, ceilings: bool = True) -> list[Score]:
    """Recovers all layers in one call of ``jdetune.recover`` with its default solver.

    Args:
      case: the layers.
      ceilings: also score what the true updates give.

    Returns:
      Scores in the order of the layers.
    """
    found = jdetune.recover(case.stack)
    return [score_layer(name, layer, found[name], ceilings) for name, layer in case.layers.items()]


def score_layer(name: str, layer: Layer, found: jdetune.Recovery, ceilings: bool = True) -> Score:
    """Scores one recovered layer."""
    base, status = np.asarray(found.base), jdetune.Status(int(found.status))
    scalars = {key: float(value) for key, value in found.stats.items() if np.ndim(value) == 0}
    return Score(
        name=name,
        status=status,
        dtype=str(base.dtype),
        elements=base.size,
        found=certainty(base, np.asarray(found.certain), layer.base),
        ceiling=certainty(*ceiling(layer), layer.base) if ceilings else None,
        exact_estimate=float(found.exact_fraction),
        error=log_mse(base, layer.base),
        predicted=float(found.predicted_error),
        ranks=np.asarray(found.ranks).tolist(),
        true_ranks=layer.ranks,
        amplification=float(found.amplification),
        stats=scalars,
    )


def certainty(base: np.ndarray, certain: np.ndarray, truth: np.ndarray) -> Certainty:
    """Counts of exact and of certain elements."""
    if base.dtype != truth.dtype:
        right = np.zeros(truth.shape, bool)
    else:
        kind = f"u{truth.dtype.itemsize}"
        right = np.ascontiguousarray(base).view(kind) == np.ascontiguousarray(truth).view(kind)
    return Certainty(
        exact=exact_fraction(base, truth),
        certain=float(np.mean(certain)),
        certain_of_exact=float(np.sum(certain & right) / max(np.sum(right), 1)),
        certain_count=int(np.sum(certain)),
        certain_wrong=int(np.sum(certain & ~right)),
        sign_of_zero=int(np.sum((base == 0) & (truth == 0) & ~right)),
    )


def ceiling(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """Base and certain elements from the true updates, in the base's own dtype."""
    with linalg.scope(jnp.dtype("float64")):
        left, right = padded(layer.updates)
        merged = narrowest(layer.merged)
        base, wrong = _snap_true(merged, left, right, str(layer.base.dtype))
        return np.asarray(base).astype(layer.base.dtype), np.asarray(wrong) < exact.CERTAIN


@functools.partial(jax.jit, static_argnames="dtype")
def _snap_true(merged, left, right, dtype: str):
    """``exact.resolve``'s last round with nothing left to fit."""
    models, grid = as_merged(merged), grids.grid(dtype)
    units = units_of(models, noise_scales(models, left.dtype))
    variance = merge_variance(models, left, right, "R1", units)
    active = jnp.any(right != 0, axis=2)
    at = view(models, left, right, active, units, variance)
    arithmetic = jnp.maximum(variance - jnp.square(snap.relative_spacing(models, units)) / 12, 0)
    centre = grids.nearest(at.base, grid)
    found = snap.snap(
        weights=models,
        units=units,
        error=at.error - shift_to(at, centre),
        centre=centre,
        softness=arithmetic,
        grid=grid,
    )
    return found.base, found.wrong


def padded(updates: Sequence[Factors]) -> tuple[np.ndarray, np.ndarray]:
    """True factors in float64 with the scaling in B, zero past each rank."""
    rank = max(one.right.shape[0] for one in updates)
    left = [_pad(one.left.astype(np.float64) * one.scaling, 1, rank) for one in updates]
    right = [_pad(one.right.astype(np.float64), 0, rank) for one in updates]
    return np.stack(left), np.stack(right)


def _pad(matrix: np.ndarray, axis: int, size: int) -> np.ndarray:
    room = [(0, 0), (0, 0)]
    room[axis] = (0, size - matrix.shape[axis])
    return np.pad(matrix, room)


def mean_error(scores: Sequence[Score]) -> float:
    """W-error: mean over the layers that have a base, NaN if none has."""
    errors = [max(one.error, LOG_MSE_FLOOR) for one in scores if one.has_base]
    return float(np.mean(errors)) if errors else float("nan")


def refused(scores: Sequence[Score]) -> int:
    """Layers without a base."""
    return sum(not one.has_base for one in scores)
