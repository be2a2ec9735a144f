"""How many elements come back bit for bit, how many are called certain, how many wrongly.

    python -m benchmarks.exactness
    python -m benchmarks.exactness --layers=4

prints every case with its recipe, then one table: the exact fraction beside its target and beside
the ceiling, which is what the true updates would give, and the elements called certain.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from absl import app, flags

from benchmarks import cases, tables
from benchmarks.cases import Case
from benchmarks.scores import Score, mean_error, refused, score

#: Of the elements called certain as many may be wrong, per million over all cases together.
WRONG_PER_MILLION = 1.0
#: Share of the exact elements that should be called certain.
CERTAIN_OF_EXACT = 0.95
HEADER = (
    "case", "n", "layers", "exact", "target", "ceiling", "expected", "log10 MSE", "certain",
    "certain of exact", "at ceiling", "certain, wrong", "verdict",
)  # fmt: skip


class Target(NamedTuple):
    """A case, made when its turn comes, and the exact fraction that it should reach."""

    make: Callable[[], Case]
    exact: float


def targets(layers: int | None) -> list[Target]:
    """The cases of this benchmark."""
    trained, bf16 = cases.trained, "bfloat16"
    return [
        Target(lambda: trained("minilm-distinct", 3, layers=layers), 0.96),
        Target(lambda: trained("minilm-distinct", 5, layers=layers), 0.975),
        Target(lambda: trained("minilm-distinct", 15, layers=layers), 0.985),
        Target(lambda: trained("minilm-distinct", 5, bf16, bf16, layers), 0.97),
        Target(lambda: trained("dinov2-digits", 3, layers=layers), 0.92),
        Target(lambda: trained("smollm2-sft", 3, layers=layers), 0.87),
        Target(synthetic, 0.985),
    ]


def synthetic() -> Case:
    """1024 x 1024 in bfloat16, updates of rank 16 at a twentieth of the weights."""
    return cases.synthetic(
        "synthetic 1024x1024, bfloat16", n_models=5, row=1024, col=1024, rank=16, seed=0,
        dtype="bfloat16", base_std=0.02, update_rms=1e-3, decay=3,
    )  # fmt: skip


def mean(scores: Sequence[Score], figure: Callable[[Score], float]) -> float:
    """Mean of a figure over layers."""
    return float(np.mean([figure(one) for one in scores]))


def row(case: Case, scores: Sequence[Score], check: tables.Check) -> list[str]:
    """One line of the table."""
    lost = refused(scores)
    wrong = sum(one.found.certain_wrong for one in scores)
    return [
        case.name,
        str(case.n_models),
        case.size + (f", {lost} refused" if lost else ""),
        check.figure,
        check.target,
        f"{mean(scores, lambda s: s.ceiling.exact if s.ceiling else np.nan):.4f}",
        f"{mean(scores, lambda s: s.exact_estimate):.4f}",
        f"{mean_error(scores):.2f}",
        f"{mean(scores, lambda s: s.found.certain):.4f}",
        f"{mean(scores, lambda s: s.found.certain_of_exact):.4f}",
        f"{mean(scores, lambda s: s.ceiling.certain_of_exact if s.ceiling else np.nan):.4f}",
        f"{wrong} of {sum(one.found.certain_count for one in scores)}",
        check.verdict,
    ]


def overall(scores: Sequence[Sequence[Score]], names: Sequence[str]) -> list[tables.Check]:
    """Checks on the elements called certain."""
    flat = [one for some in scores for one in some]
    count = sum(one.found.certain_count for one in flat)
    wrong = sum(one.found.certain_wrong for one in flat)
    top = [one.ceiling for one in flat if one.ceiling is not None]
    top_wrong, top_count = sum(c.certain_wrong for c in top), sum(c.certain_count for c in top)
    what = f"certain elements that are wrong, per million ({wrong} of {count}; "
    what += f"with the true updates {top_wrong} of {top_count})"
    checks = [tables.at_most(what, 1e6 * wrong / max(count, 1), WRONG_PER_MILLION, 3)]
    for name, some in zip(names, scores, strict=True):
        share = mean(some, lambda s: s.found.certain_of_exact)
        top_share = mean(some, lambda s: s.ceiling.certain_of_exact if s.ceiling else np.nan)
        what = f"certain of the exact elements, {name} (ceiling {top_share:.4f})"
        checks.append(tables.at_least(what, share, CERTAIN_OF_EXACT))
    return checks


def define_flags() -> None:
    """The flags of this command; other commands have some of the same names."""
    flags.DEFINE_integer("layers", None, "Layers of each case; all if not given.")
    flags.DEFINE_list("only", [], "Cases by number, 1 to 7; all if not given.")


def main(argv: list[str]) -> int:
    """Prints recipes, the table and the checks."""
    if len(argv) > 1:
        raise app.UsageError("python -m benchmarks.exactness takes flags only")
    rows, checks, scores, names = [], [], [], []
    chosen = {int(number) for number in flags.FLAGS.only}
    for number, target in enumerate(targets(flags.FLAGS.layers), 1):
        if chosen and number not in chosen:
            continue
        clock, case = time.perf_counter(), target.make()
        print(case.text(), flush=True)
        scores.append(score(case))
        names.append(f"{case.name}, n={case.n_models}")
        share = mean(scores[-1], lambda s: s.found.exact)
        checks.append(tables.at_least(f"exact fraction, {names[-1]}", share, target.exact))
        rows.append(row(case, scores[-1], checks[-1]))
        print(f"{names[-1]}: {time.perf_counter() - clock:.0f} s\n", flush=True)
    checks += overall(scores, names)
    print(tables.table(HEADER, rows))
    print(
        "\nexact: bit for bit and of the base's dtype, mean over layers; ceiling: the same from the"
        " true updates;\nexpected: exact as jdetune estimates it; log10 MSE: mean over layers,"
        " floor -40\n"
    )
    print(tables.checks_table(checks))
    return tables.exit_code(checks)


if __name__ == "__main__":
    define_flags()
    app.run(main)
