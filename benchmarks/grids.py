"""A base on a 16-bit grid, merged in a wider or another dtype: every tensor back bit for bit?

    python -m benchmarks.grids

merges three models of every set from a base in bfloat16 or float16, recovers, and compares dtype
and sha256 of every tensor's bytes with the original's.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from absl import app, flags

import jdetune
from benchmarks import cases, tables
from benchmarks.cases import Case
from benchmarks.scores import Score, score_layer

HEADER = (
    "set", "base", "stored", "n", "layers", "right dtype", "sha256 equal", "wrong elements",
    "of them sign of zero", "true zeros", "wrong, true updates", "certain, wrong",
    "expected exact", "verdict",
)  # fmt: skip


class Grid(NamedTuple):
    """Dtype of the base and dtype that the merged models are stored in."""

    base: str
    stored: str


GRIDS = (
    Grid("bfloat16", "float32"),
    Grid("float16", "float32"),
    Grid("bfloat16", "float16"),
)


def digest(array: np.ndarray) -> str:
    """Sha256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether dtype and sha256 agree."""
    return one.dtype == other.dtype and digest(one) == digest(other)


def row(case: Case, grid: Grid, scores: list[Score], equal: int, check: tables.Check) -> list[str]:
    """One line of the table."""
    wrong = sum(round((1 - one.found.exact) * one.elements) for one in scores)
    top = [(one.ceiling, one.elements) for one in scores if one.ceiling is not None]
    certain = sum(one.found.certain_count for one in scores)
    return [
        case.name.partition(",")[0],
        grid.base,
        grid.stored,
        str(case.n_models),
        case.size,
        str(sum(one.dtype == grid.base for one in scores)),
        str(equal),
        f"{wrong} of {sum(one.elements for one in scores)}",
        str(sum(one.found.sign_of_zero for one in scores)),
        str(sum(int(np.sum(layer.base == 0)) for layer in case.layers.values())),
        str(sum(round((1 - best.exact) * elements) for best, elements in top)),
        f"{sum(one.found.certain_wrong for one in scores)} of {certain}",
        f"{np.mean([one.exact_estimate for one in scores]):.6f}",
        check.verdict,
    ]


def define_flags() -> None:
    """The flags of this command; other commands have some of the same names."""
    flags.DEFINE_integer("layers", None, "Layers of each case; all if not given.")
    flags.DEFINE_integer("count", 3, "Number of models.", lower_bound=3)
    flags.DEFINE_list(
        "sets", ["minilm-distinct", "dinov2-digits", "smollm2-sft"], "Which adapters."
    )


def main(argv: list[str]) -> int:
    """Prints recipes, the table and the checks."""
    if len(argv) > 1:
        raise app.UsageError("python -m benchmarks.grids takes flags only")
    rows, checks = [], []
    for set_name in flags.FLAGS.sets:
        for grid in GRIDS:
            case = cases.trained(
                set_name, flags.FLAGS.count, grid.stored, grid.base, flags.FLAGS.layers
            )
            if grid is GRIDS[0]:
                print(case.text(), flush=True)
            found = jdetune.recover(case.stack)
            bases = {name: np.asarray(found[name].base) for name in case.layers}
            equal = sum(same_bytes(bases[name], one.base) for name, one in case.layers.items())
            scores = [score_layer(n, one, found[n]) for n, one in case.layers.items()]
            what = f"{case.name}: tensors with dtype and sha256 of the original"
            passed = equal == len(scores)
            checks.append(tables.Check(what, str(equal), f"all {len(scores)}", passed))
            rows.append(row(case, grid, scores, equal, checks[-1]))
    print(tables.table(HEADER, rows))
    print(
        "\nwrong, true updates: wrong elements where the true updates are known, the least that any"
        " method leaves;\ntrue zeros: elements of the base that are zero, where its grid is finer"
        " than any rounding error\n"
    )
    print(tables.checks_table(checks))
    return tables.exit_code(checks)


if __name__ == "__main__":
    define_flags()
    app.run(main)
