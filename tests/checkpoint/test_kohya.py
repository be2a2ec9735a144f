import json

import numpy as np
import pytest

from jdetune.checkpoint import open_checkpoint, save_safetensors, stream
from jdetune.checkpoint.adapter_formats import read_as, write_as
from jdetune.checkpoint.slots import slots_of
from jdetune.errors import InputError
from tests import pico, pico_pipeline

UNET = "model.diffusion_model."
ATTENTION = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
CONVOLUTION = f"{UNET}input_blocks.1.0.in_layers.2.weight"
FUSED = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
SHAPES = {
    ATTENTION: (32, 1024),
    CONVOLUTION: (32, 8, 3, 3),
    f"{UNET}input_blocks.2.0.op.weight": (32, 32, 3, 3),
    f"{UNET}label_emb.weight": (4, 8),
    FUSED: (72, 24),
    "cond_stage_model.model.token_embedding.weight": (10, 24),
    "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
}


def original(path, metadata=None):
    """A file in the layout of Stable Diffusion 2: OpenCLIP, query, key and value in one."""
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    save_safetensors(path, tensors, metadata)
    return open_checkpoint(path)


def factors(names, rank=2):
    rng = np.random.default_rng(1)
    return {n: pico.pair(rng, (SHAPES[n][0], int(np.prod(SHAPES[n][1:]))), rank) for n in names}


def test_names_shapes_alpha_and_header(tmp_path):
    checkpoint = original(tmp_path / "m.safetensors")
    given = factors([ATTENTION, CONVOLUTION])
    files = write_as("kohya", tmp_path / "a" / "m", given, checkpoint)
    assert {p.name for p in files.path.iterdir()} == {"m.safetensors", "README.md"}
    arrays, header = stream.open_tensors(files.path / "m.safetensors")
    linear = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    spatial = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert {n: a.shape for n, a in arrays.items()} == {
        f"{linear}.lora_down.weight": (2, 1024),
        f"{linear}.lora_up.weight": (32, 2),
        f"{linear}.alpha": (),
        f"{spatial}.lora_down.weight": (2, 8, 3, 3),
        f"{spatial}.lora_up.weight": (32, 2, 1, 1),
        f"{spatial}.alpha": (),
    }
    assert float(np.asarray(arrays[f"{linear}.alpha"])) == 2.0
    left, right = given[CONVOLUTION]
    np.testing.assert_array_equal(np.asarray(arrays[f"{spatial}.lora_up.weight"])[..., 0, 0], left)
    down = np.asarray(arrays[f"{spatial}.lora_down.weight"])
    np.testing.assert_array_equal(down.reshape(2, -1), right)
    assert json.loads(header.pop("ss_network_args")) == {"conv_dim": "2", "conv_alpha": "2"}
    assert header == {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "2",
        "ss_output_name": "m",
        "ss_base_model_version": "sd_v2",
        "ss_v2": "True",
    }


def test_query_key_and_value_in_one_get_three_modules(tmp_path):
    checkpoint = original(tmp_path / "m.safetensors")
    given = factors([FUSED])
    files = write_as("kohya", tmp_path / "a" / "m", given, checkpoint)
    arrays, _ = stream.open_tensors(files.path / "m.safetensors")
    left, right = given[FUSED]
    for i, word in enumerate("qkv"):
        root = f"lora_te_text_model_encoder_layers_0_self_attn_{word}_proj"
        np.testing.assert_array_equal(arrays[f"{root}.lora_up.weight"], left[24 * i : 24 * (i + 1)])
        np.testing.assert_array_equal(arrays[f"{root}.lora_down.weight"], right)
    update = read_as(files.path, checkpoint).updates[FUSED]
    np.testing.assert_allclose(update.left @ update.right, left @ right, atol=1e-9)


def test_smaller_ranks_are_filled_with_zeros(tmp_path):
    checkpoint = original(tmp_path / "m.safetensors")
    given = {**factors([ATTENTION], rank=3), **factors([CONVOLUTION], rank=1)}
    given |= factors([FUSED], rank=5)
    files = write_as("kohya", tmp_path / "a" / "m", given, checkpoint)
    arrays, _ = stream.open_tensors(files.path / "m.safetensors")
    ranks = {n: float(np.asarray(a)) for n, a in arrays.items() if n.endswith(".alpha")}
    assert {r for n, r in ranks.items() if n.startswith("lora_unet_")} == {3.0}
    assert {r for n, r in ranks.items() if n.startswith("lora_te_")} == {5.0}
    for name, update in read_as(files.path, checkpoint).updates.items():
        found, expected = (
            np.matmul(left, right, dtype=np.float64)
            for left, right in ((update.left, update.right), given[name])
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_no_update_is_a_file_that_loads_and_changes_nothing(tmp_path):
    checkpoint = original(tmp_path / "m.safetensors")
    files = write_as("kohya", tmp_path / "a" / "m", factors([ATTENTION], rank=0), checkpoint)
    (update,) = read_as(files.path, checkpoint).updates.values()
    assert not update.left.any()
    assert not update.right.any()


def test_what_it_cannot_hold_is_named(tmp_path):
    checkpoint = original(tmp_path / "m.safetensors")
    names = [f"{UNET}label_emb.weight", "first_stage_model.decoder.conv_in.weight", ATTENTION]
    embedding = "cond_stage_model.model.token_embedding.weight"
    files = write_as("kohya", tmp_path / "a" / "m", factors(names), checkpoint, (embedding,))
    assert files.targets == (ATTENTION,)
    assert files.left_out == (*names[:2], embedding)
    assert embedding not in slots_of(checkpoint)


def test_a_file_of_another_base_or_with_a_part_missing(tmp_path):
    checkpoint = original(tmp_path / "m.safetensors")
    folder = write_as("kohya", tmp_path / "a" / "m", factors([FUSED]), checkpoint).path
    arrays = {n: np.asarray(a) for n, a in stream.open_tensors(folder / "m.safetensors")[0].items()}
    other = {n: a for n, a in arrays.items() if "k_proj" not in n}
    save_safetensors(folder / "m.safetensors", other)
    with pytest.raises(InputError, match="only some of its factors"):
        read_as(folder, checkpoint)
    other = {n: a for n, a in arrays.items() if n.rpartition("k_proj")[2] != ".alpha"}
    save_safetensors(folder / "m.safetensors", other)
    with pytest.raises(InputError, match="k_proj has only some of its factors"):
        read_as(folder, checkpoint)
    save_safetensors(
        folder / "m.safetensors", {**arrays, "lora_unet_x.alpha": np.ones((), np.float32)}
    )
    with pytest.raises(InputError, match="lora_unet_x is no module of"):
        read_as(folder, checkpoint)


def test_another_alpha_than_the_rank_scales(tmp_path):
    checkpoint = original(tmp_path / "m.safetensors")
    given = factors([ATTENTION])
    folder = write_as("kohya", tmp_path / "a" / "m", given, checkpoint).path
    arrays = {n: np.asarray(a) for n, a in stream.open_tensors(folder / "m.safetensors")[0].items()}
    halved = {n: np.asarray(a / 2) if "alpha" in n else a for n, a in arrays.items()}
    save_safetensors(folder / "m.safetensors", halved)
    update = read_as(folder, checkpoint).updates[ATTENTION]
    left, right = given[ATTENTION]
    np.testing.assert_allclose(update.left @ update.right, left @ right / 2, atol=1e-9)


def test_a_text_encoder_with_and_without_its_outer_name(tmp_path):
    truth = pico_pipeline.base()
    flat = {n.replace("text_model.", ""): v for n, v in truth.items()}
    tables = [
        slots_of(open_checkpoint(pico_pipeline.write(tmp_path / n, t)))
        for n, t in (("old", truth), ("new", flat))
    ]
    old, new = ({slot for slots in table.values() for slot in slots} for table in tables)
    assert old == new
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in {slot.kohya for slot in old}


def test_flux_keeps_its_own_names(tmp_path):
    names = ("double_blocks.0.img_attn.qkv.weight", "single_blocks.1.linear1.weight")
    tensors = {name: np.ones((8, 4), np.float32) for name in names}
    save_safetensors(tmp_path / "flux.safetensors", tensors)
    table = slots_of(open_checkpoint(tmp_path / "flux.safetensors"))
    assert [table[name][0].kohya for name in names] == [
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_single_blocks_1_linear1",
    ]
    assert all(slot.module is None for slots in table.values() for slot in slots)
