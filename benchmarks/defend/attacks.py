"""The attacks on a release, and how near they come to the true base."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import jdetune
from benchmarks.defend.cases import Case, Family, Release, Tensors, stacks, truth
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
    """A release after the attacker's own work, which needs no more than the first n models."""

    def __init__(self, of: Family, release: Release, case: Case) -> None:
        """Aligns all models at once: each is brought into the first one's coordinates."""
        self.models = release.models
        self.across = "across" in case.counters
        if "align" in case.counters:
            touched = [
                place
                for place in defend.places(of.module)
                if any(axis.name in of.targets for axis in place.axes)
            ]
            self.models = defend.align(of.module, release.models, touched).models

    def stacks(self, names: Sequence[str], count: int) -> tuple[Tensors, Tensors]:
        """What is recovered from, and what is added to each base afterwards."""
        found = stacks(self.models[:count], names)
        if not self.across:
            return found, {}
        parts = {name: defend.without_common(stack) for name, stack in found.items()}
        return {n: p.stack for n, p in parts.items()}, {n: p.rest for n, p in parts.items()}


def recovered(
    merged: Tensors, wanted: Mapping[str, np.ndarray], rest: Tensors, solver: Any = None
) -> tuple[dict[str, Any], Tensors]:
    """Recovers a base and compares it with the truth.

    Args:
      merged: name to [model, row, col].
      wanted: name to the true base.
      rest: what is added to a base before it is compared.
      solver: of ``jdetune.recover``.

    Returns:
      Figures, and the bases of the matrices that have one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", explain.RepairWarning)
        found = jdetune.recover(merged, solver)
    bases, status, errors, exact, surprises = {}, Counter(), [], [], []
    for name, layer in found.items():
        code = jdetune.Status(int(layer.status))
        status[code.name] += 1
        if not code.has_base:
            continue
        base = np.asarray(layer.base)
        if name in rest:
            base = (base.astype(np.float64) + rest[name]).astype(np.float32)
        bases[name] = base.astype(wanted[name].dtype)
        errors.append(metrics.log_mse(bases[name], wanted[name]))
        exact.append(metrics.exact_fraction(bases[name], wanted[name]))
        predicted = float(layer.predicted_error)
        if code is jdetune.Status.OK and name not in rest and np.isfinite(predicted):
            surprises.append(errors[-1] - predicted)
    return {
        "status": dict(status.most_common()),
        "w_error": _mean(errors),
        "exact": _mean(exact),
        "matrices": len(found),
        "with_base": len(bases),
        "wrong_under_ok": sum(not one <= SURPRISE for one in surprises),
        "worst_surprise": max(surprises, default=None),
    }, bases


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


def attack(
    of: Family, release: Release, case: Case, counts: Sequence[int], paper: int | None, probe: Probe
) -> list[dict[str, Any]]:
    """A row for each number of models.

    Args:
      of: the family.
      release: what the attacker has.
      case: the defence that made it.
      counts: numbers of models.
      paper: the one at which the paper's solver runs too; it does not if None.
      probe: embeddings.
    """
    wanted, rows = truth(of, release), []
    countered = Countered(of, release, case)
    for count in counts:
        plain, bases = recovered(stacks(release.models[:count], of.targets), wanted, {})
        merged, rest = countered.stacks(of.targets, count)
        after = plain
        if case.counters:
            after, bases = recovered(merged, wanted, rest)
        mean, means = mean_of_models(stacks(countered.models[:count], of.targets), wanted)
        got = release.models[0] | means | bases
        row = {"case": case.name, "n": count, "released": plain, "after": after, "mean": mean}
        row["base_apart"] = apart(probe(got), probe.base)
        if count == paper:
            own = {name: merged[name].astype(np.float32) for name in of.real}
            solver = jdetune.SpectralDeTuning(rank=of.rank, steps=STEPS, space="core")
            row["paper"], _ = recovered(own, wanted, rest, solver)
        rows.append(row)
    return rows


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
