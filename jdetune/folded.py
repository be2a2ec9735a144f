"""A first guess of a rank, on the host, from a matrix folded to a small one."""

import numpy as np

#: Side of the folded difference.
FOLDED = 256


def guess_pair_rank(first: np.ndarray, second: np.ndarray) -> int:
    """Rank of the difference of two models where its spectrum falls the most; 0 for a vector.

    Rows and columns are added up with random signs until ``FOLDED`` are left, so that the rank of
    a difference below that stays as it was. Only a guess: the solver measures the rank itself.

    Args:
      first: [row, col] of any floating dtype.
      second: the other model.

    Example:
      >>> import numpy as np
      >>> left, right = np.random.default_rng(0).standard_normal((2, 300, 6))
      >>> base = np.ones((300, 300))
      >>> guess_pair_rank(base + left @ right.T, base)
      6
    """
    difference = np.asarray(first, np.float32) - np.asarray(second, np.float32)
    small = _fold(_fold(difference).T).astype(np.float64)
    values = np.linalg.eigvalsh(small @ small.T)[::-1]
    gaps = values[:-1] / np.maximum(values[1:], 1e-14 * values[0] + 1e-60)
    return int(np.argmax(gaps)) + 1 if len(gaps) else 0


def _fold(matrix: np.ndarray) -> np.ndarray:
    """Rows added up with random signs until few are left: the rank stays, if it is below them."""
    count = len(matrix)
    short = min(FOLDED, count)
    signs = 1 - 2 * np.random.default_rng(0).integers(0, 2, (count, 1)).astype(np.float32)
    padded = np.pad(matrix * signs, ((0, -count % short), (0, 0)))
    return padded.reshape(-1, short, matrix.shape[1]).sum(axis=0)
