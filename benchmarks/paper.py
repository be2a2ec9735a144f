"""The paper's solver in PyTorch: the baseline of the benchmarks, written from the paper.

Spectral DeTuning (arXiv 2402.10208), Algorithm 2: rank-r parts of the differences to the base by
``torch.svd_lowrank``, the base as the mean of what is left, the rank doubled on plateaus and set to
the last one at half of the steps.

Where a run would take hours, its time is extrapolated from a few steps at every rank that the
schedule has. The rank of a step decides its time, and how soon the rank grows depends on the data;
the extrapolation takes the shortest route that the schedule allows, which favours the baseline: the
first rank until the last one is forced.
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
    """Time of the whole algorithm, from a few steps at every rank of its schedule.

    Attributes:
      seconds: the least that the schedule allows.
      step_seconds: of one step, by rank.
    """

    seconds: float
    step_seconds: dict[int, float]


def ranks_of_schedule(rank: int) -> list[int]:
    """Every rank that the schedule has on its way.

    Example:
      >>> ranks_of_schedule(12)
      [1, 2, 4, 8, 12]
    """
    ranks = [1]
    while ranks[-1] < rank:
        ranks.append(min(2 * ranks[-1], rank))
    return ranks


def extrapolate(step_seconds: dict[int, float], steps: int) -> Extrapolated:
    """The shortest run: the cheapest rank until the schedule forces the last, at half of the steps.

    Example:
      >>> extrapolate({1: 1.0, 2: 2.0, 3: 3.0}, 7).seconds
      13.0
    """
    forced = steps // 2
    last = step_seconds[max(step_seconds)]
    seconds = (steps - forced) * min(step_seconds.values()) + forced * last
    return Extrapolated(seconds, step_seconds)


def measure_steps(
    stack: np.ndarray | torch.Tensor, rank: int, steps: int, device: str = "cpu", repeats: int = 3
) -> Extrapolated:
    """Times a few steps at every rank and extrapolates to all."""
    merged = (torch.from_numpy(stack) if isinstance(stack, np.ndarray) else stack).to(device)
    base = merged.mean(0)
    seconds = {each: _step_seconds(merged, base, each, repeats) for each in ranks_of_schedule(rank)}
    return extrapolate(seconds, steps)


def faster_threads(stack: np.ndarray, rank: int, threads: int) -> int:
    """One thread or all: whichever a step at the last rank is done sooner with.

    PyTorch's threads wait for each other in small products, and longer where other programs run.
    """
    if threads == 1:
        return 1
    merged = torch.from_numpy(stack)
    base, before, seconds = merged.mean(0), torch.get_num_threads(), {}
    for count in (1, threads):
        torch.set_num_threads(count)
        seconds[count] = _step_seconds(merged, base, rank, 3)
    torch.set_num_threads(before)
    return min(seconds, key=lambda count: seconds[count])


def _step_seconds(merged: torch.Tensor, base: torch.Tensor, rank: int, repeats: int) -> float:
    """Median time of a step; the loss is read, so a GPU has finished. The first does not count."""
    runs = []
    for _ in range(repeats + 1):
        clock = time.perf_counter()
        paper_step(merged, base, rank)
        runs.append(time.perf_counter() - clock)
    return statistics.median(runs[1:])
