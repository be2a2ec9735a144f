"""Adapters trained side by side: PEFT runs what is written, and a stopped run goes on."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from absl import app

from benchmarks import lora_cache, lora_data, train_loras
from benchmarks.lora_recipes import TRAININGS, Training
from jdetune import models
from tests.models import tiny

torch = tiny.torch
pytestmark = pytest.mark.interop

TARGETS = ("q_proj", "v_proj", "o_proj")
SFT = Training("smollm2", "sft", TARGETS, (2, 4), 6, 3, 3e-2, 10, count=3)
DPO = dataclasses.replace(SFT, kind="dpo", lr=1e-2, start="smollm2-sft", count=2)


def examples(subset, _model, index, _start_seed=None):
    """Answers that are the question's first token again and again."""
    rng = np.random.default_rng(index)
    asked = rng.integers(3, 9, (40, 1))
    ids = np.concatenate([rng.integers(3, 9, (40, 3)), np.repeat(asked, 4, 1)], 1).astype(np.int32)
    arrays = {"ids": ids, "mask": np.ones((40, 7), bool)}
    arrays["answered"] = np.broadcast_to(np.arange(7) >= 3, (40, 7))
    if subset.kind == "dpo":
        other = ids.copy()
        other[:, 4:] = rng.integers(20, 40, (40, 3))
        arrays = {name: np.stack([array, array], 1) for name, array in arrays.items()}
        arrays["ids"] = np.stack([ids, other], 1)
    return lora_data.Examples("again", "drawn", arrays, np.arange(0, 40, 8))


@pytest.fixture(scope="module")
def theirs():
    return tiny.theirs("llama", num_hidden_layers=1)


def stand_in(monkeypatch, theirs):
    """A tiny decoder in place of SmolLM2."""
    module, params = tiny.ours(theirs)
    modules = {path: path for path in models.linear_layers(module)}
    model = train_loras.Model(module, params, modules, None, "tiny")
    monkeypatch.setattr(train_loras, "load_model", lambda _: model)
    monkeypatch.setattr(train_loras, "examples", examples)
    monkeypatch.setitem(train_loras.AT_ONCE, "smollm2", 2)
    return module, params


@pytest.fixture
def patched(monkeypatch, theirs, tmp_path):
    """An empty cache, and the tiny decoder."""
    return tmp_path, *stand_in(monkeypatch, theirs)


@pytest.fixture(scope="module")
def trained(theirs, tmp_path_factory):
    """A cache with three adapters, trained once for all tests, and their recipes."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, theirs)
        cache = tmp_path_factory.mktemp("cache")
        return cache, train_loras.run("smollm2-sft", SFT, False, str(cache))


def copied(trained, cache):
    shutil.copytree(trained[0], cache, dirs_exist_ok=True)
    return cache / "lowra" / "smollm2-sft"


def stored(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_peft_runs_an_adapter_of_mixed_ranks_as_it_was_trained(trained, patched, theirs):
    peft = pytest.importorskip("peft")
    cache, recipes = trained
    _, module, params = patched
    folders = lora_cache.adapter_folders("smollm2-sft", cache, count=3)
    assert {rank for r in recipes for rank in r["ranks"]} == {2, 4}
    for folder, recipe in zip(folders, recipes, strict=True):
        lora = models.load_lora(module, folder)
        assert {len(f.a) for f in lora.values()} == set(recipe["ranks"])
        assert all(np.asarray(f.a).any(1).all() for f in lora.values())  # no padding is left
        assert all(np.asarray(f.b).any(0).all() and f.scaling == 1 for f in lora.values())
        ours = tiny.run(module, params, tiny.IDS, lora=lora).logits
        plain = tiny.run(module, params, tiny.IDS).logits
        assert np.abs(np.asarray(ours - plain)).max() > 0.1
        with tiny.warnings.catch_warnings():
            tiny.warnings.simplefilter("ignore")
            loaded = peft.PeftModel.from_pretrained(theirs, folder)
        with torch.no_grad():
            logits = loaded(input_ids=torch.tensor(tiny.IDS).long()).logits
        loaded.unload()
        tiny.close(ours, logits, 1e-4)


def test_the_loss_on_examples_kept_apart_falls(trained):
    _, recipes = trained
    for index, recipe in enumerate(recipes):
        assert recipe["loss_after"] < recipe["loss_before"] - 0.1
        assert (recipe["index"], recipe["seed"]) == (index, SFT.seed + index)


def test_what_is_there_is_not_trained_again(trained, patched, monkeypatch):
    cache = patched[0]
    folder = copied(trained, cache)
    before = {i: stored(folder / f"{i:02d}") for i in range(3)}
    for path in (folder / "01").iterdir():
        path.unlink()
    (folder / "01").rmdir()
    asked = []
    real = train_loras.train
    monkeypatch.setattr(train_loras, "train", lambda *a: (asked.extend(a[3]), real(*a))[1])
    told = train_loras.run("smollm2-sft", SFT, False, str(cache))
    assert asked == [1]
    assert [stored(folder / name) for name in ("00", "02")] == [before[0], before[2]]
    again = train_loras.run("smollm2-sft", SFT, False, str(cache))
    assert asked == [1]
    assert again == told
    # the one trained alone is the one that was trained beside another, but for rounding
    module = patched[1]
    alone = models.load_lora(module, folder / "01")
    beside = models.load_lora(module, trained[0] / "lowra" / "smollm2-sft" / "01")
    for path, pair in alone.items():
        np.testing.assert_allclose(pair.a, beside[path].a, atol=2e-3)
        np.testing.assert_allclose(pair.b, beside[path].b, atol=2e-3)


def test_a_run_that_stops_leaves_nothing_half_written(trained, patched, monkeypatch):
    cache = patched[0]
    real = train_loras.save_json

    def stops(path, value):
        if path.name == "recipe.json" and value["index"] == 1:
            raise KeyboardInterrupt
        real(path, value)

    monkeypatch.setattr(train_loras, "save_json", stops)
    with pytest.raises(KeyboardInterrupt):
        train_loras.run("smollm2-sft", SFT, False, str(cache))
    folder = cache / "lowra" / "smollm2-sft"
    assert [f.name for f in lora_cache.adapter_folders("smollm2-sft", cache)] == ["00"]
    assert not (folder / "01").exists()
    assert (folder / "01.part").exists()
    monkeypatch.setattr(train_loras, "save_json", real)
    told = train_loras.run("smollm2-sft", SFT, False, str(cache))
    assert [r["index"] for r in told] == [0, 1, 2]
    assert sorted(p.name for p in folder.iterdir()) == ["00", "01", "02"]


def test_another_recipe_beside_is_refused(trained, patched):
    cache = patched[0]
    copied(trained, cache)
    for change in ({"steps": 5}, {"seed": 11}, {"targets": ("q_proj",)}, {"rank": 2}):
        other = dataclasses.replace(SFT, **change)
        with pytest.raises(app.UsageError, match="choose another --cache"):
            train_loras.run("smollm2-sft", other, False, str(cache))


def test_preferences_go_on_from_the_answers(trained, patched):
    cache, module, _ = patched
    folder = copied(trained, cache)
    told = train_loras.run("smollm2-dpo", DPO, False, str(cache))
    for recipe in told:
        np.testing.assert_allclose(recipe["loss_before"], np.log(2), rtol=1e-5)
        assert recipe["loss_after"] < recipe["loss_before"] - 0.01
        name = f"{recipe['index']:02d}"
        first = models.load_lora(module, folder / name)
        last = models.load_lora(module, cache / "lowra" / "smollm2-dpo" / name)
        for path, pair in last.items():
            assert pair.a.shape == first[path].a.shape
            # near where it starts, and not there
            moved = np.abs(np.asarray(pair.a - first[path].a)).max()
            assert 0 < moved < np.abs(np.asarray(first[path].a)).max()


def test_preferences_of_another_rank_than_the_answers_are_refused(trained, patched):
    cache = patched[0]
    copied(trained, cache)
    other = dataclasses.replace(DPO, rank=3)
    with pytest.raises(app.UsageError, match=r"smollm2-sft.00 has ranks .*--rank"):
        train_loras.run("smollm2-dpo", other, False, str(cache))
    assert not (cache / "lowra" / "smollm2-dpo" / "00").exists()


def test_preferences_are_about_the_texts_that_the_start_was_tuned_on(monkeypatch):
    asked = []
    monkeypatch.setattr(lora_data, "questions", lambda seed, *_, **__: asked.append(seed))
    tokenizer = type("Tokenizer", (), {"eos_token_id": 1})()
    model = train_loras.Model(None, {}, {}, tokenizer, "tiny")
    for given in (None, 70):
        sft, dpo = (
            TRAININGS[name] if given is None else dataclasses.replace(TRAININGS[name], seed=given)
            for name in ("smollm2-sft", "smollm2-dpo")
        )
        train_loras.examples(sft, model, 4)
        train_loras.examples(dpo, model, 4, sft.seed + 4)
        assert asked[-1] == asked[-2] == sft.seed + 4


def test_preferences_say_when_the_answers_are_missing(patched):
    with pytest.raises(FileNotFoundError, match="train_loras --subset=smollm2-sft"):
        train_loras.run("smollm2-dpo", DPO, False, str(patched[0]))


def test_first_factors_differ_unless_one_init_is_asked_for(patched):
    module = patched[1]
    one = dataclasses.replace(SFT, rank=3, one_init=True)
    path = "model.layers.0.self_attn.q_proj"
    same, more = (train_loras.first_factors(one, module, i)[0][path].a for i in (0, 1))
    np.testing.assert_array_equal(same, more)
    own = dataclasses.replace(one, one_init=False)
    first, second = (train_loras.first_factors(own, module, i)[0][path].a for i in (0, 1))
    assert np.abs(np.asarray(first - second)).max() > 0.01


def test_every_subset_has_a_recipe_and_the_folder_of_quick_ones_is_apart(tmp_path):
    assert set(TRAININGS) == set(lora_cache.SUBSETS)
    names = list(TRAININGS)
    assert names.index("smollm2-sft") < names.index("smollm2-dpo")
    assert all(one.count == 15 for one in TRAININGS.values())
    full, quick = (lora_cache.subset_folder("dinov2", tmp_path, q) for q in (False, True))
    assert full != quick
    assert full.is_relative_to(tmp_path)
    assert quick.is_relative_to(tmp_path)
    recipe = tmp_path / "lowra" / "dinov2" / "00" / "recipe.json"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(json.dumps({}))
    assert len(lora_cache.adapter_folders("dinov2", tmp_path)) == 1
    with pytest.raises(FileNotFoundError, match="1 of 2"):
        lora_cache.adapter_folders("dinov2", tmp_path, count=2)
