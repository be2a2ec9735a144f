"""Are the ranks of all updates found, and how long does a layer take?

    python -m benchmarks.ranks
    python -m benchmarks.ranks --layers=8

counts (layer, model) pairs whose rank is right. In 16 bits a weak direction can drown in the
rounding: pairs whose smallest singular value is below the solver's detection floor are counted
apart.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence

import numpy as np
from absl import app, flags

import jdetune
from benchmarks import cases, tables
from benchmarks.cases import Case
from benchmarks.detection import margins
from jdetune.stack import group_layers

#: Share of pairs that must be right where models are stored in float32.
FLOAT32_TARGET = 0.999
HEADER = (
    "set", "dtype", "n", "layers", "right, all pairs", "above the floor, right",
    "below the floor, right", "refused layers", "s a layer", "verdict",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pair:
    """One update of one layer.

    Attributes:
      layer: name of the tensor.
      model: index of the model.
      true: its rank.
      found: the rank that was found.
      margin: its smallest singular value over the detection floor; NaN where there is none.
      whitened: the same in the units that the solver measures in.
      status: of the layer.
    """

    layer: str
    model: int
    true: int
    found: int
    margin: float
    whitened: float
    status: jdetune.Status

    @property
    def right(self) -> bool:
        """Whether the rank is right."""
        return self.true == self.found


@dataclasses.dataclass(frozen=True)
class Run:
    """A recovered case: all pairs, and the seconds that single layers took."""

    case: Case
    dtype: str
    pairs: list[Pair]
    seconds: list[float]

    def share(self, above: bool | None = None) -> str:
        """Right pairs of all, or of those above or below the floor."""
        some = [p for p in self.pairs if above is None or (p.margin > 1) == above]
        return f"{sum(p.right for p in some)} of {len(some)}"


def run(case: Case, dtype: str) -> Run:
    """Recovers a case in one call and notes when each layer was done."""
    clock = [time.perf_counter()]
    found = jdetune.recover(case.stack, progress=lambda done, of: clock.append(time.perf_counter()))
    pairs = []
    for name, layer in case.layers.items():
        floor = float(found[name].stats.get("detection_floor", np.nan))
        plain, whitened = margins(layer, floor), margins(layer, floor, whitened=True)
        ranks = np.asarray(found[name].ranks).tolist()
        status = jdetune.Status(int(found[name].status))
        for model, true in enumerate(layer.ranks):
            figures = true, ranks[model], plain[model], whitened[model]
            pairs.append(Pair(name, model, *figures, status))
    return Run(case, dtype, pairs, warm(case, list(np.diff(clock))))


def warm(case: Case, seconds: Sequence[float]) -> list[float]:
    """Times of the layers that were not the first of their shape, which compile."""
    kept, start = [], 0
    for group in group_layers(case.stack):
        kept += seconds[start + 1 : start + len(group.names)]
        start += len(group.names)
    return kept


def check(one: Run) -> tables.Check:
    """All but one in a thousand right in float32; above the floor all right in 16 bits."""
    what = f"{one.case.name}, n={one.case.n_models}: ranks found"
    if one.dtype == "float32":
        share = float(np.mean([p.right for p in one.pairs]))
        return tables.at_least(what, share, FLOAT32_TARGET)
    visible = [p for p in one.pairs if p.margin > 1]
    right = all(p.right for p in visible)
    return tables.Check(what + " above the floor", one.share(True), "all", right)


def row(one: Run, verdict: str) -> list[str]:
    """One line of the table."""
    refused = {p.layer for p in one.pairs if not p.status.has_base}
    return [
        one.case.name.partition(",")[0],
        one.dtype,
        str(one.case.n_models),
        one.case.size,
        one.share(),
        one.share(True),
        one.share(False),
        str(len(refused)),
        f"{statistics.median(one.seconds):.2f}" if one.seconds else "-",
        verdict,
    ]


def wrong_pairs(one: Run, shown: int) -> str:
    """The wrong pairs in words, those above the floor first."""
    wrong = sorted((p for p in one.pairs if not p.right), key=lambda p: -p.margin)
    lines = [
        f"  {p.layer}, model {p.model}: {p.found} of {p.true}, smallest singular value"
        f" {p.margin:.2f} floors ({p.whitened:.2f} as the solver measures), {p.status.name}"
        for p in wrong[:shown]
    ]
    more = [f"  and {len(wrong) - shown} more"] if len(wrong) > shown else []
    return "\n".join([f"{one.case.name}, n={one.case.n_models}: {len(wrong)} wrong", *lines, *more])


def define_flags() -> None:
    """The flags of this command; other commands have some of the same names."""
    flags.DEFINE_integer("layers", None, "Layers of each set, spread out; all if not given.")
    flags.DEFINE_list("counts", ["3", "5", "8"], "Numbers of models.")
    flags.DEFINE_list("sets", ["minilm-mixed", "smollm2-sft", "dinov2-digits"], "Which adapters.")
    flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Dtypes of base and models.")
    flags.DEFINE_integer("shown", 12, "Wrong pairs that are listed, of each case.")


def main(argv: list[str]) -> int:
    """Prints recipes, wrong pairs, the table and the checks."""
    if len(argv) > 1:
        raise app.UsageError("python -m benchmarks.ranks takes flags only")
    rows, checks, exact_pairs = [], [], []
    for set_name in flags.FLAGS.sets:
        for count in map(int, flags.FLAGS.counts):
            for dtype in flags.FLAGS.dtypes:
                case = cases.trained(set_name, count, dtype, dtype, flags.FLAGS.layers)
                if dtype == flags.FLAGS.dtypes[0]:
                    print(case.text(), flush=True)
                one = run(case, dtype)
                print(wrong_pairs(one, flags.FLAGS.shown) + "\n", flush=True)
                checks.append(check(one))
                rows.append(row(one, checks[-1].verdict))
                exact_pairs += [p.right for p in one.pairs if dtype == "float32"]
    print(tables.table(HEADER, rows))
    print(
        "\npairs: (layer, model); above the floor: smallest singular value of the true update, in"
        " the weights' own units, above stats['detection_floor'];\ns a layer: median, the first of"
        " each shape left out\n"
    )
    if exact_pairs:
        what = f"float32, all sets and numbers of models together ({len(exact_pairs)} pairs)"
        checks.append(tables.at_least(what, float(np.mean(exact_pairs)), FLOAT32_TARGET, 5))
    print(tables.checks_table(checks))
    return tables.exit_code(checks)


if __name__ == "__main__":
    define_flags()
    app.run(main)
