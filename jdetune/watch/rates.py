"""False positives: the bound that exchangeability gives, measured rates, and their intervals."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jdetune.watch.directions import Directions
from jdetune.watch.monitor import MARGIN, Extremes, Monitor, flag, new_monitor, observe

#: Share of the calibration that ranges are from when false positives are measured on the rest.
FIT_SHARE = 0.9
_LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Rate:
    """A measured share with its interval.

    Attributes:
      hits: of those that count.
      trials: all.
      low: lower end of the 95% Clopper-Pearson interval.
      high: upper end.

    Example:
      >>> str(measured(0, 299))
      '0.00% (0 of 299; 95%: 0.00% to 1.23%)'
    """

    hits: int
    trials: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """The share; NaN of nothing."""
        return self.hits / self.trials if self.trials else math.nan

    def __str__(self) -> str:
        """In words."""
        interval = f"95%: {self.low:.2%} to {self.high:.2%}"
        return f"{self.share:.2%} ({self.hits} of {self.trials}; {interval})"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A monitor and what is known of its false positives.

    Attributes:
      monitor: its ranges are from all inputs.
      held_out: flagged share of the last tenth, by ranges from the rest.
      online: flagged share of all, each tested before it was added; early ones are flagged often.
      bound: at most this share of further such inputs is flagged: see `bound`.
    """

    monitor: Monitor
    held_out: Rate
    online: Rate
    bound: float


def measured(hits: int, trials: int, level: float = _LEVEL) -> Rate:
    """A share with its Clopper-Pearson interval.

    Args:
      hits: of those that count.
      trials: all.
      level: of the two-sided interval.
    """
    low, high = clopper_pearson(hits, trials, level)
    return Rate(hits, trials, low, high)


def clopper_pearson(hits: int, trials: int, level: float = _LEVEL) -> tuple[float, float]:
    """The exact interval of a binomial share.

    Args:
      hits: successes.
      trials: of so many; 0 gives (0, 1).
      level: coverage at least.

    Example:
      >>> [round(end, 4) for end in clopper_pearson(3, 100)]
      [0.0062, 0.0852]
    """
    if not 0 <= hits <= trials or not 0 < level < 1:
        raise ValueError(f"0 <= hits <= trials and 0 < level < 1; got {hits}, {trials}, {level}")
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else _solve(lambda p: 1 - _at_most(hits - 1, trials, p) - tail)
    high = 1.0 if hits == trials else _solve(lambda p: tail - _at_most(hits, trials, p))
    return low, high


def _at_most(hits: int, trials: int, p: float) -> float:
    """P(X <= hits) of a binomial."""
    k = np.arange(hits + 1)
    choose = np.cumsum(np.log(np.maximum(trials - k + 1, 1)) - np.log(np.maximum(k, 1)))
    choose -= math.log(trials + 1)
    with np.errstate(divide="ignore"):
        logs = choose + k * math.log(p) + (trials - k) * math.log1p(-p)
    return float(np.exp(logs).sum())


def _solve(rising) -> float:
    """Zero of a rising function in (0, 1)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


def bound(monitor: Monitor) -> float:
    """The paper's 2 t / n: at most this share of exchangeable inputs leaves a range of n samples.

    The sum over roles, with t directions and n the role's samples. With k samples trimmed at each
    end every end can be left k + 1 times as often. It says something of new inputs only if they
    are drawn as the calibration was.

    Args:
      monitor: calibrated.

    Returns:
      The bound, 1 at most.
    """
    total = 0.0
    for samples, left_out in zip(
        np.asarray(monitor.samples), np.asarray(monitor.left_out), strict=True
    ):
        if samples:
            total += 2 * monitor.directions.count * (int(left_out) + 1) / int(samples)
    return min(total, 1.0)


def calibrate(
    directions: Directions, seen: Extremes, trim: float = 0.0, margin: float = MARGIN
) -> Calibration:
    """Ranges from the extremes of inputs, and false positives by the paper's 90/10 rule.

    Ranges from the first 90% of the inputs are tested on the last 10%; the monitor that is returned
    has its ranges from all.

    Args:
      directions: what to watch.
      seen: of inputs that are taken to be harmless, in random order.
      trim: share of samples that is left out at each end of every direction's range.
      margin: how far outside of the range a cosine must lie.

    Raises:
      ValueError: fewer than two inputs, or trim is not in [0, 0.5).
    """
    count = len(seen)
    if count < 2 or not 0 <= trim < 0.5:
        raise ValueError(f"two inputs or more and 0 <= trim < 0.5; got {count} and {trim}")
    cut = min(max(int(FIT_SHARE * count), 1), count - 1)
    first = fit(directions, seen[:cut], trim, margin)
    held_out = np.asarray(flag(first, seen[cut:]))
    online, _ = observe(new_monitor(directions, margin), seen)
    monitor = fit(directions, seen, trim, margin)
    monitor = dataclasses.replace(monitor, tested=online.tested, alarms=online.alarms)
    return Calibration(
        monitor,
        measured(int(held_out.sum()), len(held_out)),
        measured(int(online.alarms), int(online.tested)),
        bound(monitor),
    )


def fit(
    directions: Directions, seen: Extremes, trim: float = 0.0, margin: float = MARGIN
) -> Monitor:
    """Ranges from extremes at once, trimmed if asked for.

    Args:
      directions: what to watch.
      seen: of the inputs.
      trim: share of samples that is left out at each end.
      margin: how far outside of the range a cosine must lie.
    """
    samples = np.sum(np.any(np.asarray(seen.high) >= np.asarray(seen.low), axis=(2, 3)), axis=0)
    left_out = jnp.asarray(np.floor(trim * samples + 1e-9), jnp.int32)
    low, high = _ordered(seen, left_out)
    return dataclasses.replace(
        new_monitor(directions, margin),
        low=low,
        high=high,
        samples=jnp.asarray(samples, jnp.int32),
        left_out=left_out,
    )


@jax.jit
def _ordered(seen: Extremes, left_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Order statistics of both ends; samples without the role sort to the far end."""
    place = jnp.broadcast_to(left_out[None, :, None, None], (1, *seen.low.shape[1:]))
    low = jnp.take_along_axis(jnp.sort(seen.low, axis=0), place, axis=0)[0]
    high = -jnp.take_along_axis(jnp.sort(-seen.high, axis=0), place, axis=0)[0]
    return low, high
