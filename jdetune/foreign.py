"""Which models share a base: is the difference of two low rank, down to the rounding error?

Two models of one base differ by :math:`M_i - M_j`, of rank :math:`r_i + r_j`, and rounding; of two
bases, by a matrix of full rank. So do a base and its full fine-tune, or its DoRA and requantised
merges: nothing in the weights tells these apart from another base.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jdetune.noise import as_merged, pair_edge, spacing
from jdetune.solvers.pairs import MERGE_ARITHMETIC
from jdetune.stack import storage_dtypes
from jdetune.types import STORAGE_DTYPES, Array

#: Models by base: indices, the largest group first.
Groups: TypeAlias = tuple[tuple[int, ...], ...]

#: Three equal ranks must fit the smaller side, so two take up two thirds of it at most.
RELATED_SHARE = 2 / 3
#: What the low rank of two related models leaves over is within this many times the rounding error.
RELATED_TAIL = 2.5
#: Rows and columns that are looked at: as many drawn ones show the same rank.
SIDE = 1024
#: Ranks up to this share of the side are taken as they are; larger ones must hold in a part of the
#: matrix in which they still leave some room.
UNSUSPICIOUS, ROOMY = 0.125, 0.85
_spacing, _pair_edge = jax.jit(spacing), jax.jit(pair_edge)
#: References without a relative after which no further one is tried.
GIVE_UP = 4


def split_by_base(stack: Float[Array, "model row col"]) -> Groups:
    """Groups models by base, as one layer shows it.

    Every model is compared with one reference, those that do not match it with the first of
    themselves, and so on: the work is linear in the number of models and in that of bases.

    Args:
      stack: merged weights of one layer, finite.

    Returns:
      Indices of models by base, the largest group first; a model without a relative is alone.

    Example:
      >>> from jdetune import synth
      >>> one, two = (synth.family(3, 48, 40, 2, seed=s).merged for s in (1, 2))
      >>> split_by_base(np.concatenate([one, two[:1]]))
      ((0, 1, 2), (3,))
    """
    host = sample_sides(np.asarray(stack))
    storage = storage_dtypes(host)
    groups: list[tuple[int, ...]] = []
    rest = list(range(len(host)))
    while rest:
        if len(groups) == GIVE_UP and max(map(len, groups)) == 1:
            groups += [(model,) for model in rest]
            break
        first, *others = rest
        mates = [m for m in others if related(host[[first, m]], (storage[first], storage[m]))]
        groups.append((first, *mates))
        rest = [model for model in others if model not in mates]
    return tuple(sorted(groups, key=lambda group: (-len(group), group)))


class Spectrum(NamedTuple):
    """Singular values of a difference of two models, beside what rounding gives.

    Attributes:
      values: largest first.
      edge: largest one that rounding alone gives.
      tail: rms of what is below the edge, in units of the rounding error.
    """

    values: np.ndarray
    edge: float
    tail: float

    @property
    def rank(self) -> int:
        """How many stand above the rounding."""
        return int(np.sum(self.values > self.edge))

    @property
    def low_rank(self) -> bool:
        """Whether low rank and rounding are all there is."""
        return self.rank <= RELATED_SHARE * len(self.values) and self.tail <= RELATED_TAIL


def related(pair: Float[np.ndarray, "2 row col"], storage: Sequence[str]) -> bool:
    """Whether two models differ by low rank and rounding, on the host in float64.

    Args:
      pair: both as stored, finite.
      storage: dtype that each was rounded to.
    """
    return low_rank(pair, storage)[0]


def low_rank(pair: np.ndarray, storage: Sequence[str]) -> tuple[bool, int]:
    """Whether two models differ by low rank and rounding, and by which rank.

    Of two models in different dtypes, the one in the narrower may have been merged from a base
    that was rounded, too.
    """
    rank, twice = 0, tuple(1 + (name != STORAGE_DTYPES[0]) for name in storage)
    for roundings in ((1, 1), twice) if storage[0] != storage[1] else ((1, 1),):
        found = spectrum(pair, storage, even=True, roundings=roundings)
        if found.low_rank and _holds_in_part(pair, storage, found.rank, roundings):
            return True, found.rank
        rank = rank or found.rank
    return False, rank


def _holds_in_part(
    pair: np.ndarray, storage: Sequence[str], rank: int, roundings: Sequence[int]
) -> bool:
    """Whether a rank is the same in a part of the matrix: a spread-out spectrum shrinks with it.

    What differs by a little more than the rounding everywhere (a quantised base) has many singular
    values below the noise edge, and looks like a large rank.
    """
    side = min(pair.shape[1:])
    if rank <= UNSUSPICIOUS * side:
        return True
    share = max(0.5, rank / (ROOMY * side))
    rng = np.random.default_rng(0)
    rows, cols = (
        rng.choice(size, int(np.ceil(share * size)), replace=False) for size in pair.shape[1:]
    )
    part = spectrum(pair[:, rows][:, :, cols], storage, even=True, roundings=roundings)
    return part.rank > rank * (1 + share) / 2


def spectrum(
    pair: Float[np.ndarray, "2 row col"],
    storage: Sequence[str],
    even: bool = False,
    roundings: Sequence[int] = (1, 1),
) -> Spectrum:
    """Singular values of the difference of two models, and where rounding begins.

    Args:
      pair: both as stored, finite.
      storage: dtype that each was rounded to.
      even: scale rows and columns so that each holds the same rounding error. The rank is the
        same, and what is above the rounding everywhere cannot hide below its largest rows.
      roundings: how often each was rounded.

    Example:
      >>> from jdetune import synth
      >>> spectrum(synth.family(2, 48, 40, 2).merged, ("float32", "float32")).rank
      4
    """
    difference = pair[0].astype(np.float64) - pair[1].astype(np.float64)
    steps = np.asarray(_spacing(as_merged(jnp.asarray(pair), storage)), np.float64)
    variance = (
        roundings[0] * steps[0] ** 2 + roundings[1] * steps[1] ** 2
    ) / 12 + MERGE_ARITHMETIC * difference**2
    if even:
        rows, cols = variance.mean(axis=1, keepdims=True), variance.mean(axis=0)
        usual = np.maximum(rows * cols, 1e-60) / max(float(variance.mean()), 1e-60)
        difference, variance = difference / np.sqrt(usual), variance / usual
    values = np.linalg.svd(difference, compute_uv=False)
    edge = float(_pair_edge(jnp.asarray(variance, jnp.float32)))
    weak, expected = float(np.sum(values[values <= edge] ** 2)), float(np.sum(variance))
    return Spectrum(values, edge, (weak / expected) ** 0.5 if weak else 0.0)


def solvable(groups: Groups) -> bool:
    """Whether one group has three models or more and nobody else has a relative.

    Example:
      >>> solvable(((0, 1, 3), (2,))), solvable(((0, 1, 2), (3, 4))), solvable(((0, 1), (2,)))
      (True, False, False)
    """
    return len(groups[0]) >= 3 and all(len(group) == 1 for group in groups[1:])


def labels(groups: Groups) -> np.ndarray:
    """Number of each model's group, [model].

    Example:
      >>> labels(((0, 1, 3), (2,))).tolist()
      [0, 0, 1, 0]
    """
    found = np.zeros(sum(map(len, groups)), np.int32)
    for number, group in enumerate(groups):
        found[list(group)] = number
    return found


def sample_sides(stack: np.ndarray, seed: int = 0) -> np.ndarray:
    """At most ``SIDE`` rows and columns of [model, row, col], the same ones for every stack."""
    draw = np.random.default_rng(seed)
    for axis in (1, 2):
        size = stack.shape[axis]
        if size > SIDE:
            chosen = np.sort(draw.choice(size, SIDE, replace=False))
            stack = np.take(stack, chosen, axis=axis)
    return stack
