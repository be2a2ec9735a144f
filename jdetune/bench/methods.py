"""Solvers and baselines of the benchmark: from merged models to an estimate of the base."""

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jdetune import linalg
from jdetune.metrics import exact_fraction, log_mse
from jdetune.recovery import recover
from jdetune.solvers import spectral
from jdetune.solvers.intersection import SubspaceIntersection
from jdetune.solvers.spectral import SpectralDeTuning
from jdetune.status import Status

#: Method to what tables call it. The paper's solver is told the rank, ours is not.
TITLES = {
    "lora-ft": "LoRA FT",
    "mean-lora": "Mean LoRA",
    "paper": "Spectral DeTuning (float64 core space)",
    "paper-full": "Spectral DeTuning (float32, as published)",
    "jdetune": "jdetune",
}
DEFAULT = ("lora-ft", "mean-lora", "paper", "jdetune")


@dataclasses.dataclass(frozen=True)
class Task:
    """One estimate that is asked for.

    Attributes:
      base: the truth, as stored.
      merged: the models, as stored.
      rank: the largest of the updates' ranks; only the paper's solver looks at it.
      steps: of the paper's solver.
      seed: of its sketches.
    """

    base: Float[np.ndarray, "row col"]
    merged: Float[np.ndarray, "model row col"]
    rank: int
    steps: int
    seed: int


def run(method: str, task: Task) -> dict[str, Any]:
    """Runs a method and scores it; what goes wrong is a status with its reason.

    Returns:
      ``status``, ``reason``, ``seconds``, ``w_error`` (of the base rounded to the models' dtype),
      ``w_error_wide`` (before that rounding) and ``exact_fraction``, each None where there is no
      base, the method's own figures, and ``base`` itself where there is one.
    """
    clock = time.perf_counter()
    found: dict[str, Any]
    try:
        found = _METHODS[method](task)
    except (ValueError, RuntimeError, MemoryError) as error:
        said = " ".join(str(error).split())[:300]
        found = {"status": "FAILED", "reason": f"{type(error).__name__}: {said}"}
    seconds = found.pop("seconds", time.perf_counter() - clock)
    nothing = dict.fromkeys(("w_error", "w_error_wide", "exact_fraction"))
    scores = found.pop("scores", nothing)
    return {"status": "OK", "reason": None, "seconds": seconds} | scores | found


def _scores(task: Task, base: np.ndarray, wide: np.ndarray | None) -> dict[str, Any]:
    """The base as stored, W-errors before and after rounding, and the share of exact elements."""
    stored = base.astype(task.base.dtype)
    return {
        "base": stored,
        "w_error": _finite(log_mse(stored, task.base)),
        "w_error_wide": None if wide is None else _finite(log_mse(wide, task.base)),
        "exact_fraction": exact_fraction(stored, task.base),
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _lora_ft(task: Task) -> dict[str, Any]:
    """Single models taken for the base: the mean of their W-errors; the base is the first's."""
    clock = time.perf_counter()
    errors = [log_mse(model, task.base) for model in task.merged]
    exact = [exact_fraction(model, task.base) for model in task.merged]
    error = float(np.mean(errors))
    return {
        "seconds": time.perf_counter() - clock,
        "scores": {
            "base": task.merged[0],
            "w_error": _finite(error),
            "w_error_wide": _finite(error),
            "exact_fraction": float(np.mean(exact)),
        },
    }


def _mean_lora(task: Task) -> dict[str, Any]:
    """The mean of the models."""
    clock = time.perf_counter()
    mean = np.asarray(np.mean(task.merged, axis=0, dtype=np.float64))
    return {"seconds": time.perf_counter() - clock, "scores": _scores(task, mean, mean)}


@functools.partial(jax.jit, static_argnames=("solver",))
def _iterate(stack: jax.Array, solver: SpectralDeTuning) -> dict[str, jax.Array]:
    found = spectral.solve(stack, solver)
    return {"base": found.base, "loss": found.loss, "ranks": found.rank_history}


def trace(task: Task, solver: SpectralDeTuning) -> dict[str, np.ndarray]:
    """Base before rounding, losses and ranks of every step, of the paper's solver."""
    with linalg.scope(solver.dtype):
        found = _iterate(jnp.asarray(task.merged)[None], solver)
        return {name: np.asarray(value)[0] for name, value in found.items()}


def _paper(task: Task, space: Literal["core", "full"]) -> dict[str, Any]:
    """The paper's solver with the rank given; core space is its iteration without rounding."""
    every = 10 if space == "core" else 1
    solver = SpectralDeTuning(task.rank, task.steps, space=space, seed=task.seed, exact_every=every)
    clock = time.perf_counter()
    found = trace(task, solver)
    seconds = time.perf_counter() - clock
    return {
        "seconds": seconds,
        "scores": _scores(task, found["base"], found["base"]),
        "loss": _finite(float(found["loss"][-1])),
        "rank_given": task.rank,
    }


def _jdetune(task: Task) -> dict[str, Any]:
    """The library as it is called without any setting: no rank given, no steps."""
    clock = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = recover(task.merged, SubspaceIntersection(), drop_duplicates=False)
    seconds = time.perf_counter() - clock
    status = Status(int(found.status))
    result: dict[str, Any] = {"status": status.name, "seconds": seconds}
    if status is not Status.OK:
        result["reason"] = status.message
    if status.has_base:
        result |= {
            "scores": _scores(task, np.asarray(found.base), _before_rounding(task, found)),
            "predicted_error": _finite(float(found.predicted_error)),
            "exact_fraction_est": _finite(float(found.exact_fraction)),
            "amplification": _finite(float(found.amplification)),
        }
    return result | {"ranks": np.asarray(found.ranks).tolist()}


def _before_rounding(task: Task, found: Any) -> np.ndarray:
    """The mean of the models less their updates, in float64: the base before any grid."""
    total = np.zeros(task.base.shape)
    left, right = np.asarray(found.adapters.left), np.asarray(found.adapters.right)
    for model, b, a in zip(task.merged, left, right, strict=True):
        total += model.astype(np.float64) - np.matmul(b, a, dtype=np.float64)
    return total / len(task.merged)


_METHODS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "lora-ft": _lora_ft,
    "mean-lora": _mean_lora,
    "paper": lambda task: _paper(task, "core"),
    "paper-full": lambda task: _paper(task, "full"),
    "jdetune": _jdetune,
}
