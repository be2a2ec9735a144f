"""diffusers loads what we write, from folders and single files, and fuses it to the models."""

import json

import numpy as np
import pytest

from jdetune import extraction, pipeline
from jdetune.checkpoint import open_checkpoint, read_tensor, sd_names, stream
from jdetune.checkpoint.adapter_formats import read_as, write_as
from jdetune.checkpoint.slots import slots_of
from jdetune.verification import verify
from tests import original_layout, pico
from tests import tiny_diffusion as tiny

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytestmark = pytest.mark.interop

PARTS = ("unet", "text_encoder")
FILES = {"kohya": "{}.safetensors", "diffusers": "pytorch_lora_weights.safetensors"}
#: An ulp of weights near 0.25, and one more for the sum of two or three products.
ROUNDING = 3e-8


@pytest.fixture(autouse=True)
def _quiet():
    with tiny.quiet():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    with tiny.quiet():
        return tiny.family(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def singles(folders):
    truth, models = folders
    header = {"modelspec.title": "tiny", "modelspec.hash_sha256": "0xabc"}
    files = [original_layout.save(path, header) for path in (truth, *models)]
    return files[0], files[1:]


def run(truth, models, out, form="auto"):
    teller = pico.truth_teller(tiny.weights(truth))
    return pipeline.run(models, out, pipeline.Options(adapter_format=form), recover_fn=teller)


def assert_fuses(pipe, out, name, form, merged):
    folder = out / "adapters" / name
    fused = tiny.fused(pipe, folder, FILES[form].format(name))
    for part in PARTS:
        found = tiny.plain(tiny.state(getattr(fused, part)))
        expected = tiny.state(getattr(merged, part))
        assert set(found) == set(expected)
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=0, atol=ROUNDING, err_msg=key)


def assert_changed(base, merged):
    """Otherwise nothing is tested."""
    for part in PARTS:
        before, after = tiny.state(getattr(base, part)), tiny.state(getattr(merged, part))
        assert max(np.abs(before[k] - after[k]).max() for k in before) > 1e-3


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_pipelines_in_pipelines_out(folders, tmp_path, form):
    truth, models = folders
    report = run(truth, models, tmp_path / "out", form if form == "kohya" else "auto")
    assert report["adapter_format"] == form
    assert report["summary"]["exit_code"] == 0
    base, merged = tiny.load(tmp_path / "out" / "base"), tiny.load(models[1])
    assert_changed(base, merged)
    assert_fuses(base, tmp_path / "out", "tune-1", form, merged)
    checked = verify(tmp_path / "out", truth)
    assert checked["failures"] == []
    assert checked["exact_fraction"] == 1.0
    assert [m["tensors"] for m in checked["models"]] == [len(tiny.weights(truth))] * 3


def test_peft_has_a_folder_for_every_component(folders, tmp_path):
    import peft

    truth, models = folders
    run(truth, models, tmp_path / "out", "peft")
    base, merged = tiny.load(tmp_path / "out" / "base"), tiny.load(models[0])
    for part in PARTS:
        folder = tmp_path / "out" / "adapters" / "tune-0" / part
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (folder / config["base_model_name_or_path"]).resolve() == (
            tmp_path / "out" / "base" / part
        )
        again = peft.PeftModel.from_pretrained(getattr(base, part), folder).merge_and_unload()
        expected = tiny.state(getattr(merged, part))
        for key, value in tiny.state(again).items():
            np.testing.assert_allclose(value, expected[key], rtol=0, atol=ROUNDING, err_msg=key)
    assert verify(tmp_path / "out", truth)["failures"] == []


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_single_files_in_and_out(singles, folders, tmp_path, form):
    truth, models = singles
    report = run(truth, models, tmp_path / "out", form if form == "diffusers" else "auto")
    assert report["adapter_format"] == form
    file = tmp_path / "out" / "base" / "model.safetensors"
    assert set((tmp_path / "out" / "base").iterdir()) == {file, file.with_name("README.md")}
    header = stream.open_tensors(file)[1]
    assert header == {"format": "pt", "modelspec.title": "tiny"}  # another model's hash is not kept
    absent = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    base = diffusers.StableDiffusionPipeline.from_single_file(
        str(file), config=str(folders[0]), local_files_only=True, **absent
    )
    merged = tiny.load(folders[1][2])
    assert_changed(base, merged)
    assert_fuses(base, tmp_path / "out", "tune-2", form, merged)
    assert verify(tmp_path / "out", truth)["failures"] == []


@pytest.mark.slow
def test_the_solver_recovers_a_pipeline(folders, tmp_path):
    truth, models = folders
    report = pipeline.run(models, tmp_path / "out")
    assert report["summary"]["exit_code"] == 0
    assert report["summary"]["recovered"] == 28  # 24 in the UNet's attention, 4 in the text encoder
    ranks = report["inputs"][0]["ranks"]
    assert {r for n, r in ranks.items() if ".to_k." in n} == {3}
    assert {r for n, r in ranks.items() if ".to_k." not in n} == {2}
    for index, path in enumerate(models):
        base = tiny.load(tmp_path / "out" / "base")
        assert_fuses(base, tmp_path / "out", f"tune-{index}", "diffusers", tiny.load(path))
    checked = verify(tmp_path / "out", truth)
    assert checked["failures"] == []
    assert checked["exact_fraction"] > 0.9  # 0.946 of 28,672 elements


def test_extract_writes_kohya(folders, tmp_path):
    truth, models = folders
    options = extraction.Options(adapter_format="kohya")
    report = extraction.run(truth, models[:1], tmp_path / "out", options)
    assert report["adapter_format"] == "kohya"
    assert report["summary"]["extracted"] == 28
    assert_fuses(tiny.load(truth), tmp_path / "out", "tune-0", "kohya", tiny.load(models[0]))


def factors_for(checkpoint, names, seed=0):
    """Updates of other ranks in every tensor; columns of a convolution are in, height, width."""
    rng = np.random.default_rng(seed)
    shapes = {name: checkpoint.tensors[name].shape for name in names}
    flat = {name: (shape[0], int(np.prod(shape[1:]))) for name, shape in shapes.items()}
    return {n: pico.pair(rng, shape, int(rng.integers(1, 4))) for n, shape in flat.items()}


def updated(weights, factors, name):
    if name not in factors:
        return weights
    left, right = factors[name]
    return weights + (left @ right).reshape(weights.shape)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_every_module_of_a_unet_and_a_text_encoder(folders, tmp_path, form):
    """Convolutions, time embedding, feed-forward: all loaded where they belong, ranks mixed."""
    checkpoint = open_checkpoint(folders[0])
    factors = factors_for(checkpoint, slots_of(checkpoint))
    assert sum(len(checkpoint.tensors[name].shape) == 4 for name in factors) == 33
    files = write_as(form, tmp_path / "out" / "adapters" / "m", factors, checkpoint)
    assert set(files.targets) == set(factors)
    fused = tiny.fused(tiny.load(folders[0]), files.path, FILES[form].format("m"))
    for part in PARTS:
        for key, value in tiny.plain(tiny.state(getattr(fused, part))).items():
            name = f"{part}/{key}"
            expected = updated(read_tensor(checkpoint, name), factors, name)
            # sums of at most 3 products of 0.01, added to weights below 1
            np.testing.assert_allclose(value, expected, rtol=0, atol=1.2e-7, err_msg=name)
    again = read_as(files.path, checkpoint).updates
    for name, (left, right) in factors.items():
        np.testing.assert_allclose(again[name].left @ again[name].right, left @ right, atol=1e-8)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize("module", ["mlp.fc1", "self_attn.v_proj"])
def test_a_text_encoder_with_few_updates_loads(folders, tmp_path, form, module):
    """diffusers tells the kind of file by a text encoder's attention outputs."""
    checkpoint = open_checkpoint(folders[0])
    name = f"text_encoder/encoder.layers.1.{module}.weight"
    factors = factors_for(checkpoint, [name])
    files = write_as(form, tmp_path / "adapters" / "m", factors, checkpoint)
    fused = tiny.fused(tiny.load(folders[0]), files.path, FILES[form].format("m"))
    for key, value in tiny.plain(tiny.state(fused.text_encoder)).items():
        before = read_tensor(checkpoint, f"text_encoder/{key}")
        expected = updated(before, factors, f"text_encoder/{key}")
        np.testing.assert_allclose(value, expected, rtol=0, atol=1.2e-7, err_msg=key)


@pytest.mark.parametrize("sdxl", [False, True])
def test_names_of_the_original_layout_are_what_diffusers_converts(sdxl):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    model = tiny.unet(sdxl=sdxl)
    ours = tiny.state(model)
    original = original_layout.unet(ours)
    given = {f"model.diffusion_model.{name}": value for name, value in original.items()}
    found = convert_ldm_unet_checkpoint(given, dict(model.config))
    assert set(found) == set(ours)
    depth = sd_names.original_depth(original)
    for name, value in original.items():
        module, _, last = name.rpartition(".")
        back = f"{sd_names.unet_to_diffusers(module, depth)}.{last}"
        np.testing.assert_array_equal(found[back], value, err_msg=name)
        np.testing.assert_array_equal(ours[back], value, err_msg=name)


def sdxl_pipeline():
    import transformers

    first, second = tiny.text_encoder(), tiny.text_encoder(projected=True)
    words = transformers.CLIPTokenizer(vocab=tiny.WORDS, merges=[])
    return diffusers.StableDiffusionXLPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=[16], norm_num_groups=8),
        unet=tiny.unet(sdxl=True),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=words,
        tokenizer_2=words,
        scheduler=diffusers.DDIMScheduler(),
    )


@pytest.mark.parametrize("single", [pytest.param(False, marks=pytest.mark.slow), True])
def test_kohya_names_of_sdxl(tmp_path, single):
    """From a folder and from a single file: the same names, which diffusers maps to its modules."""
    pipe = sdxl_pipeline()
    folder = tiny.save(pipe, tmp_path / "base")
    in_folder = open_checkpoint(folder)
    parts = {p: tiny.weights(folder / p) for p in ("unet", "text_encoder", "text_encoder_2")}
    inner = [n.removeprefix("text_model.") for n in parts["text_encoder"]]
    original = {
        f"model.diffusion_model.{n}": v for n, v in original_layout.unet(parts["unet"]).items()
    }
    original |= {
        f"conditioner.embedders.0.transformer.text_model.{n}": v
        for n, v in zip(inner, parts["text_encoder"].values(), strict=True)
    }
    original |= {
        f"conditioner.embedders.1.model.{n}": v
        for n, v in original_layout.open_clip(parts["text_encoder_2"]).items()
    }
    stored = tmp_path / "base.safetensors"
    original_layout.save_safetensors(stored, original)
    checkpoint = open_checkpoint(stored) if single else in_folder
    factors = factors_for(checkpoint, slots_of(checkpoint))
    files = write_as("kohya", tmp_path / "adapters" / "m", factors, checkpoint)
    keys = {k.partition(".")[0] for k in stream.open_tensors(files.path / "m.safetensors")[0]}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in keys
    assert "lora_te2_text_model_encoder_layers_1_self_attn_v_proj" in keys
    every = {slot.kohya for slots in slots_of(in_folder).values() for slot in slots}
    # the projection is a parameter, no module, in OpenCLIP's own layout
    assert every - keys == ({"lora_te2_text_projection"} if single else set())
    fused = tiny.fused(pipe, files.path, "m.safetensors")
    expected = {
        slot.component + "/" + str(slot.module).removeprefix("text_model."): piece
        for name, (left, right) in factors.items()
        for slot in slots_of(checkpoint)[name]
        for piece in [np.split(left @ right, slot.parts)[slot.part]]
    }
    for part, before in parts.items():
        after = tiny.plain(tiny.state(getattr(fused, part)))
        for key, value in before.items():
            name = f"{part}/{key.removeprefix('text_model.').removesuffix('.weight')}"
            update = expected.pop(name, np.zeros(value.shape, np.float32)).reshape(value.shape)
            np.testing.assert_allclose(after[key], value + update, atol=1.2e-7, err_msg=name)
    assert not expected


def test_shards_variants_and_a_bare_unet(folders, tmp_path):
    models = []
    for path in folders[1]:
        folder = tmp_path / path.name
        tiny.load(path).unet.save_pretrained(folder, variant="fp16", max_shard_size="1MB")
        models.append(folder)
    assert not (models[0] / "diffusion_pytorch_model.safetensors").exists()
    assert (models[0] / "diffusion_pytorch_model.safetensors.index.fp16.json").exists()
    truth = {n.removeprefix("unet/"): v for n, v in tiny.weights(folders[0]).items()}
    options = pipeline.Options()
    report = pipeline.run(models, tmp_path / "out", options, recover_fn=pico.truth_teller(truth))
    assert report["adapter_format"] == "diffusers"
    base = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out" / "base")
    for key, value in tiny.state(base).items():
        np.testing.assert_array_equal(value, truth[key], err_msg=key)
    folder = tmp_path / "out" / "adapters" / "tune-0"
    base.load_lora_adapter(str(folder), prefix="unet", weight_name=FILES["diffusers"])
    base.fuse_lora()
    merged = tiny.state(tiny.load(folders[1][0]).unet)
    for key, value in tiny.plain(tiny.state(base)).items():
        np.testing.assert_allclose(value, merged[key], rtol=0, atol=ROUNDING, err_msg=key)
