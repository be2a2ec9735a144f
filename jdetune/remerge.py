"""How well base and factors give the models back: figures of every model, without the truth."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jdetune.checkpoint.adapter_reader import merge_peft
from jdetune.checkpoint.reader import numpy_dtype, raw_bytes
from jdetune.checkpoint.stacks import factors_of
from jdetune.metrics import ulp_steps
from jdetune.noise import EDGE_MARGIN
from jdetune.result import Recovery

#: Elements that are looked at together: bounds what this needs beside the matrix itself.
_BLOCK = 1 << 20


class Remerged(NamedTuple):
    """What merging one model's factors into the base gives.

    Attributes:
      match: share of elements that come back bit for bit.
      steps: counts of ``metrics.ulp_steps``, re-merged against stored.
      values: singular values of the update, largest first, to four digits.
      edge: singular value that this model's rounding alone may reach, to four digits.
      noise: rms of its rounding error, to four digits.
    """

    match: float
    steps: dict[str, int]
    values: list[float]
    edge: float
    noise: float


def remerge(
    found: Recovery, stack: np.ndarray, dtypes: Sequence[str], rounding: str = "R1"
) -> list[Remerged]:
    """Merges every model's factors into the base and compares with what is stored.

    Args:
      found: a matrix with a base.
      stack: merged weights, [model, row, col].
      dtypes: what each model is stored in; the stack may be wider.
      rounding: rule by which the models were merged (``jdetune.noise.ROUNDINGS``).
    """
    figures = []
    for i, (merged, dtype) in enumerate(zip(stack, dtypes, strict=True)):
        stored = merged.astype(numpy_dtype(dtype), copy=False)
        left, right = factors_of({"": found}, i)[""]
        base = np.asarray(found.base)
        again = merge_peft(base, left, right, dtype=stored.dtype, rounding=rounding)
        match = float(np.mean(raw_bits(again) == raw_bits(stored)))
        values = [_short(value) for value in singular_values(left, right)]
        edge, rms = (_short(value) for value in rounding_noise(stored))
        figures.append(Remerged(match, ulp_steps(again, stored), values, edge, rms))
    return figures


def together(slices: Sequence[Remerged]) -> Remerged:
    """Figures of a stack of matrices of one shape: shares and counts of all, the largest values."""
    steps: dict[str, int] = {}
    for figure in slices:
        for step, count in figure.steps.items():
            steps[step] = steps.get(step, 0) + count
    return Remerged(
        match=float(np.mean([figure.match for figure in slices])),
        steps=steps,
        values=max((figure.values for figure in slices), key=lambda values: max(values, default=0)),
        edge=max(figure.edge for figure in slices),
        noise=_short(float(np.sqrt(np.mean([figure.noise**2 for figure in slices])))),
    )


def entries(figures: Sequence[Remerged] | None) -> dict[str, Any]:
    """Keys of report.json; None where nothing was merged again."""
    if figures is None:
        return dict.fromkeys(("ulp_histogram", "singular_values", "noise_edge"))
    return {
        "ulp_histogram": together(figures).steps if figures else {},
        "singular_values": [list(figure.values) for figure in figures],
        "noise_edge": [figure.edge for figure in figures],
    }


def singular_values(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Singular values of ``left @ right``, in float64, largest first; none where it is not finite.

    Args:
      left: B, [row, rank].
      right: A, [rank, col].

    Example:
      >>> singular_values(np.float32([[1.0], [1.0]]), np.float32([[0.0, 2.0]])).round(4).tolist()
      [2.8284]
    """
    if left.shape[1] == 0 or not (np.isfinite(left).all() and np.isfinite(right).all()):
        return np.zeros(0)
    tall = (left.astype(np.float64), right.astype(np.float64).T)
    ours, theirs = (np.asarray(np.linalg.qr(side, mode="r")) for side in tall)
    return np.linalg.svd(ours @ theirs.T, compute_uv=False)


def rounding_noise(stored: np.ndarray) -> tuple[float, float]:
    """What rounding alone does to one model's weights.

    Args:
      stored: the weights, [row, col]; elements that are not finite count nothing.

    Returns:
      A bound on the largest singular value of the rounding error, as ``jdetune.noise.pair_edge``
      has it, and the error's rms in units of the weights.
    """
    import ml_dtypes

    info = ml_dtypes.finfo(stored.dtype)
    rows, cols = np.zeros(stored.shape[0]), np.zeros(stored.shape[1])
    height = max(1, _BLOCK // max(1, stored.shape[1]))
    for start in range(0, stored.shape[0], height):
        block = np.abs(stored[start : start + height].astype(np.float64))
        _, exponent = np.frexp(np.maximum(block, float(info.smallest_normal)))
        ulp = np.ldexp(float(info.eps), exponent - 1)
        power = np.where(np.isfinite(block), ulp * ulp, 0.0) / 12
        rows[start : start + height] = power.sum(axis=1)
        cols += power.sum(axis=0)
    edge = np.sqrt(np.max(rows, initial=0)) + np.sqrt(np.max(cols, initial=0))
    return EDGE_MARGIN * float(edge), float(np.sqrt(rows.sum() / max(1, stored.size)))


def raw_bits(array: np.ndarray) -> np.ndarray:
    """The elements as integers of their own width."""
    return raw_bytes(array).view(f"u{array.dtype.itemsize}")


def _short(value: float) -> float:
    """To four digits, so that reports stay small."""
    return float(f"{value:.4g}")
