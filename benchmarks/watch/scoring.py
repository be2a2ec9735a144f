"""What the experiments measure: flagged shares of several monitors on the same activations."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdetune import watch
from jdetune.models import Llama, Params, run
from jdetune.watch.monitor import MARGIN, Extremes, extremes
from jdetune.watch.recording import in_batches, joined

#: Sequences in a batch.
ROWS = 500
#: False positives that the second margin aims at.
WANTED_FPR = 0.01
#: Sequences that means, covariances and principal components are from.
FITTED = 2000
_KINDS = ("residual", "attention", "mlp")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Sequences of one length.

    Attributes:
      ids: [sample, token].
      answer: [token], which of the tokens are generated.
    """

    ids: np.ndarray
    answer: np.ndarray

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.ids)


def prompts(ids: np.ndarray) -> Inputs:
    """Sequences without generated tokens."""
    return Inputs(ids, np.zeros(ids.shape[1], bool))


@partial(jax.jit, static_argnums=0)
def _taps(module: Llama, params: Params, ids: Any) -> dict[str, jax.Array]:
    return run(module, params, ids, taps=_KINDS).taps


def _at(taps: Mapping[str, jax.Array], places: Sequence[tuple[str, int]]) -> jax.Array:
    return jnp.stack([taps[kind][number] for kind, number in places], axis=2)


@partial(jax.jit, static_argnums=0)
def _look(
    module: Llama,
    params: Params,
    monitors: dict[str, watch.Directions],
    gauss: watch.Mahalanobis,
    places: watch.Directions,
    ids: Any,
    answer: Any,
) -> tuple[dict[str, Extremes], jax.Array]:
    """Extremes of every set of directions, and Mahalanobis distances, from one forward pass."""
    taps = run(module, params, ids, taps=_KINDS).taps
    valid = jnp.ones(ids.shape, bool)
    found = {
        name: extremes(one, _at(taps, one.places), valid, answer) for name, one in monitors.items()
    }
    return found, watch.distances(gauss, _at(taps, places.places), valid)


@dataclasses.dataclass(frozen=True)
class Looked:
    """What was seen of several sets of inputs.

    Attributes:
      directions: of each method.
      seen: set, then method, to extremes.
      distances: set to Mahalanobis distance [sample, place].
    """

    directions: dict[str, watch.Directions]
    seen: dict[str, dict[str, Extremes]]
    distances: dict[str, np.ndarray]

    def monitor(self, method: str, slots: int | None = None) -> watch.Monitor:
        """Calibrated on "calibration", without a margin of its own."""
        seen = self.extremes("calibration", method, slots)
        return watch.fit(limited(self.directions[method], slots), seen)

    def extremes(self, of: str, method: str, slots: int | None = None) -> Extremes:
        """Those of the first directions of each matrix only, if asked for."""
        seen, there = self.seen[of][method], limited(self.directions[method], slots).valid
        there = np.asarray(there)
        return Extremes(np.where(there, seen.low, np.inf), np.where(there, seen.high, -np.inf))

    def scores(
        self, method: str, slots: int | None = None, roles: slice = slice(None)
    ) -> dict[str, np.ndarray]:
        """Set to how far each input lies outside of the calibrated ranges, in some roles."""
        if method == "Mahalanobis":
            top = self.distances["calibration"].max(axis=0)
            return {n: (d / top - 1).max(axis=1) for n, d in self.distances.items()}
        monitor = self.monitor(method, slots)
        return {
            of: np.asarray(watch.excess(monitor, self.extremes(of, method, slots)))[:, roles].max(
                axis=(1, 2, 3)
            )
            for of in self.seen
        }


def limited(directions: watch.Directions, slots: int | None) -> watch.Directions:
    """The first directions of each matrix."""
    if slots is None:
        return directions
    kept = np.array([rank < slots for _, rank in directions.slots])
    return dataclasses.replace(directions, values=jnp.where(kept, directions.values, 0))


def look(
    module: Llama, params: Params, monitors: Mapping[str, watch.Directions],
    sets: Mapping[str, Inputs], seed: int = 0,
) -> Looked:  # fmt: skip
    """Looks at all inputs once; baselines that need no weights are added.

    Args:
      module: the decoder.
      params: merged weights.
      monitors: method to directions; "update" says how many random ones and components there are.
      sets: name to inputs; "calibration" among them.
      seed: of the random directions.
    """
    like = monitors["update"]
    ids = sets["calibration"].ids[:FITTED]
    acts = jnp.concatenate(
        list(in_batches(lambda x: _at(_taps(module, params, x), like.places), [ids], ROWS))
    )
    valid = jnp.ones(acts.shape[:2], bool)
    methods = dict(monitors) | {
        "random": watch.random_directions(jax.random.key(seed), like),
        "PCA, first": watch.pca_directions(acts, valid, like),
        "PCA, last": watch.pca_directions(acts, valid, like, last=True),
    }
    gauss = watch.fit_mahalanobis(acts, valid)
    seen: dict[str, dict[str, Extremes]] = {}
    distances = {}
    for name, inputs in sets.items():
        answer = np.broadcast_to(inputs.answer, (ROWS, inputs.ids.shape[1]))
        parts = list(
            in_batches(
                lambda x, a=answer: _look(module, params, methods, gauss, like, x, a),
                [inputs.ids],
                ROWS,
            )
        )
        whole = jax.tree.map(lambda *p: np.concatenate([np.asarray(q) for q in p]), *parts)
        seen[name], distances[name] = whole
    return Looked(methods, seen, distances)


def see(
    module: Llama, params: Params, directions: watch.Directions, sets: Mapping[str, Inputs]
) -> dict[str, np.ndarray]:
    """Scores of one set of directions alone: calibrated on "calibration", of all sets."""
    seen = {}
    for name, inputs in sets.items():
        valid = np.ones((ROWS, inputs.ids.shape[1]), bool)
        answer = np.broadcast_to(inputs.answer, valid.shape)

        def one(ids: np.ndarray, valid: Any = valid, answer: Any = answer) -> Extremes:
            return watch.model_extremes(module, params, directions, ids, valid, answer)

        seen[name] = joined(in_batches(one, [inputs.ids], ROWS))
    monitor = watch.fit(directions, seen["calibration"])
    return {n: np.asarray(watch.excess(monitor, s)).max(axis=(1, 2, 3)) for n, s in seen.items()}


def rates(found: Mapping[str, np.ndarray], margin: float = MARGIN) -> dict[str, Any]:
    """Flagged shares of every set at the paper's margin, and at one for 1% false positives.

    The second margin is set on "validation" and judged on "clean", which it has not seen.

    Args:
      found: set name to excess; has "validation" and "clean".
      margin: the paper's.
    """
    others = [k for k in found if k not in ("calibration", "validation", "clean")]
    tuned = float(np.quantile(found["validation"], 1 - WANTED_FPR, method="higher"))
    result: dict[str, Any] = {}
    for name, edge in (("paper", margin), ("tuned", tuned)):
        flagged = {key: share(found[key] > edge) for key in others}
        result[name] = {"margin": edge, "clean": share(found["clean"] > edge), **flagged}
    result["auroc"] = {key: watch.auroc(found[key], found["clean"]) for key in others}
    return result


def share(hits: np.ndarray) -> dict[str, Any]:
    """A share with its Clopper-Pearson interval."""
    rate = watch.measured(int(np.sum(hits)), len(hits))
    known = finite(rate.share)
    return {"share": known, "of": rate.trials, "low": rate.low, "high": rate.high}


def over(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean of several seeds with half its 95% t-interval, and the ends of the range."""
    from scipy import stats

    known = [float(v) for v in values if v is not None and math.isfinite(v)]
    if not known:
        return {"mean": None, "half": None, "n": 0}
    half = None
    if len(known) > 1:
        spread = float(np.std(known, ddof=1)) / math.sqrt(len(known))
        half = float(stats.t.ppf(0.975, len(known) - 1)) * spread
    ends = {"least": min(known), "most": max(known)}
    return {"mean": float(np.mean(known)), "half": half, **ends, "n": len(known)}


def gathered(rows: Sequence[Any], pick: Callable[[Any], float | None]) -> dict[str, Any]:
    """`over` of one figure of all rows."""
    return over([pick(row) for row in rows])


def percent(figure: Mapping[str, Any], digits: int = 1) -> str:
    """A mean of shares in words; of two, whose interval says nothing, both ends.

    Example:
      >>> percent(over([0.5, 0.6, 0.7])), percent(over([0.5, 0.7]))
      ('60.0 ± 24.8%', '60.0% (50.0, 70.0)')
    """
    if figure["mean"] is None:
        return "-"
    if figure["n"] == 2:
        ends = ", ".join(f"{100 * figure[end]:.{digits}f}" for end in ("least", "most"))
        return f"{100 * figure['mean']:.{digits}f}% ({ends})"
    half = "" if figure["half"] is None else f" ± {100 * figure['half']:.{digits}f}"
    return f"{100 * figure['mean']:.{digits}f}{half}%"


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
