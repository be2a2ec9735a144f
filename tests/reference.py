"""Float64 NumPy oracle of the subspace intersection: dense SVDs, all pairs, no sketch."""

from itertools import combinations
from typing import Any

import ml_dtypes
import numpy as np


def spacing(weights: np.ndarray) -> np.ndarray:
    """Unit in the last place as NumPy and ml_dtypes know it, float64."""
    return np.abs(np.spacing(np.abs(weights))).astype(np.float64)


def sigma(weights: np.ndarray) -> float:
    """Root mean square rounding error."""
    return float(np.sqrt(np.mean(spacing(weights) ** 2) / 12))


def log_mse(estimate: Any, truth: Any) -> float:
    error = np.asarray(estimate).astype(np.float64) - np.asarray(truth).astype(np.float64)
    return float(max(np.log10(max(np.mean(error**2), 1e-40)), -40.0))


def bits_equal(a: Any, b: Any) -> float:
    """Share of elements that are the same, bit for bit."""
    kind = {2: np.uint16, 4: np.uint32}[a.dtype.itemsize]
    return float(np.mean(a.view(kind) == b.view(kind)))


def to_dtype(weights: np.ndarray, name: str) -> np.ndarray:
    kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    return weights.astype(kinds[name])


def _leading(stacked: np.ndarray, rank: int) -> np.ndarray:
    return np.linalg.svd(stacked, full_matrices=False)[0][:, :rank]


def intersection(merged: np.ndarray) -> tuple[np.ndarray, list[int], list[np.ndarray]]:
    """Base (float64), ranks and updates, each step by the textbook."""
    n = len(merged)
    w = merged.astype(np.float64)
    ulp2 = (spacing(merged) ** 2).mean(axis=0)
    row = np.sqrt(ulp2.mean(axis=1) / ulp2.mean())[:, None]
    col = np.sqrt(ulp2.mean(axis=0) / ulp2.mean())[None]
    svd = {}
    for i, j in combinations(range(n), 2):
        u, s, vt = np.linalg.svd((w[i] - w[j]) / row / col)
        var = (spacing(merged[i]) ** 2 + spacing(merged[j]) ** 2) / 12 / row**2 / col**2
        edge = 1.1 * (np.sqrt(var.sum(1).max()) + np.sqrt(var.sum(0).max()))
        r = int(np.sum(s > edge))
        svd[i, j] = svd[j, i] = (r, u[:, :r], vt[:r].T)
    ranks = []
    for i in range(n):
        j, k = [m for m in range(n) if m != i][:2]
        ranks.append((svd[i, j][0] + svd[i, k][0] - svd[j, k][0]) // 2)
    others = [[j for j in range(n) if j != i] for i in range(n)]
    u = [_leading(np.hstack([svd[i, j][1] for j in others[i]]), ranks[i]) for i in range(n)]
    v = [_leading(np.hstack([svd[i, j][2] for j in others[i]]), ranks[i]) for i in range(n)]
    cores: list[list[np.ndarray]] = [[] for _ in range(n)]
    for i, j in combinations(range(n), 2):
        both = np.linalg.pinv(np.hstack([u[i], u[j]])) @ ((w[i] - w[j]) / row / col)
        both = both @ np.linalg.pinv(np.hstack([v[i], v[j]])).T
        cores[i].append(both[: ranks[i], : ranks[i]])
        cores[j].append(-both[ranks[i] :, ranks[i] :])
    updates = [row * col * (u[i] @ np.mean(cores[i], axis=0) @ v[i].T) for i in range(n)]
    return np.mean([w[i] - updates[i] for i in range(n)], axis=0), ranks, updates
