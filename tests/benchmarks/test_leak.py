"""The tables of the attacks say what was measured."""

from pathlib import Path

from benchmarks.leak import attacks, report
from benchmarks.tables import put_between

NAMES = (attacks.MEAN, attacks.RIDGE, attacks.NEAREST, attacks.HONEST, attacks.SILENT,
         attacks.USUAL, attacks.RANDOM)  # fmt: skip


def score(hits, victims=4):
    share = [1.0] * hits + [0.0] * (victims - hits)
    names = ("top1", "top5", "in_class", "cosine", "error", "class_chance")
    return dict.fromkeys(names, share)


def result(best=3, kept=3):
    attack = dict.fromkeys(NAMES, score(1)) | {attacks.RANDOM: score(best)}
    after = {name: attack[name] for name in (attacks.RIDGE, attacks.SILENT, attacks.HONEST)}
    chain = {"scores": after | {attacks.RANDOM: score(kept)}, "not_recovered": 1, "layers": 12}
    chain |= {"w_error": -17.5, "update_error": 1e-7}
    seed = {"attack": attack, "chain": {"float32": chain, "bfloat16": chain}}
    return {"settings": {"held_out": 4}, "seeds": {"0": seed, "1": seed}}


def test_victims_of_all_seeds_are_pooled():
    found = report.tables(result())
    header, rows = found["Attacks on 8 unseen victims"]
    assert header[:2] == ["attack", "identity"]
    assert rows[0][1] == "25.0%"
    random = next(row for row in rows if row[0] == attacks.RANDOM)
    assert random[1].startswith("75.0% (")


def test_what_was_not_recovered_is_counted():
    _, rows = report.tables(result())["Merged models only"]
    assert [row[-1] for row in rows] == ["-", "2 of 24", "2 of 24"]


def test_checks_fail_where_a_target_is_missed():
    assert all(check.passed for check in report.checks(result()))
    assert not report.checks(result(best=1, kept=1))[0].passed
    assert not all(check.passed for check in report.checks(result(kept=2)))


def test_the_page_has_one_place_for_the_tables():
    page = Path(report.__file__).parents[2] / "docs" / "leak.md"
    assert "new" in put_between(page.read_text(), "measured", "new")
