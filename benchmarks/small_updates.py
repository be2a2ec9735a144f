"""Updates that are small against the grid: where most elements of a 16-bit merge never moved.

    python -m benchmarks.small_updates

sweeps the size of the updates in units of the base's own spacing and prints, for synthetic layers
in bfloat16, how many elements jdetune gets right beside two plain estimates and the ceiling, what
it says of itself, and which ranks it finds.
"""

import jax.numpy as jnp
import numpy as np
from absl import app, flags

import jdetune
from benchmarks import cases, tables
from benchmarks.cases import Case, Layer
from benchmarks.detection import above_floor, stored_above_floor
from benchmarks.scores import Score, score_layer
from jdetune.metrics import exact_fraction
from jdetune.noise import ulp

DTYPE, BASE_STD, SEED = "bfloat16", 0.02, 0
HEADER = (
    "rms(M)/ulp", "status", "exact", "mean of models", "shared value", "ceiling", "expected",
    "log10 MSE", "predicted", "certain, wrong", "rank_gap", "ranks found", "above the floor",
    "of them stored", "verdict",
)  # fmt: skip


def make(ratio: float, side: int, count: int, rank: int) -> Case:
    """A synthetic family whose updates have that size in median units in the last place."""
    arguments = {"n_models": count, "row": side, "col": side, "rank": rank, "seed": SEED}
    arguments |= {"dtype": DTYPE, "base_std": BASE_STD, "decay": 3.0}
    base = cases.synthetic("base", **arguments).layers["weight"].base
    unit = float(np.median(np.asarray(ulp(jnp.asarray(base)))))
    return cases.synthetic(f"rms(M)/ulp {ratio:g}", **arguments, update_rms=ratio * unit)


def mean_of_models(merged: np.ndarray) -> np.ndarray:
    """The plain mean, rounded to the models' dtype."""
    return merged.astype(np.float64).mean(axis=0).astype(merged.dtype)


def shared_value(merged: np.ndarray) -> np.ndarray:
    """The value that most models have in each element; of several such the nearest to the mean."""
    values = merged.astype(np.float64)
    votes = np.sum(values[:, None] == values[None, :], axis=1)
    distance = np.abs(values - values.mean(axis=0))
    rank = votes - distance / (2 * np.maximum(distance.max(axis=0), 1e-300))
    best = np.argmax(rank, axis=0)
    return np.take_along_axis(merged, best[None], axis=0)[0]


def row(case: Case, one: Score, check: tables.Check) -> list[str]:
    """One line of the table."""
    layer = case.layers["weight"]
    assert one.ceiling is not None
    floor = one.stats.get("detection_floor", np.nan)
    return [
        case.name.removeprefix("rms(M)/ulp "),
        one.status.name,
        f"{one.found.exact:.4f}",
        f"{exact_fraction(mean_of_models(layer.merged), layer.base):.4f}",
        f"{exact_fraction(shared_value(layer.merged), layer.base):.4f}",
        f"{one.ceiling.exact:.4f}",
        f"{one.exact_estimate:.4f}",
        f"{one.error:.2f}",
        f"{one.predicted:.2f}",
        f"{one.found.certain_wrong} of {one.found.certain_count}",
        f"{one.stats.get('rank_gap', np.nan):.3g}",
        " ".join(map(str, one.ranks)),
        " ".join(map(str, above_floor(layer, floor))),
        " ".join(map(str, stored_above_floor(layer, floor))),
        check.verdict,
    ]


def check(case: Case, one: Score, layer: Layer) -> tables.Check:
    """At least as good as the better of the two plain estimates."""
    plain = max(
        exact_fraction(mean_of_models(layer.merged), layer.base),
        exact_fraction(shared_value(layer.merged), layer.base),
    )
    what = f"{case.name}: exact fraction against the better plain estimate"
    return tables.at_least(what, one.found.exact, round(plain, 4))


def define_flags() -> None:
    """The flags of this command; other commands have some of the same names."""
    flags.DEFINE_list("ratios", ["0.1", "0.3", "1", "3"], "rms(M) / median ulp of the base.")
    flags.DEFINE_integer("side", 512, "Rows and columns.", lower_bound=64)
    flags.DEFINE_integer("count", 5, "Number of models.", lower_bound=3)
    flags.DEFINE_integer("rank", 16, "Rank of every update.", lower_bound=1)


def main(argv: list[str]) -> int:
    """Prints recipes, the table and the checks."""
    if len(argv) > 1:
        raise app.UsageError("python -m benchmarks.small_updates takes flags only")
    rows, checks = [], []
    for ratio in map(float, flags.FLAGS.ratios):
        case = make(ratio, flags.FLAGS.side, flags.FLAGS.count, flags.FLAGS.rank)
        print(case.text(), flush=True)
        layer = case.layers["weight"]
        found = jdetune.recover(case.stack)["weight"]
        one = score_layer("weight", layer, found)
        beside = check(case, one, layer)
        calibrated = abs(one.predicted - one.error) <= 0.3
        told = f"{one.predicted:.2f} and {one.error:.2f}"
        what = f"{case.name}: predicted and true log10 MSE"
        checks += [beside, tables.Check(what, told, "within 0.3", calibrated)]
        rows.append(row(case, one, beside))
    print(tables.table(HEADER, rows))
    print(
        "\nshared value: the most common among the models; above the floor: singular values of the"
        " true updates above stats['detection_floor'];\nstored: the same of the stored models less"
        " the true base, where elements that did not move hold nothing of the update\n"
    )
    print(tables.checks_table(checks))
    return tables.exit_code(checks)


if __name__ == "__main__":
    define_flags()
    app.run(main)
