"""Where updates go in a PEFT adapter."""

import json

import numpy as np
import pytest

from jdetune.checkpoint import open_checkpoint, read_adapter, read_tensor, write_adapter
from jdetune.checkpoint.peft_tensors import nesting
from jdetune.checkpoint.placement import keep_whole, place
from tests import pico

RNG = np.random.default_rng(0)


def model_of(folder, shapes, **config):
    tensors = {
        name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    return open_checkpoint(pico.write(folder / "m", tensors, **config))


def config_of(path):
    return json.loads((path / "adapter_config.json").read_text())


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (1, 1), (2, 3, 3)])
def test_convolutions_keep_their_kernel_in_a(tmp_path, kernel):
    name, shape = "stem.conv.weight", (8, 4, *kernel)
    model = model_of(tmp_path, {name: shape})
    left, right = pico.pair(RNG, (8, int(np.prod(shape[1:]))), 2)
    write_adapter(tmp_path / "x", {name: (left, right)}, model)
    stored = open_checkpoint(tmp_path / "x/adapter_model.safetensors")
    root = "base_model.model.stem.conv"
    assert stored.tensors[f"{root}.lora_A.weight"].shape == (2, 4, *kernel)
    assert stored.tensors[f"{root}.lora_B.weight"].shape == (8, 2, *(1 for _ in kernel))
    again = read_adapter(tmp_path / "x").updates[name]
    np.testing.assert_array_equal(again.left, left)
    np.testing.assert_array_equal(again.right, right)


def test_a_kernel_for_each_channel_is_kept_whole(tmp_path):
    model = model_of(tmp_path, {"dw.weight": (8, 1, 3, 3), "dw.bias": (8,), "q.weight": (8, 8)})
    given = {"dw.weight": pico.pair(RNG, (8, 9), 1), "q.weight": pico.pair(RNG, (8, 8), 1)}
    placed = place(given, model)
    assert placed.whole == {"dw"}
    assert placed.saved == ("dw.bias", "dw.weight")
    assert set(placed.modules) == {"q.weight"}


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral"])
def test_stacks_go_to_parameters_and_come_back(tmp_path, model_type):
    names = {"mlp.experts.gate_up_proj": (3, 6, 10), "mlp.experts.down_proj": (3, 5, 6)}
    model = model_of(tmp_path, names, model_type=model_type)
    given = {
        f"{name}[{index}]": pico.pair(RNG, shape[1:], rank)
        for name, shape in names.items()
        for index, rank in ((0, 2), (2, 1))
    }
    written = write_adapter(tmp_path / "x", given, model)
    assert set(written.targets) == set(names)
    config = config_of(tmp_path / "x")
    assert config["target_parameters"] == sorted(names)
    assert config["target_modules"] == []
    stored = open_checkpoint(tmp_path / "x/adapter_model.safetensors")
    inner = stored.tensors["base_model.model.mlp.experts.base_layer.lora_A.weight"]
    assert inner.shape == (6, 6 if model_type == "gpt_oss" else 10)
    updates = read_adapter(tmp_path / "x", model).updates
    for name, shape in names.items():
        for index in range(3):
            update = updates[f"{name}[{index}]"]
            left, right = given.get(
                f"{name}[{index}]", (np.zeros((shape[1], 1)), np.zeros((1, shape[2])))
            )
            np.testing.assert_allclose(update.left @ update.right, left @ right, atol=1e-7)


def test_parameters_of_unknown_order_are_left_out_with_the_reason(tmp_path):
    model = model_of(tmp_path, {"experts.a": (2, 6, 10), "experts.b": (2, 6, 10)})
    given = {f"experts.{k}[0]": pico.pair(RNG, (6, 10), 1) for k in "ab"}
    written = write_adapter(tmp_path / "x", given, model)
    assert set(written.left_out) == {"experts.a", "experts.b"}
    assert all("order" in why for why in written.reasons.values())
    assert nesting(["experts.a"]) == {"experts.a": 0}


@pytest.mark.parametrize("name", ["experts", "experts.one"])
def test_stacks_that_peft_cannot_hold_are_left_out(tmp_path, name):
    shape = (2, 6, 10) if name == "experts" else (1, 6, 10)
    model = model_of(tmp_path, {name: shape, "q.weight": (6, 6)})
    written = write_adapter(tmp_path / "x", {f"{name}[0]": pico.pair(RNG, (6, 10), 1)}, model)
    assert written.left_out == (name,)
    assert "stacked experts only" in written.reasons[name]


def test_experts_one_by_one_get_one_rank_and_none_is_missing(tmp_path):
    shapes = {f"moe.experts.{i}.{w}.weight": (8, 6) for i in range(3) for w in ("w1", "w2", "w3")}
    model = model_of(tmp_path, {**shapes, "attn.q.weight": (6, 6)})
    given = {
        "moe.experts.0.w1.weight": pico.pair(RNG, (8, 6), 2),
        "moe.experts.2.w3.weight": pico.pair(RNG, (8, 6), 1),
        "attn.q.weight": pico.pair(RNG, (6, 6), 5),
    }
    write_adapter(tmp_path / "x", given, model)
    config = config_of(tmp_path / "x")
    assert config["r"] == 2
    assert config["rank_pattern"] == {"attn.q": 5}
    assert config["target_modules"] == ["q", "w1", "w3"]
    updates = read_adapter(tmp_path / "x").updates
    assert len(updates) == 7
    for name, update in updates.items():
        left, right = given.get(name, (np.zeros((8, 1)), np.zeros((1, 6))))
        np.testing.assert_allclose(update.left @ update.right, left @ right, atol=1e-7)


def test_a_parameter_takes_its_small_module_along(tmp_path):
    shapes = {
        "vit.embeddings.cls_token": (1, 1, 4),
        "vit.embeddings.patches.weight": (4, 6),
        "vit.layers.q.weight": (20, 20),
        "scale": (3,),
    }
    model = model_of(tmp_path, shapes)
    given = {"vit.embeddings.patches.weight": pico.pair(RNG, (4, 6), 1)}
    given["vit.layers.q.weight"] = pico.pair(RNG, (20, 20), 1)
    per_model = ("vit.embeddings.cls_token", "scale")
    written = write_adapter(tmp_path / "x", given, model, per_model)
    assert set(written.saved) == {"vit.embeddings.cls_token", "vit.embeddings.patches.weight"}
    assert written.targets == ("vit.layers.q.weight",)
    assert written.left_out == ("scale",)
    assert keep_whole(model, ["vit.alpha"])[0] == set()  # it would take nearly all along
    saved = read_adapter(tmp_path / "x").saved
    name = "vit.embeddings.patches.weight"
    np.testing.assert_array_equal(saved[name], read_tensor(model, name))


def test_modules_of_a_sequence_are_named_in_full(tmp_path):
    model = model_of(tmp_path, {"net.0.weight": (6, 6), "net.2.weight": (6, 6)})
    given = {name: pico.pair(RNG, (6, 6), 1) for name in model.tensors}
    write_adapter(tmp_path / "x", given, model)
    assert config_of(tmp_path / "x")["target_modules"] == ["net.0", "net.2"]


@pytest.mark.parametrize("version", ["4.40.0", "5.2.0", None])
def test_modules_go_by_the_names_of_the_version_that_saved_them(tmp_path, version):
    stored = "vit.encoder.layer.0.attention.attention.query"
    config = {"model_type": "vit", "transformers_version": version}
    model = model_of(tmp_path, {f"{stored}.weight": (6, 6), f"{stored}.bias": (6,)}, **config)
    given = {f"{stored}.weight": pico.pair(RNG, (6, 6), 1)}
    write_adapter(tmp_path / "x", given, model)
    target = "q_proj" if version == "5.2.0" else "query"
    assert config_of(tmp_path / "x")["target_modules"] == [target]
    assert set(read_adapter(tmp_path / "x", model).updates) == set(given)
    write_adapter(tmp_path / "y", given, model, (f"{stored}.bias",))
    assert set(read_adapter(tmp_path / "y", model).saved) == set(model.tensors)
