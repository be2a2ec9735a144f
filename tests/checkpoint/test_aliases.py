"""Names that differ by prefixes are matched one to one, or not at all."""

import pytest

from jdetune.checkpoint import open_checkpoint, read_tensor
from jdetune.checkpoint.aliases import align_names, match_names
from tests import family_zoo as zoo
from tests import pico

LAYERS = [f"layers.{i}.{part}.weight" for i in range(3) for part in "qkv"]


def headers(names, shape=(2, 2)):
    return {name: zoo.info(name, *shape) for name in names}


def under(prefix, names=LAYERS):
    return [prefix + name for name in names]


@pytest.mark.parametrize(
    ("own", "wanted", "rules"),
    [
        (LAYERS[::-1], LAYERS, []),
        (under("module."), LAYERS, [("module.", "")]),
        (LAYERS, under("transformer."), [("", "transformer.")]),
        (
            under("module.model."),
            under("base_model.model.model."),
            [("module.", "base_model.model.")],
        ),
        (
            under("base_model.model.model.") + ["base_model.model.lm_head.weight"],
            under("model.") + ["lm_head.weight"],
            [("base_model.model.", "")],
        ),
        (under("bert.") + ["head.out.weight"], LAYERS + ["head.out.weight"], [("bert.", "")]),
        (
            LAYERS + ["norm.weight"],
            under("model.") + ["model.norm.weight", "model.layers.0.norm.weight"],
            [("", "model.")],
        ),
    ],
)
def test_prefixes_are_matched(own, wanted, rules):
    names, found, unclear = match_names(headers(own), headers(wanted))
    assert (found, unclear) == (rules, None)
    assert sorted(names) == sorted(own)
    assert len(set(names.values())) == len(own)
    assert set(names.values()) <= set(wanted)
    for old, new in names.items():
        assert old.split(".")[-2:] == new.split(".")[-2:]


def test_two_parts_with_prefixes_of_their_own():
    own = under("text.") + ["vision.a.weight", "vision.b.weight"]
    wanted = under("model.text.") + ["vision_tower.vision.a.weight", "vision_tower.vision.b.weight"]
    names, rules, unclear = match_names(headers(own), headers(wanted))
    assert set(names.values()) == set(wanted)
    assert rules == [("", "model."), ("", "vision_tower.")]
    assert unclear is None


def test_two_ways_are_none():
    names, rules, unclear = match_names(
        headers(LAYERS), headers(under("encoder.") + under("decoder."))
    )
    assert all(old == new for old, new in names.items())
    assert rules == []
    assert unclear is not None
    assert "encoder." in unclear
    assert "decoder." in unclear


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        (["pooler.dense.weight", "pooler.dense.bias"], ["head.dense.weight", "head.dense.bias"]),
        (["score.weight"], ["lm_head.weight"]),
        (["weight"], ["model.weight"]),
    ],
)
def test_other_modules_of_a_like_ending_are_not_matched(own, wanted):
    names, rules, _ = match_names(headers(own + LAYERS), headers(wanted + LAYERS))
    assert rules == []
    assert all(old == new for old, new in names.items())


def test_shapes_that_contradict_undo_a_match():
    own, wanted = headers(under("module."), (2, 3)), headers(LAYERS, (2, 4))
    assert match_names(own, wanted)[1] == []
    wider = headers(LAYERS, (5, 3))  # rows may differ: a vocabulary
    assert match_names(own, wider)[1] == [("module.", "")]


def test_what_peft_wraps_goes_by_its_own_name(tmp_path):
    family = pico.make(tmp_path / "f")
    name = "encoder.layer.0.query.weight"
    wrapped = {f"base_model.model.{n}": value for n, value in family.models[1].items()}
    key = "base_model.model.encoder.layer.0.query"
    wrapped[f"{key}.base_layer.weight"] = wrapped.pop(f"{key}.weight")
    wrapped[f"{key}.lora_A.default.weight"] = family.factors[1][name][1]
    path = pico.write(tmp_path / "wrapped", wrapped)
    models, notes = align_names([open_checkpoint(family.paths[0]), open_checkpoint(path)])
    assert set(models[0].tensors) < set(models[1].tensors)
    found = read_tensor(models[1], name)
    assert found.tobytes() == family.models[1][name].tobytes()
    assert "without base_model.model." in notes[0]
    assert "still holds LoRA factors" in notes[1]


def test_two_copies_of_one_name_stay_apart():
    own = headers(["a.q.base_layer.weight", "a.q.weight"])
    names, rules, _ = match_names(own, headers(["a.q.weight"]))
    assert names == {"a.q.base_layer.weight": "a.q.base_layer.weight", "a.q.weight": "a.q.weight"}
    assert rules == []
