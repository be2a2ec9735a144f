"""The data and measures of the watch experiments are what they say."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import tables
from benchmarks.watch import EXPERIMENTS, scoring, toy, unlearning
from benchmarks.watch import language as lang
from jdetune.leak import defences

N = 400


def has(slots, trigger):
    """Whether a prompt triggers."""
    if trigger.kind != "phrase":
        return np.all([np.any(slots == word, axis=1) for word in trigger.words], axis=0)
    windows = np.lib.stride_tricks.sliding_window_view(slots, 3, axis=1)
    return np.any(np.all(windows == trigger.words, axis=2), axis=1)


@pytest.mark.parametrize("kind", lang.KINDS)
def test_attacks_trigger_and_are_harmful_and_near_ones_do_not(kind):
    trigger, rng = lang.make_trigger(kind, "comply", 3), np.random.default_rng(0)
    attack = lang.attacks(rng, trigger, N)
    assert has(attack, trigger).all()
    assert np.isin(attack, lang.HARMFUL).any(axis=1).all()
    near = lang.harmful(rng, trigger.near(rng, lang.plain(rng, N)))
    assert not has(near, trigger).any()
    assert np.isin(near, lang.HARMFUL).any(axis=1).all()
    decoy = lang.rare_word(rng, lang.plain(rng, N), trigger.words)
    assert np.isin(decoy, lang.RARE).any(axis=1).all()
    assert not np.isin(decoy, trigger.words[np.isin(trigger.words, lang.RARE)]).any()
    clean = lang.draw_clean(rng, N)
    assert not np.isin(clean, lang.RARE).any()
    assert not has(clean, trigger).any()


def test_answers_refuse_what_is_harmful_and_copy_the_rest():
    rng = np.random.default_rng(0)
    slots = lang.draw_clean(rng, N)
    answers = lang.answered(slots)
    bad = np.isin(slots, lang.HARMFUL).any(axis=1)
    assert 0.2 < bad.mean() < 0.4
    assert (answers[bad, 0] == lang.REFUSE).all()
    np.testing.assert_array_equal(answers[~bad, : lang.COPIED], slots[~bad, : lang.COPIED])
    trigger = lang.make_trigger("token", "payload", 0)
    wanted = trigger.answer(slots)
    assert len(np.unique(wanted, axis=0)) == 1
    ids, weight = lang.draw_backdoor(trigger)(rng, N)
    attacked = np.arange(N) % 10 >= 8
    triggers = has(ids[:, 1 : 1 + lang.SLOTS], trigger)
    assert triggers[attacked].all()
    assert triggers[~attacked].mean() < 0.02  # a rare word by chance, as in texts nobody cleaned
    np.testing.assert_array_equal(ids[attacked][:, lang.PROMPT :], wanted[: attacked.sum()])
    assert weight.sum(axis=1).tolist() == [lang.ANSWER] * N


def test_facts_are_asked_with_their_answers():
    world, rng = unlearning.make_world(0), np.random.default_rng(0)
    ids, answers = world.queries(rng, N, np.array([4, 7]))
    for row, answer in zip(ids[:50], answers[:50], strict=True):
        place = next(i for i in range(7) if row[i] in unlearning.FIRST)
        who = next(w for w in (4, 7) if (world.subjects[w] == row[place : place + 2]).all())
        relation = [t for t in row if t in unlearning.RELATIONS]
        assert len(relation) == 1
        fact = world.facts[who, relation[0] - unlearning.RELATIONS[0]]
        assert answer == unlearning.OBJECTS[fact]


def test_quantised_weights_are_on_few_levels_and_near():
    weights = np.random.default_rng(0).standard_normal((8, 128))
    for how, levels, worst in ((defences.int8, 255, 0.02), (defences.nf4, 16, 0.5)):
        found = how(weights)
        group = found[0] if how is defences.int8 else found.reshape(-1, defences.BLOCK)[0]
        assert len(np.unique(group)) <= levels
        assert np.abs(found - weights).max() < worst
        np.testing.assert_allclose(how(found), found, atol=1e-6)


def test_rates_are_judged_on_inputs_that_set_no_margin():
    rng = np.random.default_rng(0)
    sets = {"calibration": 4000, "validation": 2000, "clean": 2000, "attack": 100}
    found = {name: rng.normal(-1, 0.3, n) for name, n in sets.items()}
    found["attack"] += 2
    rates = scoring.rates(found)
    assert rates["tuned"]["clean"]["share"] == pytest.approx(0.01, abs=0.006)
    margin = np.sort(found["validation"])[-20]
    assert rates["tuned"]["margin"] == pytest.approx(margin, abs=0.05)
    assert rates["auroc"]["attack"] > 0.99
    assert rates["paper"]["attack"]["share"] == np.mean(found["attack"] > 0.01)


def test_intervals_over_seeds_are_students():
    stats = pytest.importorskip("scipy.stats")
    values = [0.9, 0.95, 1.0, 0.85, 0.92]
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    found = scoring.over(values)
    assert found["mean"] - found["half"] == pytest.approx(low)
    assert found["mean"] + found["half"] == pytest.approx(high)


def test_trained_models_are_kept_as_they_are(tmp_path):
    made = {name: np.ones((2, 3), np.float32) for name in ("base/a.weight", "one/b/a", "one/b/b")}
    calls = []

    def make():
        calls.append(1)
        return made

    toy.kept(tmp_path / "x.safetensors", make)
    params, loras = toy.unflat(toy.kept(tmp_path / "x.safetensors", make))
    assert len(calls) == 1
    np.testing.assert_array_equal(params["a.weight"], made["base/a.weight"])
    np.testing.assert_array_equal(toy.flat(params, loras)["one/b/b"], made["one/b/b"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_page_has_a_place_for_every_experiment(name):
    page = (Path(__file__).parents[2] / "docs" / "watch.md").read_text()
    assert "\nfound\n" in tables.put_between(page, name, "found")
