"""Whether two models share a base: rank tests of their difference, matrix after matrix."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jdetune.checkpoint.manifest import is_common
from jdetune.checkpoint.reader import numpy_dtype
from jdetune.foreign import Spectrum, low_rank, spectrum
from jdetune.types import STORAGE_DTYPES
from jdetune.zoo.sampling import LEAST_SIDE, Order, Sample, Sampler, kind_of, same_files

#: Two matrices that differ by more than this share of their size settle that the bases differ.
FAR = 0.5
#: Where matrices disagree, this many times those asked for are tested, and those of low rank must
#: be this many times the others: near the rounding, a quantised base may pass in single matrices.
PATIENCE, MAJORITY = 3, 2
#: A difference is one of rounding if the middles of their spectra agree within this factor.
ROUNDING_SPAN = 1.5
#: Rows and columns that are enough to see that.
GLANCE = 256
WIDEST = STORAGE_DTYPES[0]


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one matrix says of two models.

    Attributes:
      name: the matrix.
      verdict: ``equal | low_rank | full_rank | not_finite``; ``full_rank`` is any that is not low.
      rank: of the difference, above the rounding; None where it was not measured.
      side: the largest rank that it could have.
      size: rms of the difference over rms of the weights.
      storage: dtypes whose rounding was expected in the two.
    """

    name: str
    verdict: str
    rank: int | None = None
    side: int | None = None
    size: float | None = None
    storage: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Relation:
    """What all looked-at matrices say of two models.

    Attributes:
      first: index of one model.
      second: index of the other.
      layers: what was looked at.
      verdict: ``copy`` (every tensor is equal), ``equal_matrices`` (all compared are), ``related``
        (one base), ``unrelated``, or ``unknown`` (nothing could be compared).
      rounding: the 16-bit dtype whose rounding is what unrelated models seem to differ by.
    """

    first: int
    second: int
    layers: tuple[Layer, ...]
    verdict: str
    rounding: str | None = None

    @property
    def joined(self) -> bool:
        """Whether they belong to one group."""
        return self.verdict in ("copy", "equal_matrices", "related")

    @property
    def size(self) -> float:
        """Median relative size of the difference in what was tested; infinity if nothing was."""
        sizes = [layer.size for layer in self.layers if layer.size is not None]
        return float(np.median(sizes)) if sizes else float("inf")

    def names(self, verdict: str) -> tuple[str, ...]:
        """Matrices with a verdict."""
        return tuple(layer.name for layer in self.layers if layer.verdict == verdict)


def compare_models(sampler: Sampler, first: int, second: int, order: Order, count: int) -> Relation:
    """Looks at matrices until ``count`` differing ones were tested and every kind was seen.

    The tested ones are of two kinds at least, where there are two that differ. Where they disagree,
    more are tested, and a majority of two thirds decides. Models that are equal in all of it are
    compared to the last tensor.

    Args:
      sampler: reads the models.
      first: index of a model.
      second: index of another.
      order: in which order to look.
      count: differing matrices to test.
    """
    pair = [sampler.checkpoints[index] for index in (first, second)]
    if set(pair[0].tensors) == set(pair[1].tensors) and same_files(*pair):
        return Relation(first, second, (), "copy")
    layers: list[Layer] = []
    for place, name in enumerate(order.names):
        if _settled(layers, count, place, order.first_round):
            break
        if is_common(pair, name):
            layers.append(compare_matrix(sampler, first, second, name))
    layers = [  # what later matrices told of the rounding holds for the earlier ones, too
        compare_matrix(sampler, first, second, layer.name)
        if layer.storage not in (None, _storage(sampler, first, second, layer.name))
        else layer
        for layer in layers
    ]
    verdict = _judge(sampler, first, second, layers)
    full = [layer for layer in layers if layer.verdict == "full_rank"]
    near = verdict == "unrelated" and (full[0].size or 0) < FAR
    rounding = _rounding(sampler, first, second, full[0].name) if near else None
    return Relation(first, second, tuple(layers), verdict, rounding)


def _settled(layers: Sequence[Layer], count: int, place: int, first_round: int) -> bool:
    low = [layer for layer in layers if layer.verdict == "low_rank"]
    full = [layer for layer in layers if layer.verdict == "full_rank"]
    kinds = {kind_of(layer.name) for layer in (*low, *full)}
    far = {kind_of(layer.name) for layer in full if (layer.size or 0) > FAR}
    if len(far) > 1 and not low and not any(layer.verdict == "equal" for layer in layers):
        return True
    several = len(kinds) > 1 or place >= 2 * first_round
    wanted = count * (PATIENCE if low and full else 1)
    return place >= first_round and len(low) + len(full) >= wanted and several


def _judge(sampler: Sampler, first: int, second: int, layers: Sequence[Layer]) -> str:
    count = {v: sum(layer.verdict == v for layer in layers) for v in ("low_rank", "full_rank")}
    if any(count.values()):
        agreed = count["low_rank"] >= MAJORITY * count["full_rank"]
        return "related" if count["low_rank"] and agreed else "unrelated"
    if not layers or any(layer.verdict == "not_finite" for layer in layers):
        return "unknown"
    return "copy" if sampler.equal_tensors(first, second) else "equal_matrices"


def compare_matrix(sampler: Sampler, first: int, second: int, name: str) -> Layer:
    """What one matrix says of two models."""
    one, two = sampler.get(first, name), sampler.get(second, name)
    if one.mark == two.mark:
        return Layer(name, "equal")
    pair = finite_pair(one, two)
    if pair is None:
        return Layer(name, "not_finite")
    storage = _storage(sampler, first, second, name)
    low, rank = low_rank(pair, storage)
    size = _rms(pair[0] - pair[1]) / max(_rms(pair), 1e-30)
    verdict = "low_rank" if low else "full_rank"
    return Layer(name, verdict, rank, min(pair.shape[1:]), size, storage)


def _storage(sampler: Sampler, first: int, second: int, name: str) -> tuple[str, str]:
    return sampler.storage(first, name), sampler.storage(second, name)


def pair_spectrum(
    sampler: Sampler, first: int, second: int, name: str, storage: Sequence[str]
) -> Spectrum | None:
    """Singular values of the difference of two models; None if it is not finite."""
    pair = finite_pair(sampler.get(first, name), sampler.get(second, name))
    return None if pair is None else spectrum(pair, storage, even=True)


def finite_pair(one: Sample, two: Sample) -> np.ndarray | None:
    """Both samples without rows and columns where one is not finite; None if little is left."""
    pair = np.stack([np.asarray(s.matrix, np.float32) for s in (one, two)])
    good = np.isfinite(pair[0]) & np.isfinite(pair[1])
    if good.all():
        return pair
    rows = good.mean(axis=1) > 0.5
    cols = good[rows].all(axis=0)
    pair = pair[:, rows][:, :, cols]
    least = min(LEAST_SIDE, *one.matrix.shape)
    return pair if min(pair.shape[1:]) >= least and pair.size > good.size else None


def _rms(matrix: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(matrix, dtype=np.float64))))


def _rounding(sampler: Sampler, first: int, second: int, name: str) -> str | None:
    """The 16-bit dtype whose rounding, of a base before it was merged, looks like the difference.

    The middle of the spectrum is compared with that of what rounding a model would change: the
    updates only move its start.
    """
    pair = finite_pair(sampler.get(first, name), sampler.get(second, name))
    if pair is None or _storage(sampler, first, second, name) != (WIDEST, WIDEST):
        return None
    pair = pair[:, :GLANCE, :GLANCE]
    middle = float(np.median(np.linalg.svd(pair[0] - pair[1], compute_uv=False)))
    for dtype in STORAGE_DTYPES[:0:-1]:
        with np.errstate(over="ignore"):
            lost = pair[0] - pair[0].astype(numpy_dtype(dtype)).astype(np.float32)
        if np.isfinite(lost).all():
            usual = float(np.median(np.linalg.svd(lost, compute_uv=False)))
            if usual / ROUNDING_SPAN < middle < usual * ROUNDING_SPAN:
                return dtype
    return None
