"""The attacks on a release, and how near they come to the true base."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import jdetune
from benchmarks.defend.cases import Case, Family, Release, Tensors, completed, stacks, truth
from jdetune import defend, explain, metrics, models
from jdetune.models.text import embed, load_codec, pad_batch

#: Texts whose embeddings are compared, and tokens of each at most.
TEXTS, TOKENS = 32, 64
#: Models whose embeddings are compared with those of their releases.
RELEASES = 2
#: Steps of the paper's solver; the number of its authors for this kind of model.
STEPS = 300
#: What a base of status OK may be worse than predicted, in decades, before it counts as wrong.
SURPRISE = 1.0


class Countered:
    """The first models of a release, and the attacker's own work on them."""

    def __init__(self, of: Family, release: Release, case: Case, count: int) -> None:
        """Brings each model into the first one's coordinates.

        Args:
          of: the family.
          release: what the attacker has.
          case: the defence that made it.
          count: models that are looked at.
        """
        self.of, self.case, self.released = of, case, release.models[:count]
        self.wanted = truth(of, release)
        self.models, self.across = self.released, "across" in case.counters
        changes = [()] * count
        touched = [
            place
            for place in defend.places(of.module)
            if any(axis.name in of.targets for axis in place.axes)
        ]
        if "align" in case.counters:
            aligned = defend.align(of.module, self.released, touched)
            self.models, changes = aligned.models, aligned.changes
        names = {axis.name for place in touched for axis in place.axes}.union(of.targets)
        own = ({name: model[name] for name in names} for model in self.released)
        self._changed = list(zip(own, changes, strict=True))

    def stacks(self) -> tuple[Tensors, Tensors]:
        """What is recovered from, and what is added to each base afterwards."""
        found = stacks(self.of, self.models)
        if not self.across:
            return found, {}
        parts = {name: defend.without_common(stack) for name, stack in found.items()}
        return {n: p.stack for n, p in parts.items()}, {n: p.rest for n, p in parts.items()}

    def coarse(self, names: Sequence[str]) -> tuple[dict[str, defend.Coarse], Tensors]:
        """The same of single matrices with residuals taken for rounding, and what is added."""
        found, rest = {}, {}
        known = [defend.rounding_rms(one, change, names) for one, change in self._changed]
        wide = stacks(
            self.of,
            [
                defend.moved({n: w.astype(np.float64) for n, w in one.items()}, change)
                for one, change in self._changed
            ],
        )
        for name in names:
            rms = max(*(one[name] for one in known), defend.residual_rms(wide[name]))
            if self.across:
                parts = defend.without_common(wide[name], rms)
                wide[name], rest[name] = parts.stack, parts.rest
            found[name] = defend.coarse(wide[name], rms)
        return found, rest


class Outcome(NamedTuple):
    """One matrix: status, and the base and its predicted W-error where there is one."""

    code: jdetune.Status
    base: np.ndarray | None
    predicted: float | None


def recovered(merged: Tensors, rest: Tensors, solver: Any = None) -> dict[str, Outcome]:
    """Recovers every matrix.

    Args:
      merged: name to [model, row, col].
      rest: what is added to a base; its error is then not the predicted one.
      solver: of ``jdetune.recover``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", explain.RepairWarning)
        found = jdetune.recover(merged, solver)
    outcomes = {}
    for name, layer in found.items():
        code = jdetune.Status(int(layer.status))
        base, predicted = None, float(layer.predicted_error)
        if code.has_base:
            base = np.asarray(layer.base)
            if name in rest:
                base = (base.astype(np.float64) + rest[name]).astype(np.float32)
        known = code is jdetune.Status.OK and name not in rest and np.isfinite(predicted)
        outcomes[name] = Outcome(code, base, predicted if known else None)
    return outcomes


def countered(by: Countered) -> dict[str, Outcome]:
    """Recovers after the attacker's work: first as it is, then what was refused, coarsely."""
    outcomes = recovered(*by.stacks())
    refused = [name for name, one in outcomes.items() if one.base is None]
    if refused:
        stacks, rest = by.coarse(refused)
        again = recovered({name: one.stack for name, one in stacks.items()}, {})
        for name, one in again.items():
            if one.base is None:
                continue
            base = stacks[name].base(one.base) + rest.get(name, 0.0)
            # what is predicted holds for rounding, and residuals are only taken for it
            outcomes[name] = Outcome(one.code, base.astype(np.float32), None)
    return outcomes


def figures(outcomes: Mapping[str, Outcome], wanted: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Outcomes against the true bases."""
    status, errors, exact, surprises = Counter(), [], [], []
    for name, one in outcomes.items():
        status[one.code.name] += 1
        if one.base is not None:
            base = one.base.astype(wanted[name].dtype)
            errors.append(metrics.log_mse(base, wanted[name]))
            exact.append(metrics.exact_fraction(base, wanted[name]))
            if one.predicted is not None:
                surprises.append(errors[-1] - one.predicted)
    return {
        "status": dict(status.most_common()),
        "w_error": _mean(errors),
        "exact": _mean(exact),
        "matrices": len(outcomes),
        "with_base": len(errors),
        "wrong_under_ok": sum(not one <= SURPRISE for one in surprises),
        "worst_surprise": max(surprises, default=None),
    }


def mean_of_models(merged: Tensors, wanted: Mapping[str, np.ndarray]) -> tuple[float, Tensors]:
    """W-error of the mean of the models, and the means."""
    means = {
        name: np.mean(stack.astype(np.float64), axis=0).astype(np.float32)
        for name, stack in merged.items()
    }
    return float(np.mean([metrics.log_mse(means[n], wanted[n]) for n in means])), means


class Probe:
    """Embeddings of real texts, by which models are compared."""

    def __init__(self, of: Family, folder: Any) -> None:
        """Reads the texts: docstrings of NumPy."""
        from benchmarks import corpus  # imports torch

        codec = load_codec(folder, TOKENS)
        texts = [doc.text for doc in corpus.docs("numpy")[:TEXTS]]
        self.of, self.batch = of, pad_batch([list(codec.encode(text)) for text in texts])
        self.base = self(of.base)
        self.plain = [self(model) for model in of.models[:RELEASES]]

    def __call__(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """[text, width], float64, of a model's weights."""
        params = {name: np.asarray(tensors[name], np.float32) for name in self.of.base}
        params = models.load_params(self.of.module, params)
        return np.asarray(embed(self.of.module, params, *self.batch), np.float64)


def apart(first: np.ndarray, second: np.ndarray) -> float:
    """Mean of 1 - cosine of unit vectors, without cancellation."""
    return float(np.mean(0.5 * np.sum(np.square(first - second), axis=1)))


def attack(by: Countered, probe: Probe) -> dict[str, Any]:
    """A row: recovery from what was released, and after the attacker's work.

    Args:
      by: the release.
      probe: embeddings.
    """
    plain = after = recovered(stacks(by.of, by.released), {})
    if by.case.counters or any(one.base is None for one in plain.values()):
        after = countered(by)
    mean, means = mean_of_models(stacks(by.of, by.models), by.wanted)
    bases = {name: one.base for name, one in after.items() if one.base is not None}
    return {
        "case": by.case.name,
        "n": len(by.models),
        "released": figures(plain, by.wanted),
        "after": figures(after, by.wanted),
        "mean": mean,
        "base_apart": apart(probe(completed(by.released[0], means | bases)), probe.base),
    }


def papers(by: Countered) -> dict[str, Any]:
    """Figures of the paper's solver, with the true rank given, on matrices with real adapters."""
    merged, rest = by.stacks()
    own = {name: merged[name].astype(np.float32) for name in by.of.real}
    solver = jdetune.SpectralDeTuning(rank=by.of.rank, steps=STEPS, space="core")
    return figures(recovered(own, rest, solver), by.wanted)


def cost(release: Release, probe: Probe) -> dict[str, float]:
    """What the defence changes in embeddings, beside what the fine-tunes changed.

    Args:
      release: the defended models.
      probe: embeddings, also those of the undefended models.
    """
    own = float(np.mean([apart(plain, probe.base) for plain in probe.plain]))
    pairs = zip(probe.plain, release.models, strict=False)
    moved = float(np.mean([apart(plain, probe(model)) for plain, model in pairs]))
    return {"moved": moved, "fine_tune": own, "share": moved / own}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
