import json

import numpy as np
import pytest

from jdetune.checkpoint import open_checkpoint, read_adapter, save_safetensors, stream
from jdetune.checkpoint.adapter_formats import FORMATS, choose_format, read_as, write_as
from jdetune.checkpoint.diffusers_lora import WEIGHTS_NAME
from jdetune.errors import InputError, OutputError
from tests import pico, pico_pipeline


def bert(root):
    return open_checkpoint(pico.make(root).paths[0])


def image_pipeline(root, seed=0):
    return open_checkpoint(pico_pipeline.write(root / "pipe", pico_pipeline.base(seed)))


def single(root, name="model.diffusion_model.input_blocks.1.1.attn.to_q.weight"):
    save_safetensors(root / "sd.safetensors", {name: np.ones((8, 4), np.float32)})
    return open_checkpoint(root / "sd.safetensors")


def transformer(root):
    config = {"_class_name": "FluxTransformer2DModel", "architectures": None}
    tensors = {"transformer_blocks.0.attn.to_q.weight": np.ones((8, 4), np.float32)}
    return open_checkpoint(pico.write(root / "flux", tensors, **config))


@pytest.mark.parametrize(
    ("make", "chosen"),
    [
        (bert, "peft"),
        (image_pipeline, "diffusers"),
        (single, "kohya"),
        (transformer, "diffusers"),
        (lambda root: open_checkpoint(image_pipeline(root).root / "vae"), "peft"),
        (lambda root: open_checkpoint(image_pipeline(root).root / "text_encoder"), "peft"),
    ],
)
def test_auto(tmp_path, make, chosen):
    assert choose_format("auto", make(tmp_path)) == chosen
    assert choose_format("none", make(tmp_path / "again")) == "none"


@pytest.mark.parametrize(
    ("make", "wanted", "instead"),
    [
        (bert, "kohya", "peft or none"),
        (bert, "diffusers", "peft or none"),
        (single, "peft", "diffusers, kohya or none"),
        (transformer, "kohya", "peft, diffusers or none"),
        (lambda root: single(root, "joint_blocks.0.x.weight"), "diffusers", "kohya or none"),
    ],
)
def test_formats_without_names_are_refused(tmp_path, make, wanted, instead):
    with pytest.raises(OutputError, match=f"--adapter_format={wanted}: .*Choose {instead}."):
        choose_format(wanted, make(tmp_path))


def test_unknown_formats_are_a_programming_error(tmp_path):
    with pytest.raises(ValueError, match=", ".join(FORMATS)):
        choose_format("lycoris", bert(tmp_path))


def factors(*names, rank=2):
    rng = np.random.default_rng(0)
    return {name: pico.pair(rng, pico_pipeline.SHAPE, rank) for name in names}


def test_diffusers_config_in_the_header(tmp_path):
    checkpoint = image_pipeline(tmp_path)
    query, key = (f"unet/{name}" for name in pico_pipeline.UNET)
    text = f"text_encoder/{pico_pipeline.TEXT}"
    given = {**factors(query), **factors(key, rank=3), **factors(text, rank=4)}
    files = write_as("diffusers", tmp_path / "m", given, checkpoint)
    arrays, header = stream.open_tensors(files.path / WEIGHTS_NAME)
    assert f"unet.{query[5:-7]}.lora_A.weight" in arrays
    assert arrays[f"text_encoder.{pico_pipeline.TEXT[:-7]}.lora_B.weight"].shape == (48, 4)
    config = json.loads(header["lora_adapter_metadata"])
    assert config["unet.r"] == config["unet.lora_alpha"] == 3
    assert config["unet.rank_pattern"] == config["unet.alpha_pattern"] == {query[5:-7]: 2}
    assert config["unet.target_modules"] == ["to_k", "to_q"]
    assert config["text_encoder.r"] == 4
    # paths end those of old and new transformers; the output has a rank of zeros for the loader
    assert config["text_encoder.rank_pattern"] == {"encoder.layers.0.self_attn.out_proj": 1}
    again = read_as(files.path, checkpoint).updates
    for name, (left, right) in given.items():
        np.testing.assert_array_equal(again[name].left, left)
        np.testing.assert_array_equal(again[name].right, right)


def test_diffusers_files_of_others(tmp_path):
    checkpoint = image_pipeline(tmp_path)
    given = factors(f"unet/{pico_pipeline.UNET[0]}")
    path = write_as("diffusers", tmp_path / "m", given, checkpoint).path / WEIGHTS_NAME
    arrays = {n: np.asarray(a) for n, a in stream.open_tensors(path)[0].items()}
    save_safetensors(path, {**arrays, "unet.x.lora_A.weight": np.ones((1, 1), np.float32)})
    with pytest.raises(InputError, match=r"unet.x.lora_A.weight belongs to no module"):
        read_as(path.parent, checkpoint)
    save_safetensors(path, {n: a for n, a in arrays.items() if "lora_A" not in n})
    with pytest.raises(InputError, match="only some of its factors"):
        read_as(path.parent, checkpoint)
    config = json.dumps({"unet.r": 2, "unet.lora_alpha": 4})
    save_safetensors(path, arrays, {"lora_adapter_metadata": config})
    with pytest.raises(InputError, match="unet.lora_alpha is not the rank"):
        read_as(path.parent, checkpoint)


def test_none_writes_nothing(tmp_path):
    checkpoint = image_pipeline(tmp_path)
    given = factors(f"unet/{pico_pipeline.UNET[0]}")
    files = write_as("none", tmp_path / "m", given, checkpoint)
    assert files.left_out == ()
    assert not files.path.exists()
    with pytest.raises(InputError, match="no adapter in it"):
        read_as(files.path, checkpoint)


def test_a_pipeline_without_an_update_still_has_a_peft_adapter(tmp_path):
    checkpoint = image_pipeline(tmp_path)
    given = factors(*pico_pipeline.TUNED, rank=0)
    files = write_as("peft", tmp_path / "m", given, checkpoint)
    assert [p.name for p in files.path.iterdir()] == ["unet"]
    (update,) = read_adapter(files.path / "unet").updates.values()
    assert not update.left.any()


def test_cards_name_the_base(tmp_path):
    checkpoint = image_pipeline(tmp_path)
    given = factors(f"unet/{pico_pipeline.UNET[0]}", rank=3)
    path = write_as("diffusers", tmp_path / "m", given, checkpoint).path
    card = (path / "README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained("PATH/base")' in card
    assert "1 module(s), ranks 3 to 3" in card
    path = write_as("kohya", tmp_path / "k", given, checkpoint, base="/some/base").path
    card = (path / "README.md").read_text()
    assert 'from_pretrained("/some/base")' in card
    assert 'weight_name="k.safetensors"' in card
    assert "in common" not in card


def test_two_tensors_of_one_name_are_refused_before_any_work(tmp_path):
    names = ("mid_block.attentions.0.proj_in.weight", "mid_block.attentions_0.proj.in.weight")
    tensors = {name: np.ones((8, 4), np.float32) for name in names}
    path = pico.write(tmp_path / "unet", tensors, _class_name="UNet2DConditionModel")
    with pytest.raises(OutputError, match="called lora_unet_mid_block_attentions_0_proj_in in it"):
        choose_format("kohya", open_checkpoint(path))
    assert choose_format("auto", open_checkpoint(path)) == "diffusers"
