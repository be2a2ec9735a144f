import json

import numpy as np
import pytest

from jdetune.checkpoint import (
    load_adapter,
    merge_peft,
    open_checkpoint,
    read_adapter,
    save_safetensors,
    write_adapter,
)
from jdetune.errors import InputError
from tests import pico

ZERO = np.zeros((6, 4), np.float32)


def factors(seed, rank, shape=(6, 4)):
    return pico.pair(np.random.default_rng(seed), shape, rank)


def checkpoint(tmp_path, names, **config):
    return open_checkpoint(pico.write(tmp_path / "m", dict.fromkeys(names, ZERO), **config))


def config_of(path):
    return json.loads((path / "adapter_config.json").read_text())


def test_written_factors_come_back(tmp_path):
    model = checkpoint(tmp_path, ["a.q.weight", "b.q.weight", "b.k.weight"])
    wanted = {"a.q.weight": factors(0, 3), "b.k.weight": factors(1, 1)}
    written = write_adapter(tmp_path / "x", {**wanted, "b.q.weight": factors(2, 0)}, model)
    assert written.targets == tuple(wanted)
    found = load_adapter(tmp_path / "x")
    assert set(found) == set(wanted)
    for name, (left, right) in wanted.items():
        np.testing.assert_array_equal(found[name][0], left)
        np.testing.assert_array_equal(found[name][1], right)


def test_config_has_ranks_and_targets(tmp_path):
    model = checkpoint(tmp_path, ["a.q.weight", "b.q.weight", "a.k.weight", "b.k.weight"])
    given = {"a.q.weight": factors(0, 3), "b.q.weight": factors(1, 2), "b.k.weight": factors(2, 1)}
    write_adapter(tmp_path / "x", given, model)
    found = config_of(tmp_path / "x")
    assert found["r"] == found["lora_alpha"] == 3
    assert found["rank_pattern"] == found["alpha_pattern"] == {"b.q": 2, "b.k": 1}
    assert found["target_modules"] == ["b.k", "q"]
    assert found["base_model_name_or_path"] == "../../base"
    assert found["peft_type"] == "LORA"
    assert not found["fan_in_fan_out"]
    assert "base_model: ../../base" in (tmp_path / "x" / "README.md").read_text()


def test_a_leaf_that_also_names_a_container_is_not_used(tmp_path):
    model = checkpoint(tmp_path, ["a.output.weight", "b.output.dense.weight"])
    write_adapter(tmp_path / "x", {"a.output.weight": factors(0, 1)}, model)
    assert config_of(tmp_path / "x")["target_modules"] == ["a.output"]


def test_a_path_that_ends_another_is_anchored(tmp_path):
    model = checkpoint(tmp_path, ["q.weight", "x.q.weight"])
    given = {"q.weight": factors(0, 1), "x.q.weight": factors(1, 2)}
    write_adapter(tmp_path / "x", given, model)
    assert config_of(tmp_path / "x")["rank_pattern"] == {"^q": 1}
    assert {n: u.scaling for n, u in read_adapter(tmp_path / "x").updates.items()} == {
        "q.weight": 1.0,
        "x.q.weight": 1.0,
    }


@pytest.mark.parametrize(
    ("name", "config", "keys", "fan"),
    [
        ("e.word_embeddings.weight", {}, ("lora_embedding_A", "lora_embedding_B"), False),
        ("h.0.c_attn.weight", {"model_type": "gpt2"}, ("lora_A.weight", "lora_B.weight"), True),
    ],
)
def test_embeddings_and_conv1d_are_transposed(tmp_path, name, config, keys, fan):
    from safetensors.numpy import load_file

    model = checkpoint(tmp_path, [name], **config)
    left, right = factors(0, 2)
    write_adapter(tmp_path / "x", {name: (left, right)}, model)
    stored = load_file(tmp_path / "x" / "adapter_model.safetensors")
    root = "base_model.model." + name.removesuffix("weight")
    np.testing.assert_array_equal(stored[root + keys[0]], left.T)
    np.testing.assert_array_equal(stored[root + keys[1]], right.T)
    assert config_of(tmp_path / "x")["fan_in_fan_out"] is fan
    np.testing.assert_array_equal(load_adapter(tmp_path / "x")[name][0], left)


def test_per_model_tensors_are_kept_whole_with_their_module(tmp_path):
    names = ["a.q.weight", "head.weight", "head.bias"]
    model = checkpoint(tmp_path, names)
    given = {"a.q.weight": factors(0, 1), "head.weight": factors(1, 1)}
    written = write_adapter(tmp_path / "x", given, model, per_model=("head.bias",))
    assert set(written.saved) == {"head.weight", "head.bias"}
    adapter = read_adapter(tmp_path / "x")
    assert set(adapter.saved) == {"head.weight", "head.bias"}
    assert set(adapter.updates) == {"a.q.weight"}
    assert config_of(tmp_path / "x")["modules_to_save"] == ["head"]


def test_bare_parameters_are_said_to_be_left_out(tmp_path):
    model = checkpoint(tmp_path, ["a.q.weight", "table"])
    given = {"a.q.weight": factors(0, 1), "table": factors(1, 1)}
    assert write_adapter(tmp_path / "x", given, model).left_out == ("table",)


@pytest.mark.parametrize(
    ("change", "scaling"),
    [
        ({}, 2.0),
        ({"alpha_pattern": {"b.q": 12, "q": 1}}, 6.0),
        ({"alpha_pattern": {r"b\.q": 6}, "use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"x": 12}}, 2.0),
    ],
)
def test_scale_follows_the_config(tmp_path, change, scaling):
    left, right = factors(0, 2)
    save_safetensors(
        tmp_path / "x" / "adapter_model.safetensors",
        {
            "base_model.model.b.q.lora_A.weight": right,
            "base_model.model.b.q.lora_B.weight": left,
        },
    )
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 4, "rank_pattern": {"q": 2}, **change}
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config))
    found, _ = load_adapter(tmp_path / "x")["b.q.weight"]
    np.testing.assert_array_equal(found, left * np.float32(scaling))


def test_dora_is_refused(tmp_path):
    model = checkpoint(tmp_path, ["a.q.weight"])
    write_adapter(tmp_path / "x", {"a.q.weight": factors(0, 1)}, model)
    config = {**config_of(tmp_path / "x"), "use_dora": True}
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="DoRA"):
        load_adapter(tmp_path / "x")


@pytest.mark.parametrize(
    "change",
    [
        *({"target_parameters": [0]}, {"target_parameters": {"a": 1}}, {"target_parameters": "a"}),
        *({"r": "8"}, {"r": None}, {"lora_alpha": [1]}, {"rank_pattern": {"q": "2"}}),
        {"target_parameters": ["a.q"], "r": 0},
    ],
)
def test_configs_of_other_types_are_refused(tmp_path, change):
    model = checkpoint(tmp_path, ["a.q.weight"])
    write_adapter(tmp_path / "x", {"a.q.weight": factors(0, 1)}, model)
    if change.get("r") == 0:  # named as factors of a stack are
        arrays = {"base_model.model.a.lora_A.weight": factors(0, 2)[1]}
        arrays["base_model.model.a.lora_B.weight"] = factors(0, 2)[0]
        save_safetensors(tmp_path / "x" / "adapter_model.safetensors", arrays)
    config = {**config_of(tmp_path / "x"), **change}
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is no number|list of names|do not fit rank"):
        read_adapter(tmp_path / "x")


def test_merge_scales_after_the_product_and_rounds_once():
    base = np.array([[1.0, 2.0]], np.float16)
    left, right = np.array([[0.1]], np.float32), np.array([[0.3, 0.7]], np.float32)
    update = np.float32(0.3) * (np.float32(0.1) * right)
    expected = (base.astype(np.float32) + update).astype(np.float16)
    np.testing.assert_array_equal(merge_peft(base, left, right, 0.3), expected)
    assert merge_peft(base, left, right).dtype == np.float16


def test_a_model_equal_to_the_base_gets_a_target_of_zeros(tmp_path):
    model = checkpoint(tmp_path, ["a.q.weight", "b.q.weight"])
    write_adapter(tmp_path / "x", {"a.q.weight": factors(0, 0), "b.q.weight": factors(1, 0)}, model)
    assert config_of(tmp_path / "x")["target_modules"] == ["a.q"]
    left, right = load_adapter(tmp_path / "x")["a.q.weight"]
    assert left.shape == (6, 1)
    assert not (left @ right).any()
