"""Does jdetune know how wrong it is? Predicted error and exact fraction against the truth.

    python -m benchmarks.calibration --out=docs/calibration.png

recovers every set in float32 and bfloat16 with three and five models, the synthetic cases of the
other benchmarks, and held-out ones; prints the share of layers whose predicted error is near the
true one, and draws all layers.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks import cases, exactness, held_out, small_updates, tables
from benchmarks.cases import Case
from benchmarks.scores import Score, score

#: Largest difference of predicted and true log10 MSE that counts as right.
NEAR, NEAR_HELD_OUT = 0.3, 0.4
TARGET, TARGET_HELD_OUT = 0.95, 1.0
#: log10 MSE up to which a layer counts as exact.
EXACT = -25.0
HEADER = (
    "case", "n", "layers", "refused", "within 0.3", "within 0.4", "worst", "mean difference",
    "true log10 MSE", "exact", "exact, estimated", "certain, wrong",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    """One layer.

    Attributes:
      group: the set or kind of case, which gives the colour.
      dtype: that models are stored in.
      held_out: whether no constant was chosen on it.
      score: the layer against the truth.
    """

    group: str
    dtype: str
    held_out: bool
    score: Score

    @property
    def difference(self) -> float:
        """Predicted less true log10 MSE."""
        return self.score.predicted - self.score.error

    def near(self, limit: float) -> bool:
        """Whether the prediction is right: near, or exact and said to be."""
        one = self.score
        said_exact = round((1 - one.exact_estimate) * one.elements) == 0
        if (one.predicted <= EXACT and one.error <= EXACT) or (said_exact and one.found.exact == 1):
            return True
        return abs(self.difference) <= limit


def real(layers: int | None) -> Iterator[tuple[str, str, Case]]:
    """Group, dtype and case of all sets in both dtypes, and on a 16-bit grid."""
    for set_name in cases.SETS:
        for dtype in ("float32", "bfloat16"):
            for count in (3, 5):
                yield set_name, dtype, cases.trained(set_name, count, dtype, dtype, layers)
    name = "minilm-distinct"
    yield name, "float32", cases.trained(name, 15, layers=layers)
    for grid, dtype in (("bfloat16", "float32"), ("float16", "float32"), ("bfloat16", "float16")):
        yield name, dtype, cases.trained(name, 3, dtype, grid, layers)


def made() -> Iterator[tuple[str, str, Case]]:
    """Group, dtype and case of the synthetic cases of the other benchmarks."""
    yield "synthetic", "bfloat16", exactness.synthetic()
    for ratio in (0.1, 0.3, 1.0, 3.0):
        yield "small updates", "bfloat16", small_updates.make(ratio, 512, 5, 16)


def kept_back() -> Iterator[tuple[str, str, Case]]:
    """Group, dtype and case of the held-out families."""
    for group, some in (("generic", held_out.generic()), ("near-shared", held_out.nearly_shared())):
        for case in some:
            yield group, str(next(iter(case.layers.values())).merged.dtype), case


def row(case: Case, points: Sequence[Point]) -> list[str]:
    """One line of the table."""
    known = [p for p in points if p.score.has_base]

    def of(figure: Callable[[Point], float], combine: Callable = np.mean) -> str:
        return f"{combine([figure(p) for p in known]):.4g}" if known else "-"

    return [
        case.name,
        str(case.n_models),
        case.size,
        str(len(points) - len(known)),
        f"{sum(p.near(0.3) for p in known)} of {len(known)}",
        f"{sum(p.near(0.4) for p in known)} of {len(known)}",
        of(lambda p: 0.0 if p.near(0) else abs(p.difference), np.max),
        of(lambda p: 0.0 if p.near(0) else p.difference),
        of(lambda p: p.score.error),
        of(lambda p: p.score.found.exact),
        of(lambda p: p.score.exact_estimate),
        f"{sum(p.score.found.certain_wrong for p in known)} of"
        f" {sum(p.score.found.certain_count for p in known)}",
    ]


def misses(points: Sequence[Point], limit: float) -> str:
    """The layers whose prediction is not near, in words."""
    lines = [
        f"  {p.group}, {p.dtype}, {p.score.name}: {p.score.predicted:.2f} predicted,"
        f" {p.score.error:.2f} true, amplification {p.score.amplification:.3g},"
        f" {round((1 - p.score.found.exact) * p.score.elements)} wrong elements,"
        f" {(1 - p.score.exact_estimate) * p.score.elements:.1f} expected"
        for p in points
        if p.score.has_base and not p.near(limit)
    ]
    return "\n".join([f"{len(lines)} layers are not within {limit}", *lines])


def check(points: Sequence[Point], what: str, limit: float, target: float) -> tables.Check:
    """The share of layers with a base whose prediction is near."""
    near = [p.near(limit) for p in points if p.score.has_base]
    what = f"{what}: share of {len(near)} layers within {limit}"
    return tables.at_least(what, float(np.mean(near)) if near else np.nan, target)


def checks(points: Sequence[Point]) -> list[tables.Check]:
    """All figures beside their targets."""
    main = [p for p in points if not p.held_out]
    rest = [p for p in points if p.held_out]
    known = [p.score for p in points if p.score.has_base]
    exact_gap = [abs(one.exact_estimate - one.found.exact) for one in known]
    told = f"mean {np.mean(exact_gap):.4f}, worst {np.max(exact_gap):.4f}"
    wrong = sum(one.found.certain_wrong for one in known)
    certain = sum(one.found.certain_count for one in known)
    return [
        check(main, "cases", NEAR, TARGET),
        check(rest, "held-out", NEAR_HELD_OUT, TARGET_HELD_OUT),
        tables.Check("estimated less true exact fraction", told, "-", True),
        tables.at_most(
            f"certain elements that are wrong, per million ({wrong} of {certain})",
            1e6 * wrong / max(certain, 1),
            exactness.WRONG_PER_MILLION,
            3,
        ),
    ]


def define_flags() -> None:
    """The flags of this command; other commands have some of the same names."""
    flags.DEFINE_string("out", None, "Where to write the picture; none if not given.")
    flags.DEFINE_integer("layers", None, "Layers of each set; all if not given.")
    flags.DEFINE_multi_enum(
        "parts",
        ["real", "made", "held_out"],
        ["real", "made", "held_out"],
        "Which cases: --parts=made --parts=held_out.",
    )


def main(argv: list[str]) -> int:
    """Prints recipes, the table, the misses and the checks; draws the picture."""
    if len(argv) > 1:
        raise app.UsageError("python -m benchmarks.calibration takes flags only")
    points, rows = [], []
    parts = {"real": real(flags.FLAGS.layers), "made": made(), "held_out": kept_back()}
    for part in flags.FLAGS.parts:
        for group, dtype, case in parts[part]:
            print(case.text(), flush=True)
            found = [
                Point(group, dtype, part == "held_out", one) for one in score(case, ceilings=False)
            ]
            points += found
            rows.append(row(case, found))
            print(" | ".join(rows[-1]) + "\n", flush=True)
    print(tables.table(HEADER, rows))
    print("\n" + misses([p for p in points if not p.held_out], NEAR))
    print("held-out: " + misses([p for p in points if p.held_out], NEAR_HELD_OUT) + "\n")
    found = checks(points)
    print(tables.checks_table(found))
    if flags.FLAGS.out is not None:
        from benchmarks import calibration_plot

        Path(flags.FLAGS.out).parent.mkdir(parents=True, exist_ok=True)
        calibration_plot.draw(points, Path(flags.FLAGS.out))
    return tables.exit_code(found)


if __name__ == "__main__":
    define_flags()
    app.run(main)
