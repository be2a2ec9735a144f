"""Small models of every kind that users hand in, and what jdetune should do with them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jdetune import synth

LAYERS = tuple(
    f"encoder.layer.{layer}.{part}.weight" for layer in (0, 1) for part in ("query", "value")
)
ROW, COL, RANK = 48, 32, 2

Model = dict[str, np.ndarray]


@dataclasses.dataclass
class Family:
    """A base and models merged from it, by tensor name; cases change the models in place."""

    base: Model
    models: list[Model]
    factors: list[dict[str, tuple[np.ndarray, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of input.

    Attributes:
      name: what is handed in.
      outcome: ``refused | repaired | solved``.
      code: exit code of `jdetune recover`.
      message: regular expression that the first line a user reads must match.
      build: makes the models.
      config: more entries of every model's config.json.
    """

    name: str
    outcome: str
    code: int
    message: str
    build: Callable[[], Family]
    config: dict[str, Any] | None = None


def family(
    count: int,
    rank: int = RANK,
    seed: int = 0,
    dtype: str = "float32",
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Family:
    """Models of one base; ``change`` is applied to the bases before merging."""
    rms = 1e-3 if dtype == "float32" else 5e-3
    made = Family({}, [{} for _ in range(count)], [{} for _ in range(count)])
    for index, name in enumerate(LAYERS):
        one = synth.family(count, ROW, COL, rank, 100 * seed + index, dtype, update_rms=rms)
        base = one.base if change is None else change(one.base)
        made.base[name] = base
        for model, b, a, factors in zip(
            made.models, one.left, one.right, made.factors, strict=True
        ):
            model[name] = synth.merge(base, b, a, dtype)
            factors[name] = (b, a)
    rng = np.random.default_rng(seed)
    for name in ("encoder.norm.weight", "encoder.norm.bias"):
        made.base[name] = rng.standard_normal(COL).astype(made.base[LAYERS[0]].dtype)
        for model in made.models:
            model[name] = made.base[name].copy()
    return made


def changed(made: Family, change: Callable[[np.ndarray, int], np.ndarray], only=None) -> Family:
    """Every model's matrices (or one model's) changed; the function gets matrix and model."""
    for index, model in enumerate(made.models):
        for name in LAYERS:
            if only is None or index == only:
                model[name] = change(model[name], index).astype(model[name].dtype)
    return made


def joined(one: Family, *others: Family) -> Family:
    """All models; the base is that of the first family."""
    models = [model for made in (one, *others) for model in made.models]
    factors = [each for made in (one, *others) for each in made.factors]
    return Family(one.base, models, factors)


def sharing(count: int, sharers: int) -> Family:
    """The first models share one direction of their column spaces exactly."""
    made = family(count)
    for name in LAYERS:
        for index in range(sharers):
            left, right = (part.copy() for part in made.factors[index][name])
            left[:, 0] = made.factors[0][name][0][:, 0]
            made.models[index][name] = synth.merge(made.base[name], left, right)
    return made


def with_hole(
    count: int, where: Any, value: float = np.nan, names: Sequence[str] = LAYERS[:1]
) -> Family:
    """NaN or infinity in some matrices of the second model."""
    made = family(count)
    for name in names:
        made.models[1][name] = made.models[1][name].copy()
        made.models[1][name][where] = value
    return made


def fully_tuned(made: Family, model: int | None, names: Sequence[str] = LAYERS) -> Family:
    """Full fine-tuning of one model or all, in some matrices."""
    rng = np.random.default_rng(7)
    for index, weights in enumerate(made.models):
        if model is None or index == model:
            for name in names:
                noise = 1e-3 * rng.standard_normal((ROW, COL))
                weights[name] = (weights[name] + noise).astype(np.float32)
    return made


def dora(weights: np.ndarray, model: int) -> np.ndarray:
    """Rows of another norm, as DoRA's magnitudes make them."""
    rng = np.random.default_rng(model)
    return weights * (1 + 0.01 * rng.standard_normal((ROW, 1)))


def requantised(levels: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """Rounded to a grid of as many levels either side of zero, a row each."""

    def change(weights: np.ndarray, model: int) -> np.ndarray:
        step = np.abs(weights).max(axis=1, keepdims=True) / levels
        return np.round(weights / step) * step

    return change


def again(made: Family, seed: int = 50) -> Family:
    """A second LoRA merged into every model, rounded a second time."""
    more = family(len(made.models), seed=seed)
    for model, factors in zip(made.models, more.factors, strict=True):
        for name in LAYERS:
            dtype = "float32" if model[name].dtype == np.float32 else "bfloat16"
            scale = np.float32(1 if dtype == "float32" else 5)
            model[name] = synth.merge(model[name], scale * factors[name][0], factors[name][1])
    return made


def averaged(count: int) -> Family:
    """Models that are means of two merges each."""
    made = family(2 * count)
    pairs = zip(made.models[::2], made.models[1::2], strict=True)
    models = [{n: (a[n] + b[n]) / np.asarray(2, a[n].dtype) for n in a} for a, b in pairs]
    return Family(made.base, models, made.factors[:count])


def twins(count: int) -> Family:
    """The last model is the first one again."""
    made = family(count)
    made.models[-1] = {name: tensor.copy() for name, tensor in made.models[0].items()}
    return made


def with_vectors(count: int, differing: Sequence[int]) -> Family:
    """A 1-D tensor differs in some models."""
    made = family(count)
    for index in differing:
        made.models[index]["encoder.norm.bias"] = np.full(COL, float(index + 1), np.float32)
    if len(differing) == count:
        del made.base["encoder.norm.bias"]
    return made


def zero_layer(everywhere: bool) -> Family:
    """A matrix that is zero in all models, or zero in the base alone."""
    made = family(3)
    name = LAYERS[0]
    made.base[name] = np.zeros((ROW, COL), np.float32)
    for model, factors in zip(made.models, made.factors, strict=True):
        update = factors[name][0] @ factors[name][1]
        model[name] = np.zeros_like(update) if everywhere else update
    return made


def wider(made: Family) -> Family:
    """Models of another architecture."""
    for model in made.models:
        for name in list(model):
            pad = [(0, 8)] * model[name].ndim
            model[name] = np.pad(model[name], pad)
    return made


def _other(count: int) -> Family:
    return family(count, seed=9)


CASES = (
    Case("two models", "refused", 3, r"2 model\(s\) given", lambda: family(2)),
    Case(
        "three models, two of them the same",
        "refused",
        3,
        "only 2 distinct model.*tune-2 equals tune-0",
        lambda: twins(3),
    ),
    Case(
        "three models of one base and three of another",
        "refused",
        4,
        "tune-0, tune-1, tune-2 share one base; tune-3, tune-4, tune-5 another. Recover each",
        lambda: joined(family(3), _other(3)),
    ),
    Case(
        "three models of one base and two of another",
        "refused",
        4,
        "tune-0, tune-1, tune-2 share one base; tune-3, tune-4 another. Recover each",
        lambda: joined(family(3), _other(2)),
    ),
    Case(
        "three models, one of another base",
        "refused",
        4,
        "tune-0, tune-1 share one base; tune-2 shares none of these. Three models of one base",
        lambda: joined(family(2), _other(1)),
    ),
    Case(
        "three models of one architecture, two of another",
        "refused",
        4,
        "by architecture: tune-0, tune-1, tune-2; tune-3, tune-4. Recover each",
        lambda: joined(family(3), wider(_other(2))),
    ),
    Case(
        "three models, two share a direction exactly",
        "refused",
        4,
        "query.*share directions",
        lambda: sharing(3, 2),
    ),
    Case(
        "four models, three share a direction exactly",
        "refused",
        4,
        "query.*share directions",
        lambda: sharing(4, 3),
    ),
    Case(
        "full fine-tuning",
        "refused",
        4,
        "query.*full fine-tuning",
        lambda: fully_tuned(family(4), None),
    ),
    Case("DoRA merges", "refused", 4, "query.*DoRA", lambda: changed(family(3), dora)),
    Case(
        "4-bit requantised merges",
        "refused",
        4,
        "query.*quantised",
        lambda: changed(family(3), requantised(7)),
    ),
    Case(
        "8-bit requantised merges",
        "refused",
        4,
        "query.*quantised",
        lambda: changed(family(3), requantised(127)),
    ),
    Case(
        "quantised checkpoints, as config.json says",
        "refused",
        3,
        "tune-0.*quantization_config",
        lambda: family(3),
        {"quantization_config": {"bits": 4}},
    ),
    Case(
        "rank above a third of the smaller side, three models",
        "refused",
        4,
        "query.*ranks are too large",
        lambda: family(3, rank=12),
    ),
    Case(
        "a row of NaN in one of three models",
        "refused",
        3,
        "query.*NaN.*tune-1 in row 3",
        lambda: with_hole(3, np.s_[3], np.nan, LAYERS),
    ),
    Case(
        "infinity in one of three models",
        "refused",
        3,
        r"query.*infinity.*tune-1 in element \(3, 4\)",
        lambda: with_hole(3, np.s_[3, 4], np.inf, LAYERS),
    ),
    Case("one model twice", "repaired", 0, "tune-3 equals tune-0", lambda: twins(4)),
    Case(
        "four models, one of another base",
        "repaired",
        0,
        "tune-3 was left out of every tensor.*another base",
        lambda: joined(family(3), _other(1)),
    ),
    Case(
        "four models, one fully fine-tuned",
        "repaired",
        0,
        "tune-2 was left out of every tensor.*fully fine-tuned",
        lambda: fully_tuned(family(4), 2),
    ),
    Case(
        "four models, one fully fine-tuned in one matrix",
        "repaired",
        0,
        r"tune-2 was left out of 1 of 4 tensors solved \(encoder.layer.0.query.weight\)",
        lambda: fully_tuned(family(4), 2, LAYERS[:1]),
    ),
    Case(
        "four models, one merged with DoRA",
        "repaired",
        0,
        "tune-1 was left out of every tensor.*DoRA",
        lambda: changed(family(4), dora, 1),
    ),
    Case(
        "four models, one requantised to 8 bits",
        "repaired",
        0,
        "tune-1 was left out of every tensor.*quantised",
        lambda: changed(family(4), requantised(127), 1),
    ),
    Case(
        "four models, one of another architecture",
        "repaired",
        0,
        "tune-3 was left out: it has no tensor in common",
        lambda: joined(family(3), wider(_other(1))),
    ),
    Case(
        "a row of NaN in one of four models",
        "repaired",
        0,
        "tune-1 holds NaN or infinity in row 3 of encoder.layer.0.query.weight",
        lambda: with_hole(4, np.s_[3]),
    ),
    Case(
        "a column of infinity in one of four models",
        "repaired",
        0,
        "tune-1 holds NaN or infinity in column 5 of encoder.layer.0.query.weight",
        lambda: with_hole(4, np.s_[:, 5], np.inf),
    ),
    Case(
        "a NaN in one of four models",
        "repaired",
        0,
        r"tune-1 holds NaN or infinity in element \(3, 4\) of .*filled in",
        lambda: with_hole(4, np.s_[3, 4]),
    ),
    Case(
        "a vector that differs in one of three models",
        "repaired",
        0,
        "encoder.norm.bias, are the majority.s copy: 2 of 3 models.*not so tune-1",
        lambda: with_vectors(3, [1]),
    ),
    Case(
        "a vector that differs in all models",
        "repaired",
        5,
        "the base lacks 1 tensor.s., e.g. encoder.norm.bias: differs in most models",
        lambda: with_vectors(3, [0, 1, 2]),
    ),
    Case("an all-zero matrix", "solved", 0, "3 of 3 differing", lambda: zero_layer(True)),
    Case("a matrix that is zero in the base", "solved", 0, "4 of 4", lambda: zero_layer(False)),
    Case("averages of two merges each", "solved", 0, "4 of 4", lambda: averaged(3)),
    Case("two LoRAs merged one after the other", "solved", 0, "4 of 4", lambda: again(family(3))),
    Case(
        "the same in bfloat16",
        "solved",
        0,
        "4 of 4",
        lambda: again(family(3, dtype="bfloat16")),
    ),
)
