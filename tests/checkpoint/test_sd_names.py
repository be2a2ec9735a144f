"""Name maps on their own; the interop tests compare them with diffusers' converter."""

import pytest

from jdetune.checkpoint import sd_names

#: Stable Diffusion 1: two residual blocks a level, four levels.
PAIRS = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.2.1.proj_in": "down_blocks.0.attentions.1.proj_in",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks.11.0.emb_layers.1": "down_blocks.3.resnets.1.time_emb_proj",
    "middle_block.0.out_layers.3": "mid_block.resnets.0.conv2",
    "middle_block.1.transformer_blocks.0.ff.net.2": (
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    ),
    "middle_block.2.in_layers.0": "mid_block.resnets.1.norm1",
    "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.11.1.transformer_blocks.0.attn2.to_out.0": (
        "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0"
    ),
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "out.2": "conv_out",
}


@pytest.mark.parametrize(("original", "ours"), PAIRS.items())
def test_there_and_back(original, ours):
    assert sd_names.unet_to_diffusers(original, 2) == ours
    attended = {f"up_blocks.{i}" for i in (1, 2, 3)}
    assert sd_names.unet_to_original(ours, 2, attended) == original


@pytest.mark.parametrize(
    "module",
    [
        *("", ".", "input_blocks", "input_blocks.x.0.op", "input_blocks.1.0.unheard_of"),
        *(f"output_blocks.{'9' * 5000}.0.op", "middle_block.7.norm", "first_stage_model.decoder"),
        *("down_blocks.x.resnets.0.conv1", "up_blocks.0.resnets.y.conv1", "mid_block.other.0.x"),
    ],
)
def test_what_is_no_module_has_no_name(module):
    assert sd_names.unet_to_diffusers(module, 2) is None
    assert sd_names.unet_to_original(module, 2) is None


def test_depth():
    names = [f"{name}.weight" for name in PAIRS]
    assert sd_names.original_depth(names) == 2
    assert sd_names.original_depth(["input_blocks.0.0.weight", "input_blocks.3.1.x"]) == 3
    assert sd_names.original_depth([]) == 0
    assert sd_names.diffusers_depth(f"{name}.weight" for name in PAIRS.values()) == 1
    assert sd_names.diffusers_depth(["down_blocks.0.resnets.1.conv1.weight"]) == 2
