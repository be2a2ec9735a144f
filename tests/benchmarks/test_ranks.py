"""The rank benchmark: pairs, times of warm layers, and its verdicts."""

import numpy as np
import pytest

from benchmarks import cases, one_seed, ranks
from benchmarks.scores import score


@pytest.fixture(scope="module")
def case():
    return cases.synthetic("tiny, float32", n_models=3, row=64, col=48, rank=[4, 2, 3], seed=1)


def test_run_counts_pairs_and_checks_them(case):
    one = ranks.run(case, "float32")
    assert [p.true for p in one.pairs] == [4, 2, 3]
    assert all(p.right and p.margin > 1 for p in one.pairs)
    assert one.seconds == []  # the only layer of its shape compiles
    assert ranks.check(one).passed
    assert len(ranks.row(one, "PASS")) == len(ranks.HEADER)
    assert one.share(True) == "3 of 3"
    assert "0 wrong" in ranks.wrong_pairs(one, 3)


def test_warm_leaves_out_the_first_layer_of_each_shape():
    def layer(row):
        merged = np.random.default_rng(row).standard_normal((3, row, 8)).astype(np.float32)
        return cases.Layer(merged[0], merged, [])

    told = cases.synthetic("t", n_models=3, row=32, col=32, rank=2).description
    layers = {"a": layer(8), "b": layer(16), "c": layer(8), "d": layer(16)}
    case = cases.Case("t", layers, told, 4)
    # recovered in the order a, c, b, d
    assert ranks.warm(case, [10.0, 1.0, 20.0, 2.0]) == [1.0, 2.0]


def test_outcomes_of_one_seed_fill_the_table(case):
    outcome = one_seed.Outcome("jdetune", score(case, ceilings=False), 1.0)
    check = one_seed.check(case, outcome)
    assert check.passed
    assert len(one_seed.row(case, outcome, check)) == len(one_seed.HEADER)
    slow = one_seed.check(case, outcome, 1000)
    assert not slow.passed  # far below what the paper's solver is thought to reach
    assert one_seed.check(case, outcome, 17).target == "-"
