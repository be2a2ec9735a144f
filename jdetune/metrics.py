"""How near an estimate is to the truth: log MSE, exact elements, ulps, angles, activations.

Host code in float64 NumPy, for arrays of float32, float16 or bfloat16.
"""

import numpy as np
from jaxtyping import Float, Int

#: log10 MSE of an exact estimate, and the least that is ever reported.
LOG_MSE_FLOOR = -40.0
#: log10(1 - cosine) of equal vectors: float64 cannot tell a cosine above 1 - 1e-16 from 1.
LOG_COSINE_FLOOR = -16.0
#: Names of the bins of ``ulp_histogram``, and their upper ends.
ULP_BINS = {"0": 0, "1": 1, "2": 2, "3-4": 4, "5-8": 8}
#: Names of the bins of ``ulp_steps`` but the last, which holds what is not finite.
ULP_STEPS = ("<-2", "-2", "-1", "0", "1", "2", ">2")
_CHUNK = 1 << 20
_FAR = np.iinfo(np.int64).max


def log_mse(estimate: Float[np.ndarray, "*shape"], truth: Float[np.ndarray, "*shape"]) -> float:
    r"""log10 of the mean squared error, not below -40: the W-error of one layer.

    :math:`\max(\log_{10} \mathrm{mean}((\hat W - W)^2), -40)`

    Args:
      estimate: estimated weights.
      truth: true weights of that shape.

    Returns:
      log10 MSE; NaN where either holds NaN.

    Example:
      >>> log_mse(np.float32([1.0, 2.0]), np.float32([1.0, 2.0]))
      -40.0
      >>> round(log_mse(np.float32([1.1]), np.float32([1.0])), 3)
      -2.0
    """
    _check_shapes(estimate, truth)
    error = np.asarray(estimate, np.float64) - np.asarray(truth, np.float64)
    mse = float(np.mean(error * error)) if error.size else 0.0
    if np.isnan(mse):
        return float("nan")
    return max(float(np.log10(mse)), LOG_MSE_FLOOR) if mse > 0.0 else LOG_MSE_FLOOR


def exact_fraction(
    estimate: Float[np.ndarray, "*shape"], truth: Float[np.ndarray, "*shape"]
) -> float:
    """Share of elements that are equal bit for bit; 0.0 and -0.0 are not.

    Args:
      estimate: estimated weights.
      truth: true weights of that shape; another dtype counts as no element equal.

    Example:
      >>> exact_fraction(np.float32([0.0, 1.0]), np.float32([-0.0, 1.0]))
      0.5
    """
    _check_shapes(estimate, truth)
    if estimate.dtype != truth.dtype:
        return 0.0
    same = _bits(estimate) == _bits(truth)
    return float(np.mean(same)) if same.size else 1.0


def ulp_distance(
    estimate: Float[np.ndarray, "*shape"], truth: Float[np.ndarray, "*shape"]
) -> Int[np.ndarray, "*shape"]:
    """Number of steps on the dtype's grid between two arrays, element by element.

    Floats of one sign are ordered as their bits are; negative ones count down from zero, so steps
    across zero are counted too and 0.0 and -0.0 are no step apart. NaN is infinitely far.

    Args:
      estimate: estimated weights.
      truth: true weights of that shape and dtype.

    Example:
      >>> tiny = np.float32(1e-45)
      >>> ulp_distance(np.stack([tiny, np.float32(1)]), np.stack([-tiny, np.float32(1)])).tolist()
      [2, 0]
    """
    _check_shapes(estimate, truth)
    if estimate.dtype != truth.dtype:
        raise ValueError(f"dtypes differ: {estimate.dtype} and {truth.dtype}")
    distance = np.abs(_ordered(estimate) - _ordered(truth))
    bad = np.isnan(estimate) | np.isnan(truth)
    return np.where(bad, _FAR, distance)


def ulp_histogram(
    estimate: Float[np.ndarray, "*shape"], truth: Float[np.ndarray, "*shape"]
) -> dict[str, int]:
    """Counts of ulp distances 0, 1, 2, 3-4, 5-8 and >8.

    Example:
      >>> ulp_histogram(np.float16([1.0, 2.0]), np.float16([1.0, 2.002]))
      {'0': 1, '1': 1, '2': 0, '3-4': 0, '5-8': 0, '>8': 0}
    """
    distance = ulp_distance(estimate, truth)
    below = [int(np.sum(distance <= end)) for end in ULP_BINS.values()]
    counts = np.diff([0, *below, distance.size])
    return dict(zip([*ULP_BINS, ">8"], (int(count) for count in counts), strict=True))


def ulp_steps(estimate: np.ndarray, truth: np.ndarray) -> dict[str, int]:
    """Counts of signed ulp distances: -2 to 2, below, above, and of NaN or infinity in either.

    Args:
      estimate: weights of any shape.
      truth: weights of that shape and dtype.

    Example:
      >>> counts = ulp_steps(np.float16([1.0, 2.0, 9.0]), np.float16([1.0, 2.002, np.nan]))
      >>> {step: count for step, count in counts.items() if count}
      {'-1': 1, '0': 1, 'not finite': 1}
    """
    _check_shapes(estimate, truth)
    if estimate.dtype != truth.dtype:
        raise ValueError(f"dtypes differ: {estimate.dtype} and {truth.dtype}")
    first, second = np.ravel(estimate), np.ravel(truth)
    counts, bad = np.zeros(len(ULP_STEPS), np.int64), 0
    for start in range(0, first.size, _CHUNK):
        ours, theirs = first[start : start + _CHUNK], second[start : start + _CHUNK]
        finite = np.isfinite(ours) & np.isfinite(theirs)
        steps = np.clip(_ordered(ours[finite]) - _ordered(theirs[finite]), -3, 3)
        counts += np.bincount(steps + 3, minlength=len(ULP_STEPS))
        bad += int(np.sum(~finite))
    return {**dict(zip(ULP_STEPS, counts.tolist(), strict=True)), "not finite": bad}


def cosine(first: Float[np.ndarray, "*shape"], second: Float[np.ndarray, "*shape"]) -> float:
    """Cosine of the angle between two arrays taken as vectors; NaN if either is zero.

    Example:
      >>> cosine(np.float32([1.0, 0.0]), np.float32([1.0, 1.0]))  # doctest: +ELLIPSIS
      0.7071...
    """
    _check_shapes(first, second)
    a, b = np.asarray(first, np.float64).ravel(), np.asarray(second, np.float64).ravel()
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.sum(a * b) / scale) if scale > 0.0 else float("nan")


def log_cosine(
    first: Float[np.ndarray, "item width"], second: Float[np.ndarray, "item width"]
) -> float:
    r"""Mean over items of the log cosine distance, :math:`\log_{10}(1 - \cos)`, not below -16.

    Args:
      first: a vector for each item, such as the embedding of a text.
      second: those to compare with.

    Returns:
      The mean; 0 where all are orthogonal, NaN where a vector is zero or there is no item.

    Example:
      >>> log_cosine(np.float32([[3.0, 0.0]]), np.float32([[0.0, 2.0]]))
      0.0
    """
    _check_shapes(first, second)
    if not len(first):
        return float("nan")
    a, b = _unit(first), _unit(second)
    apart = 0.5 * np.sum(np.square(a - b), axis=-1)  # 1 - cosine, without cancellation
    return float(np.mean(np.log10(np.maximum(apart, 10.0**LOG_COSINE_FLOOR))))


def activation_distance(
    first: Float[np.ndarray, "item width"], second: Float[np.ndarray, "item width"]
) -> float:
    """Mean over items of the Euclidean distance between two models' final activations.

    Args:
      first: one model's activations for each input.
      second: the other's for the same inputs.

    Returns:
      The mean distance, NaN where there is no input.

    Example:
      >>> activation_distance(np.float32([[3.0, 0.0]]), np.float32([[0.0, 4.0]]))
      5.0
    """
    _check_shapes(first, second)
    if not len(first):
        return float("nan")
    apart = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return float(np.mean(np.sqrt(np.sum(apart * apart, axis=-1))))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length one; NaN for zero."""
    vectors = np.asarray(vectors, np.float64)
    length = np.sqrt(np.sum(vectors * vectors, axis=-1, keepdims=True))
    return vectors / np.where(length > 0.0, length, np.nan)


def _check_shapes(first: np.ndarray, second: np.ndarray) -> None:
    if first.shape != second.shape:
        raise ValueError(f"shapes differ: {first.shape} and {second.shape}")


def _bits(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    return array.view(f"i{array.dtype.itemsize}")


def _ordered(array: np.ndarray) -> np.ndarray:
    """Position of every element on its grid; neighbours differ by one, zero is 0."""
    bits = _bits(array).astype(np.int64).reshape(array.shape)
    magnitude = bits & ((1 << (8 * array.dtype.itemsize - 1)) - 1)
    return np.where(bits < 0, -magnitude, magnitude)
