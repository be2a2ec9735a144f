"""Writes tiny pipelines as single files in the original Stable Diffusion layout, for tests.

diffusers ships the way in only; its own converters check what is written here.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jdetune.checkpoint import save_safetensors, sd_names
from tests import tiny_diffusion as tiny

_VAE_PARTS = {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_TEXT = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
_TEXT |= {"layer_norm1": "ln_1", "layer_norm2": "ln_2"}


def unet(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    depth = sd_names.diffusers_depth(state)
    attended = {n.rpartition(".attentions")[0] for n in state if n.startswith("up_blocks.")}
    found = {}
    for name, value in state.items():
        module, _, last = name.rpartition(".")
        found[f"{sd_names.unet_to_original(module, depth, attended)}.{last}"] = value
    return found


def vae(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A VAE of one level."""
    found = {}
    for name, value in state.items():
        new = re.sub(r"(down|up)_blocks\.0\.resnets\.(\d)", r"\1.0.block.\2", name)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        attention = re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)", new)
        if attention:
            part = _VAE_ATTENTION[attention[2]]
            new = f"{attention[1]}mid.attn_1.{part}.{attention[3]}"
            value = value[..., None, None] if value.ndim == 2 else value
        for ours, theirs in _VAE_PARTS.items():
            new = new.replace(ours, theirs)
        found[new] = value
    return found


def open_clip(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """CLIP's text encoder in OpenCLIP's names, query, key and value in one."""
    state = {n.removeprefix("text_model."): v for n, v in state.items()}
    found = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
    }
    for name in state:
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None or match[2] in ("self_attn.k_proj", "self_attn.v_proj"):
            continue
        root = f"transformer.resblocks.{match[1]}"
        if match[2] == "self_attn.q_proj":
            three = [state[name.replace("q_proj", f"{word}_proj")] for word in "qkv"]
            found[f"{root}.attn.in_proj_{match[3]}"] = np.concatenate(three)
        else:
            found[f"{root}.{_TEXT[match[2]]}.{match[3]}"] = state[name]
    return found


def stable_diffusion(folder: Path) -> dict[str, np.ndarray]:
    """All weights of a Stable Diffusion 1 folder."""
    parts = {p: tiny.weights(folder / p) for p in ("unet", "vae", "text_encoder")}
    text = {n.removeprefix("text_model."): v for n, v in parts["text_encoder"].items()}
    return {
        **{f"model.diffusion_model.{n}": v for n, v in unet(parts["unet"]).items()},
        **{f"first_stage_model.{n}": v for n, v in vae(parts["vae"]).items()},
        **{f"cond_stage_model.transformer.text_model.{n}": v for n, v in text.items()},
    }


def save(folder: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Writes a folder's weights as one file beside it."""
    path = folder.with_suffix(".safetensors")
    save_safetensors(path, stable_diffusion(folder), metadata)
    return path
