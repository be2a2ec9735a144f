import json
import shutil

import numpy as np
import pytest

from jdetune import pipeline
from jdetune.checkpoint import open_checkpoint, read_adapter, read_tensor, save_safetensors
from jdetune.checkpoint.pipeline_folder import component_view, components, is_pipeline
from jdetune.errors import InputError
from jdetune.verification import verify
from tests import pico, pico_pipeline


def run(truth, models, out, **options):
    chosen = pipeline.Options(**options)
    return pipeline.run(models, out, chosen, recover_fn=pico.truth_teller(truth))


def files(root):
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


def test_a_pipeline_is_one_checkpoint(tmp_path):
    truth = pico_pipeline.base()
    checkpoint = open_checkpoint(pico_pipeline.write(tmp_path / "a", truth, shards=2))
    assert is_pipeline(checkpoint)
    assert set(checkpoint.tensors) == set(truth)
    for name, value in truth.items():
        np.testing.assert_array_equal(read_tensor(checkpoint, name), value)
    assert components(checkpoint) == ("unet", "text_encoder", "vae")
    unet = component_view(checkpoint, "unet")
    assert unet.config == {"_class_name": "UNet2DConditionModel"}
    assert unet.files[1] == "diffusion_pytorch_model-00002-of-00002.safetensors"
    np.testing.assert_array_equal(read_tensor(unet, "conv_in.bias"), np.zeros(8))
    assert not is_pipeline(unet)


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_the_base_is_a_pipeline_again(tmp_path, variant):
    truth, models = pico_pipeline.family(tmp_path, variant=variant, shards=2)
    report = run(truth, models, tmp_path / "out")
    assert report["summary"]["exit_code"] == 0
    assert report["adapter_format"] == "diffusers"
    plain = pico_pipeline.write(tmp_path / "plain", truth, shards=2)
    assert files(tmp_path / "out" / "base") == files(plain) | {"README.md"}
    base = open_checkpoint(tmp_path / "out" / "base")
    for name, value in truth.items():
        np.testing.assert_array_equal(read_tensor(base, name), value)
    index = tmp_path / "out/base/unet/diffusion_pytorch_model.safetensors.index.json"
    written = json.loads(index.read_text())
    assert written["weight_map"] == {
        n: i.file for n, i in component_view(base, "unet").tensors.items()
    }
    sizes = [v.nbytes for n, v in truth.items() if n.startswith("unet")]
    assert written["metadata"]["total_size"] == sum(sizes)
    adapters = [p.name for p in sorted((tmp_path / "out" / "adapters").iterdir())]
    assert adapters == ["tune-0", "tune-1", "tune-2"]


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_verify_merges_every_format_again(tmp_path, form):
    truth, models = pico_pipeline.family(tmp_path)
    run(truth, models, tmp_path / "out", adapter_format=form)
    result = verify(tmp_path / "out")
    assert result["failures"] == []
    assert [m["tensors"] for m in result["models"]] == [len(truth)] * 3
    adapter = tmp_path / "out" / "adapters" / "tune-1"
    shutil.rmtree(adapter)
    shutil.copytree(tmp_path / "out" / "adapters" / "tune-0", adapter)
    if form == "kohya":
        (adapter / "tune-0.safetensors").rename(adapter / "tune-1.safetensors")
    off = verify(tmp_path / "out")["failures"]
    assert off == [f"tune-1: {name} is not given back by the merge" for name in off_names(truth)]


def off_names(truth):
    """Tensors that the wrong adapter changes, in the order of the files."""
    order = ["unet/", "text_encoder/", "vae/"]
    return sorted(pico_pipeline.TUNED, key=lambda n: (order.index(n.partition("/")[0] + "/"), n))


def test_peft_keeps_whole_what_differs_and_names_its_base(tmp_path):
    truth, models = pico_pipeline.family(tmp_path)
    for i, path in enumerate(models):
        tensors = {**pico_pipeline.tuned(truth, i), "unet/conv_in.bias": np.full(8, i, np.float32)}
        shutil.rmtree(path)
        pico_pipeline.write(path, tensors)
    report = run(truth, models, tmp_path / "peft", adapter_format="peft")
    assert report["summary"]["exit_code"] == 5
    unet = tmp_path / "peft" / "adapters" / "tune-2" / "unet"
    adapter = read_adapter(unet)
    np.testing.assert_array_equal(adapter.saved["conv_in.bias"], np.full(8, 2))
    assert adapter.config["base_model_name_or_path"] == "../../../base/unet"
    assert "from diffusers import UNet2DConditionModel" in (unet / "README.md").read_text()
    assert not (unet.parent / "vae").exists()
    assert verify(tmp_path / "peft")["failures"] == []
    report = run(truth, models, tmp_path / "kohya", adapter_format="kohya")
    entry = next(t for t in report["tensors"] if t["name"] == "unet/conv_in.bias")
    assert "a kohya file holds only low-rank updates of linear and convolutional" in entry["reason"]
    assert verify(tmp_path / "kohya")["failures"][0].startswith("tune-0: unet/conv_in.bias")


def test_a_voted_tensor_that_the_format_cannot_hold_is_said(tmp_path):
    truth, models = pico_pipeline.family(tmp_path)
    shutil.rmtree(models[0])
    odd = {
        **pico_pipeline.tuned(truth, 0),
        "unet/conv_in.bias": np.ones(8, "f4"),
    }
    pico_pipeline.write(models[0], odd)
    said = run(truth, models, tmp_path / "a", adapter_format="diffusers")["warnings"]
    assert any("not so tune-0, whose adapters leave theirs out" in text for text in said)
    said = run(truth, models, tmp_path / "b", adapter_format="peft")["warnings"]
    assert any("not so tune-0, whose adapters keep their own" in text for text in said)


def test_what_only_the_majority_holds_goes_into_its_own_component(tmp_path):
    truth, models = pico_pipeline.family(tmp_path)
    (models[0] / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    lacking = {n.removeprefix("unet/"): v for n, v in pico_pipeline.tuned(truth, 0).items()}
    lacking = {n: v for n, v in lacking.items() if "/" not in n and n != "conv_in.bias"}
    save_safetensors(models[0] / "unet" / "diffusion_pytorch_model.safetensors", lacking)
    shutil.rmtree(models[0] / "vae")
    index = json.loads((models[0] / "model_index.json").read_text()) | {"vae": [None, None]}
    (models[0] / "model_index.json").write_text(json.dumps(index))
    run(truth, models, tmp_path / "out")
    unet = open_checkpoint(tmp_path / "out" / "base" / "unet")
    np.testing.assert_array_equal(read_tensor(unet, "conv_in.bias"), np.zeros(8))
    vae = tmp_path / "out" / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    assert set(open_checkpoint(vae).tensors) == {"decoder.conv_in.weight"}


def test_pipelines_that_cannot_be_read(tmp_path):
    root = pico_pipeline.write(tmp_path / "a", pico_pipeline.base())
    index = root / "model_index.json"
    good = json.loads(index.read_text())
    index.write_text(json.dumps(good | {"../evil": ["x", "Y"]}))
    with pytest.raises(InputError, match="'../evil' is not a plain folder name"):
        open_checkpoint(root)
    index.write_text(json.dumps(good | {"text_encoder_2": ["x", "Y"]}))
    with pytest.raises(InputError, match=r"named in model_index.json but missing.*\[null, null\]"):
        open_checkpoint(root)
    index.write_text(json.dumps(good))
    weights = root / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(root / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(
        InputError, match=r"diffusion_pytorch_model.bin.*pickled weights are refused"
    ):
        open_checkpoint(root)
    index.write_text(json.dumps({"scheduler": ["x", "Y"]}))
    with pytest.raises(InputError, match="no component with weights"):
        open_checkpoint(root)


def test_links_that_lead_out_are_refused_but_for_the_hubs_cache(tmp_path):
    cache = tmp_path / "models--a--b"
    root = pico_pipeline.write(cache / "snapshots" / "123", pico_pipeline.base())
    vocabulary = root / "tokenizer" / "vocab.json"
    (cache / "blobs").mkdir()
    vocabulary.rename(cache / "blobs" / "abc")
    vocabulary.symlink_to(cache / "blobs" / "abc")
    assert "tokenizer/vocab.json" in open_checkpoint(root).side_files
    vocabulary.unlink()
    (tmp_path / "secret.json").write_text("{}")
    vocabulary.symlink_to(tmp_path / "secret.json")
    with pytest.raises(InputError, match=r"vocab.json: links to .*secret.json, out of its folder"):
        open_checkpoint(root)
    vocabulary.unlink()
    (root / "scheduler").rename(tmp_path / "elsewhere")
    (root / "scheduler").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"scheduler: links to .*elsewhere, out of its folder"):
        open_checkpoint(root)


def test_a_model_in_an_unknown_format_is_not_passed_over(tmp_path):
    root = pico_pipeline.write(tmp_path / "a", pico_pipeline.base())
    weights = root / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(root / "unet" / "diffusion_flax_model.msgpack")
    with pytest.raises(InputError, match=r"unet: no safetensors weights in it"):
        open_checkpoint(root)
