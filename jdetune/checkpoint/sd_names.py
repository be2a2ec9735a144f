"""Module names of Stable Diffusion: the original code's, diffusers', and CLIP's in both."""

import re
from collections.abc import Iterable

#: Parts of a residual block, original to diffusers.
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
#: Modules outside the blocks.
_OUTER = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_INPUT = re.compile(r"input_blocks\.(\d{1,4})\.(0\.op\.)?")
_PLACE = re.compile(r"\d{1,4}")
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
#: Parts of a text block, OpenCLIP to CLIP.
_OPEN_CLIP = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def original_depth(names: Iterable[str]) -> int:
    """Residual blocks per level, from names of the original layout without prefix.

    The first downsampler closes the first level; without one there is only one level.
    """
    found = [match for match in map(_INPUT.match, names) if match]
    downs = [int(match[1]) for match in found if match[2]]
    return min(downs) - 1 if downs else max((int(match[1]) for match in found), default=0)


def diffusers_depth(names: Iterable[str]) -> int:
    """Residual blocks per level, from names of diffusers' layout."""
    found = (re.match(r"down_blocks\.0\.resnets\.(\d{1,4})\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def unet_to_diffusers(module: str, depth: int) -> str | None:
    """Diffusers' path of a module of the original UNet, None if there is none.

    Args:
      module: path without prefix.
      depth: residual blocks per level.

    Example:
      >>> unet_to_diffusers("input_blocks.4.1.transformer_blocks.0.attn1.to_q", 2)
      'down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q'
    """
    if module in _OUTER:
        return _OUTER[module]
    parts = module.split(".")
    if parts[0] == "middle_block" and len(parts) > 2 and parts[1] in _MIDDLE:
        return _block(f"mid_block.{_MIDDLE[parts[1]]}", parts[2:])
    if parts[0] not in ("input_blocks", "output_blocks") or len(parts) < 4 or depth < 1:
        return None
    if not _PLACE.fullmatch(parts[1]):
        return None
    place, inner, rest = int(parts[1]), parts[2], parts[3:]
    down = parts[0] == "input_blocks"
    block, layer = divmod(place - 1 if down else place, depth + 1)
    root = f"{'down' if down else 'up'}_blocks.{block}"
    if rest[0] in ("op", "conv") and len(rest) == 1:
        return f"{root}.{'downsamplers' if down else 'upsamplers'}.0.conv"
    return _block(f"{root}.{'resnets' if inner == '0' else 'attentions'}.{layer}", rest)


def unet_to_original(module: str, depth: int, attended: Iterable[str] = ()) -> str | None:
    """The original UNet's path of a module of diffusers', the inverse of ``unet_to_diffusers``.

    Args:
      module: path in diffusers' layout.
      depth: residual blocks per level.
      attended: levels with attention on the way up, such as ``up_blocks.0``; an upsampler comes
        after it.

    Example:
      >>> unet_to_original("up_blocks.0.upsamplers.0.conv", 2, ["up_blocks.0"])
      'output_blocks.2.2.conv'
    """
    outer = {ours: theirs for theirs, ours in _OUTER.items()}
    if module in outer:
        return outer[module]
    parts = module.split(".")
    if parts[0] == "mid_block":
        middle = {ours: theirs for theirs, ours in _MIDDLE.items()}
        place = middle.get(".".join(parts[1:3]))
        return (
            None if place is None else _original_block(f"middle_block.{place}", parts[1], parts[3:])
        )
    if parts[0] not in ("down_blocks", "up_blocks") or len(parts) < 5:
        return None
    if not (_PLACE.fullmatch(parts[1]) and _PLACE.fullmatch(parts[3])):
        return None
    down, block, kind, layer = parts[0] == "down_blocks", int(parts[1]), parts[2], int(parts[3])
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (depth + 1)}.0.op"
    if kind == "upsamplers":
        inner = 2 if f"up_blocks.{block}" in attended else 1
        return f"output_blocks.{block * (depth + 1) + depth}.{inner}.conv"
    place = block * (depth + 1) + layer + (1 if down else 0)
    root = f"{'input' if down else 'output'}_blocks.{place}.{'0' if kind == 'resnets' else '1'}"
    return _original_block(root, kind, parts[4:])


def clip_module(module: str) -> str:
    """CLIP's path of a text encoder's module with its outer name, which new files leave out.

    Example:
      >>> clip_module("encoder.layers.0.mlp.fc1"), clip_module("text_projection")
      ('text_model.encoder.layers.0.mlp.fc1', 'text_projection')
    """
    inner = module.startswith(("encoder.layers.", "embeddings.", "final_layer_norm"))
    return f"text_model.{module}" if inner else module


def open_clip_modules(module: str) -> tuple[str, ...]:
    """CLIP's paths of an OpenCLIP module: three for the weight of query, key and value in one.

    Args:
      module: path after ``model.``, such as ``transformer.resblocks.0.mlp.c_fc``.

    Example:
      >>> open_clip_modules("transformer.resblocks.3.mlp.c_fc")
      ('text_model.encoder.layers.3.mlp.fc1',)
    """
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", module)
    if match is None:
        return ()
    root = f"text_model.encoder.layers.{match[1]}"
    if match[2] == "attn":
        return tuple(f"{root}.self_attn.{word}_proj" for word in "qkv")
    return (f"{root}.{_OPEN_CLIP[match[2]]}",) if match[2] in _OPEN_CLIP else ()


def _block(root: str, rest: list[str]) -> str | None:
    """A path in diffusers' layout; parts of residual blocks have other names there."""
    inner = ".".join(rest)
    if ".attentions." in root:
        return f"{root}.{inner}"
    return f"{root}.{_RESNET[inner]}" if inner in _RESNET else None


def _original_block(root: str, kind: str, rest: list[str]) -> str | None:
    inner = ".".join(rest)
    if kind == "attentions":
        return f"{root}.{inner}"
    names = {ours: theirs for theirs, ours in _RESNET.items()}
    return f"{root}.{names[inner]}" if inner in names else None
