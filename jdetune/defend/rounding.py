r"""The counter-attack on small residuals: take them for rounding, and recover what is above it.

``jdetune.recover`` knows the rounding of the stored dtype and refuses what is more than low rank
and that: noise, fewer bits, ranks without end, and what is left of stretched coordinates. An
attacker who wants no more than a near base adds one large number to every element. It is part of
the base, so nothing else changes, but float32 then rounds every element by the same known step,
which can be as large as the residual; the updates stand above it as far as they do.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
from jaxtyping import Float

from jdetune.defend.common import white_edge
from jdetune.defend.coordinates import Change, moved

#: The step's rms over that of the residual, so that both together stay within what is known.
MARGIN = 1.5
#: Float32 counts in whole numbers from 2^23 to 2^24, and this reaches from the middle to the ends.
_MIDDLE, _REACH = 1.5 * 2.0**23, 2.0**22 - 2


@dataclasses.dataclass(frozen=True)
class Coarse:
    """A stack whose every element is rounded by the same step.

    Attributes:
      stack: [model, row, col] float32, whole numbers, for ``jdetune.recover``.
      step: what one stands for, in units of the weights.
      shift: what was taken from every model, [row, col].
    """

    stack: np.ndarray
    step: float
    shift: np.ndarray

    def base(self, found: Float[np.ndarray, "row col"]) -> Float[np.ndarray, "row col"]:
        """A base that was recovered from the stack, in units of the weights, float64."""
        return (found.astype(np.float64) - _MIDDLE) * self.step + self.shift


def coarse(stack: Float[np.ndarray, "model row col"], rms: float) -> Coarse:
    """Rounds every element by a step that covers residuals of a size.

    Args:
      stack: merged weights, best in float64.
      rms: of the residuals.

    Example:
      >>> from jdetune import synth
      >>> found = coarse(synth.family(3, 64, 48, 4).merged, rms=1e-5)
      >>> bool(np.all(np.spacing(found.stack) == 1))
      True
    """
    wide = stack.astype(np.float64)
    shift = np.mean(wide, axis=0)
    apart = wide - shift
    step = max(MARGIN * rms * np.sqrt(12), float(np.max(np.abs(apart))) / _REACH)
    return Coarse((apart / step + _MIDDLE).astype(np.float32), step, shift)


def residual_rms(stack: Float[np.ndarray, "model row col"]) -> float:
    """Size of what the models differ by beyond low rank, as white noise of every one of them.

    Measured by the median singular value of differences: up to half of the directions may be
    those of updates.

    Args:
      stack: merged weights.
    """
    wide, (row, col) = stack.astype(np.float64), stack.shape[1:]
    white = np.random.default_rng(0).standard_normal((row, col))
    usual = np.median(np.linalg.svd(white, compute_uv=False))
    apart = (np.linalg.svd(d, compute_uv=False) for d in np.diff(wide, axis=0))
    return float(max(np.median(values) for values in apart) / usual / np.sqrt(2))


def rounding_rms(
    released: Mapping[str, np.ndarray], changes: Sequence[Change], names: Sequence[str]
) -> dict[str, float]:
    """Size of a release's rounding errors in other coordinates, by its most stretched direction.

    Args:
      released: weights as they were released; at least what the changes touch.
      changes: that were applied afterwards.
      names: matrices.

    Returns:
      Name to the rms of white noise with the same largest singular value.
    """
    rng, errors = np.random.default_rng(0), {}
    for name, tensor in released.items():
        _, exponent = np.frexp(tensor.astype(np.float64))
        steps = np.ldexp(float(ml_dtypes.finfo(tensor.dtype).eps), exponent - 1)
        errors[name] = rng.uniform(-0.5, 0.5, tensor.shape) * steps
    errors = moved(errors, changes)
    return {n: float(np.linalg.norm(errors[n], 2) / white_edge(errors[n].shape)) for n in names}
