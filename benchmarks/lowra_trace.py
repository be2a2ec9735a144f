"""The paper's algorithm step by step, in PyTorch: scheduler, loss against W-error, equivalence."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.paper import PATIENCE, paper_in_torch, paper_step
from jdetune import core, linalg
from jdetune.metrics import LOG_MSE_FLOOR, log_mse
from jdetune.solvers import spectral
from jdetune.solvers.spectral import SpectralDeTuning, gaussian_draw

#: A layer is near its end from this many decades above its last W-error.
NEAR = 0.1


@dataclasses.dataclass(frozen=True)
class Trace:
    """One run of the paper's algorithm, in float32 on whole matrices as published.

    Attributes:
      losses: of every step.
      errors: W-error after every step.
      ranks: of every step.
      seconds: of the whole run, W-errors included.
    """

    losses: tuple[float, ...]
    errors: tuple[float, ...]
    ranks: tuple[int, ...]
    seconds: float


def paper_trace(
    merged: np.ndarray,
    truth: np.ndarray,
    rank: int,
    steps: int,
    scheduled: bool = True,
    seed: int = 0,
) -> Trace:
    """Losses and W-errors of every step.

    Args:
      merged: [model, row, col], float32.
      truth: the base.
      rank: the true rank.
      steps: iterations.
      scheduled: with the rank scheduler; without, every step has the true rank.
      seed: of the sketches.
    """
    torch.manual_seed(seed)
    clock = time.perf_counter()
    models, true = torch.from_numpy(merged), torch.from_numpy(truth).double()
    base = models.mean(0)
    current, best, bad = (1 if scheduled else rank), float("inf"), 0
    losses, errors, ranks = [], [], []
    for step in range(1, steps + 1):
        ranks.append(current)
        base, loss = paper_step(models, base, current)
        mse = torch.mean((base.double() - true) ** 2).item()
        losses.append(loss)
        errors.append(max(float(np.log10(max(mse, 1e-300))), LOG_MSE_FLOOR))
        if not scheduled:
            continue
        if step >= steps / 2:
            current = rank
        elif loss < best:
            best, bad = loss, 0
        else:
            bad += 1
            if bad > PATIENCE:
                current, bad = min(2 * current, rank), 0
    return Trace(tuple(losses), tuple(errors), tuple(ranks), time.perf_counter() - clock)


def steps_to(errors: Sequence[float], target: float) -> int | None:
    """First step, counted from 1, whose W-error is at or below a target; None if none is.

    Example:
      >>> steps_to([-1.0, -5.0, -9.0], -5.0), steps_to([-1.0], -2.0)
      (2, None)
    """
    return next((step for step, error in enumerate(errors, 1) if error <= target), None)


def scheduler_effects(on: Sequence[Trace], off: Sequence[Trace]) -> dict[str, Any]:
    """The scheduler's three effects: speed, spread over layers, precision.

    Speed is the number of layers that are at their best W-error without the scheduler (within
    ``NEAR``) sooner with it. Layers without it that have got nowhere are reached at step one.
    """
    last_on = np.array([trace.errors[-1] for trace in on])
    last_off = np.array([trace.errors[-1] for trace in off])
    targets = [max(a, b) + NEAR for a, b in zip(last_on, last_off, strict=True)]
    common = float(np.median(last_off))
    reach_on = [steps_to(trace.errors, common) for trace in on]
    reach_off = [steps_to(trace.errors, common) for trace in off]
    sooner = [
        (steps_to(a.errors, t) or len(a.errors) + 1) <= (steps_to(b.errors, t) or len(b.errors) + 1)
        for a, b, t in zip(on, off, targets, strict=True)
    ]
    return {
        "layers": len(on),
        "steps": len(on[0].errors),
        "mean_on": float(last_on.mean()),
        "mean_off": float(last_off.mean()),
        "std_on": float(last_on.std()),
        "std_off": float(last_off.std()),
        "common_target": common,
        "reached_on": sum(step is not None for step in reach_on),
        "reached_off": sum(step is not None for step in reach_off),
        "median_step_on": _median(reach_on, len(on[0].errors)),
        "median_step_off": _median(reach_off, len(off[0].errors)),
        "sooner": sum(sooner),
        "precision": bool(last_on.mean() < last_off.mean()),
        "spread": bool(last_on.std() < last_off.std()),
        "speed": bool(
            _median(reach_on, len(on[0].errors)) < _median(reach_off, len(off[0].errors))
        ),
    }


def _median(steps: Sequence[int | None], never: int) -> float:
    """Median over layers; one that is never reached counts as a step more than there are."""
    return float(np.median([never + 1 if step is None else step for step in steps]))


def correlation(traces: Sequence[Trace]) -> dict[str, float | None]:
    """Pearson correlation of log10 loss and W-error over the steps of the paper's algorithm.

    ``curve`` is of their means over layers, as the W-error is defined (Eq. 8); ``pooled`` takes
    every step of every layer for a point, where each layer has its own floor of either.
    """
    pairs = [(np.log10(np.maximum(t.losses, 1e-40)), np.array(t.errors)) for t in traces]
    single = [float(np.corrcoef(x, y)[0, 1]) for x, y in pairs]
    x, y = np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])
    ends = [(p[0][-1], p[1][-1]) for p in pairs]
    means = [np.mean([pair[side] for pair in pairs], axis=0) for side in (0, 1)]
    return {
        "curve": float(np.corrcoef(*means)[0, 1]),
        "pooled": float(np.corrcoef(x, y)[0, 1]),
        "least_layer": min(single),
        "median_layer": float(np.median(single)),
        "last_steps": float(np.corrcoef(np.array(ends).T)[0, 1]) if len(ends) > 2 else None,
        "points": len(x),
    }


def equivalence(merged: np.ndarray, truth: np.ndarray, rank: int, steps: int) -> dict[str, Any]:
    """Core space against full space on one layer, and both against the algorithm in PyTorch.

    The same sketches go into both spaces, so the iterates are the same but for rounding: in float64
    everything agrees; float32, which the paper uses, is left by rounding only.
    """
    n_models, row, col = merged.shape
    draw = gaussian_draw(0, min(row, col), rank)
    rows = []
    runs = {}
    plain = SpectralDeTuning(rank, steps, space="full", precision="float64", exact_every=1)
    for name, solver in {
        "full space, float64": plain,
        "full space, float32 (as published)": dataclasses.replace(plain, precision="float32"),
        "core space, float64": dataclasses.replace(plain, space="core"),
        "core space, float64, warm steps (the baseline here)": dataclasses.replace(
            plain, space="core", exact_every=10
        ),
    }.items():

        def solve(stack, solver=solver):
            found = spectral.solve(stack, solver, draw)
            return found.base, found.loss, found.rank_history

        with linalg.scope(solver.dtype):
            base, loss, ranks = (np.asarray(v)[0] for v in jax.jit(solve)(merged[None]))
        runs[name] = (base, loss, ranks)
        rows.append({"run": name, "w_error": log_mse(base, truth), "loss": float(loss[-1])})
    clock = time.perf_counter()
    theirs = paper_in_torch(merged, rank, steps)
    rows.append(
        {
            "run": "PyTorch, float32, its own sketches",
            "w_error": log_mse(theirs, truth),
            "loss": None,
            "seconds": time.perf_counter() - clock,
        }
    )
    full, same = runs["full space, float64"], runs["core space, float64"]
    size = float(np.sqrt(np.mean(np.square(full[0] - merged.mean(0, dtype=np.float64)))))
    return {
        "shape": [n_models, row, col],
        "rank": rank,
        "steps": steps,
        "core_width": list(core.core_widths(n_models, rank, row, col)),
        "runs": rows,
        "base_difference": float(np.sqrt(np.mean(np.square(full[0] - same[0])))) / size,
        "loss_difference": float(np.max(np.abs(np.log10(full[1]) - np.log10(same[1])))),
        "same_ranks": bool(np.array_equal(full[2], same[2])),
    }
