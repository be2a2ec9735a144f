"""The paper's algorithm in float64 NumPy, one model at a time, with given sketches."""

from typing import NamedTuple

import numpy as np

from jdetune.rank_schedule import RankSchedule
from tests.test_rank_schedule import PlainSchedule


class Found(NamedTuple):
    base: np.ndarray
    updates: np.ndarray
    loss: np.ndarray
    ranks: np.ndarray


def truncated(matrix: np.ndarray, sketch: np.ndarray) -> np.ndarray:
    """Randomized SVD of the matrix or its transpose, whichever is taller."""
    if matrix.shape[0] < matrix.shape[1]:
        return truncated(matrix.T, sketch).T
    q = np.linalg.qr(matrix @ sketch)[0]
    for _ in range(2):
        q = np.linalg.qr(matrix.T @ q)[0]
        q = np.linalg.qr(matrix @ q)[0]
    u, s, vt = np.linalg.svd(q.T @ matrix, full_matrices=False)
    return (q @ u * s) @ vt


def spectral(
    merged: np.ndarray, schedule: RankSchedule, end_rank: int, omegas: np.ndarray
) -> Found:
    """Runs ``len(omegas)`` steps; ``omegas`` is [step, model, shorter side, end rank]."""
    merged = merged.astype(np.float64)
    plain = PlainSchedule(schedule, end_rank, len(omegas))
    base = merged.mean(axis=0)
    updates = np.zeros_like(merged)
    losses, ranks = [], []
    for sketches in omegas:
        ranks.append(plain.rank)
        updates = np.stack(
            [truncated(w - base, o[:, : plain.rank]) for w, o in zip(merged, sketches, strict=True)]
        )
        base = (merged - updates).mean(axis=0)
        losses.append(np.mean((merged - (base + updates)) ** 2))
        plain.advance(losses[-1])
    return Found(base, updates, np.array(losses), np.array(ranks))
