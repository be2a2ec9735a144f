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
    row, col = first.shape
    down, across = (_signs(side) for side in (row, col))
    short = min(FOLDED, row)
    tall = np.zeros((short, col), np.float32)
    for start in range(0, row, short):
        block = slice(start, start + short)
        part = np.asarray(first[block], np.float32) - np.asarray(second[block], np.float32)
        tall[: len(part)] += part * down[block, None]
    narrow = min(FOLDED, col)
    small = np.zeros((short, narrow), np.float64)
    for start in range(0, col, narrow):
        block = slice(start, start + narrow)
        small[:, : len(across[block])] += tall[:, block] * across[block]
    values = np.linalg.eigvalsh(np.matmul(small, small.T))[::-1]
    gaps = values[:-1] / np.maximum(values[1:], 1e-14 * values[0] + 1e-60)
    return int(np.argmax(gaps)) + 1 if len(gaps) else 0


def _signs(count: int) -> np.ndarray:
    return 1 - 2 * np.random.default_rng(0).integers(0, 2, count).astype(np.float32)
