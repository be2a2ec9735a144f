"""The tables of the defences say what was measured."""

import numpy as np

from benchmarks import tables
from benchmarks.defend import __main__ as main
from benchmarks.defend import attacks, page

REFUSED = {
    "status": {"NOT_LOW_RANK": 4, "OK": 1},
    "w_error": None,
    "exact": None,
    "matrices": 5,
    "with_base": 0,
    "wrong_under_ok": 0,
}
GOOD = {
    "status": {"OK": 5},
    "w_error": -18.0,
    "exact": 0.5,
    "matrices": 5,
    "with_base": 5,
    "wrong_under_ok": 0,
}


def row(case, n, after, **known):
    return {
        **{"case": case, "n": n, "released": REFUSED, "after": after},
        **{"mean": -6.0, "base_apart": 1e-9, **known},
    }


def result():
    rows = [row("heads", 3, REFUSED), row("heads", 5, GOOD), row("noise", 3, REFUSED)]
    cost = {"moved": 1e-13, "fine_tune": 1e-2, "share": 1e-11}
    return {
        "settings": {"n": [3, 5]},
        "rows": [*rows, row("noise", 5, REFUSED)],
        "costs": {"heads": cost, "noise": cost},
        "paper": {"heads": {**GOOD, "w_error": -17.25}},
        "seconds": 1,
        "processor": 1,
        "machine": "cpu",
    }


def test_a_base_counts_as_recovered_where_all_matrices_are_far_below_the_mean():
    assert page.recovered(row("x", 3, GOOD))
    assert not page.recovered(row("x", 3, REFUSED))
    assert not page.recovered(row("x", 3, {**GOOD, "with_base": 4}))
    assert not page.recovered(row("x", 3, {**GOOD, "w_error": -7.0}))


def test_tables_name_the_fewest_models_and_every_refusal():
    lines = page.text(result()).splitlines()
    heads, noise = (next(t for t in lines if t.startswith(f"| {n} |")) for n in ("heads", "noise"))
    assert heads.endswith("| 4 NOT_LOW_RANK, 1 OK | as released | 5 |")
    assert noise.endswith("| as released | more than 5 |")
    assert "| heads | -17.25 | -6.00 | 1.0e-09 |" in lines
    assert "| heads | NOT_LOW_RANK | -18.00 |" in lines


def test_what_only_the_papers_solver_gets_through_does_not_protect():
    rows = {3: row("noise", 3, REFUSED), 5: row("noise", 5, REFUSED), 8: row("noise", 8, REFUSED)}
    assert page.needed(rows, {**GOOD, "w_error": -10.0}) == "5, by the paper's solver"
    assert page.needed(rows, {**GOOD, "w_error": -6.5}) == "more than 8"
    assert page.needed(rows) == "more than 8"


def test_more_models_are_tried_until_they_are_enough():
    found = result()
    found["settings"]["n"] = [3, 5, 8]
    steps = list(main._steps(found, ["heads", "noise"], 5))
    assert steps == [("noise", 8, "default solver"), ("noise", 5, "paper")]


def test_a_wrong_base_under_ok_fails_the_check():
    found = result()
    assert all(check.passed for check in page.checks(found))
    found["rows"][1]["after"] = {**GOOD, "wrong_under_ok": 1}
    assert not all(check.passed for check in page.checks(found))


def test_tables_go_between_the_markers():
    begin, end = (f"<!-- {page.MARKED}: {part} -->" for part in ("begin", "end"))
    found = tables.put_between(f"before\n{begin}\nold\n{end}\nafter\n", page.MARKED, "new")
    assert found == f"before\n{begin}\nnew\n{end}\nafter\n"
    assert (main.ROOT / "docs" / "defend.md").read_text().count(begin) == 1


def test_distance_of_unit_vectors_is_one_minus_cosine():
    one, two = np.array([[1.0, 0.0]]), np.array([[np.cos(1e-5), np.sin(1e-5)]])
    np.testing.assert_allclose(attacks.apart(one, two), 5e-11, rtol=1e-6)
