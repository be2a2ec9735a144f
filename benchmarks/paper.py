"""The paper's solver in PyTorch: the baseline of the benchmarks, written from the paper.

Spectral DeTuning (arXiv 2402.10208), Algorithm 2: rank-r parts of the differences to the base by
``torch.svd_lowrank``, the base as the mean of what is left, the rank increased on plateaus.
"""

import dataclasses
import statistics
import time

import numpy as np
import torch

PATIENCE = 15


def paper_step(merged: torch.Tensor, base: torch.Tensor, rank: int) -> tuple[torch.Tensor, float]:
    """One M-step and W-step; the new base and the loss."""
    updates = []
    for model in merged:
        u, s, v = torch.svd_lowrank(model - base, q=rank)
        updates.append((u * s) @ v.T)
    low = torch.stack(updates)
    base = (merged - low).mean(0)
    return base, torch.mean((merged - base - low) ** 2).item()


def paper_in_torch(
    stack: np.ndarray, rank: int, steps: int, device: str = "cpu", seed: int = 0
) -> np.ndarray:
    """The whole algorithm in float32, as its authors run it.

    Args:
      stack: [model, row, col].
      rank: the true rank, which it has to be told.
      steps: iterations.
      device: of PyTorch.
      seed: of the sketches.

    Returns:
      The base.
    """
    torch.manual_seed(seed)
    merged = torch.from_numpy(stack).to(device)
    base = merged.mean(0)
    current, best, bad = 1, float("inf"), 0
    for step in range(1, steps + 1):
        base, loss = paper_step(merged, base, current)
        if step >= steps / 2:
            current = rank
        elif loss < best:
            best, bad = loss, 0
        else:
            bad += 1
            if bad > PATIENCE:
                current, bad = min(2 * current, rank), 0
    return base.cpu().numpy()


@dataclasses.dataclass(frozen=True)
class Extrapolated:
    """Time of the whole algorithm, from a few steps at the first and at the last rank.

    Attributes:
      seconds: the least that the schedule allows: half of the steps at rank 1, half at the last.
      first: seconds of a step at rank 1.
      last: seconds of a step at the last rank.
    """

    seconds: float
    first: float
    last: float


def extrapolate(first: float, last: float, steps: int) -> Extrapolated:
    """The shortest run: the rank stays 1 until the schedule forces it at half of the steps.

    Example:
      >>> extrapolate(1.0, 3.0, 10).seconds
      20.0
    """
    forced = steps - steps // 2
    return Extrapolated((steps - forced) * first + forced * last, first, last)


def measure_steps(
    stack: np.ndarray, rank: int, steps: int, device: str = "cpu", repeats: int = 2
) -> Extrapolated:
    """Times a few steps and extrapolates to all; favours the baseline."""
    merged = torch.from_numpy(stack).to(device)
    base = merged.mean(0)
    seconds = []
    for each in (1, rank):
        paper_step(merged, base, each)
        runs = []
        for _ in range(repeats):
            clock = time.perf_counter()
            paper_step(merged, base, each)
            runs.append(time.perf_counter() - clock)
        seconds.append(statistics.median(runs))
    return extrapolate(seconds[0], seconds[1], steps)
