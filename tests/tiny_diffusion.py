"""Tiny Stable Diffusion pipelines by diffusers' own configs, tuned with PEFT, and their files."""

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdetune.checkpoint import Checkpoint, open_checkpoint, read_tensor

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "v_proj"]
WORDS = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "cat</w>": 3}


def diffusers() -> Any:
    """The library, whose lazy names type checkers do not see."""
    return importlib.import_module("diffusers")


@contextlib.contextmanager
def quiet():
    """Other libraries' deprecations and notes are not ours to mend."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        diffusers().utils.logging.set_verbosity_error()
        diffusers().utils.logging.disable_progress_bar()
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        yield


def unet(seed: int = 0, sdxl: bool = False, **changes):
    import torch

    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    if sdxl:
        config |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "transformer_layers_per_block": (1, 2),
            "projection_class_embeddings_input_dim": 80,
            "cross_attention_dim": 64,
            "layers_per_block": 2,
        }
    return diffusers().UNet2DConditionModel(**(config | changes))


def text_encoder(projected: bool = False):
    import torch
    import transformers

    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=2,
    )
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return getattr(transformers, kind)(config)


def pipeline():
    """A whole Stable Diffusion 1."""
    import torch
    import transformers

    torch.manual_seed(2)
    vae = diffusers().AutoencoderKL(block_out_channels=[16], norm_num_groups=8)
    with quiet():
        return diffusers().StableDiffusionPipeline(
            unet=unet(),
            vae=vae,
            text_encoder=text_encoder(),
            tokenizer=transformers.CLIPTokenizer(vocab=WORDS, merges=[]),
            scheduler=diffusers().DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def tune(pipe, seed: int, rank: int = 2) -> None:
    """Merges random LoRA updates into a pipeline, by PEFT: keys with another rank, no mid_block."""
    import peft
    import torch

    torch.manual_seed(seed)
    ranks = {"to_k": rank + 1}
    only_unet = {"rank_pattern": ranks, "alpha_pattern": ranks, "exclude_modules": ".*mid_block.*"}
    both: dict[str, dict[str, Any]] = {
        "unet": {"target_modules": UNET_TARGETS, **only_unet},
        "text_encoder": {"target_modules": TEXT_TARGETS},
    }
    for name, options in both.items():
        config = peft.LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False, **options)
        tuned = peft.get_peft_model(getattr(pipe, name), config)
        with torch.no_grad():
            for key, value in tuned.named_parameters():
                if "lora_" in key:
                    value.normal_(0, 0.1)
        setattr(pipe, name, tuned.merge_and_unload())


def save(pipe, folder: Path, **options) -> Path:
    with quiet():
        pipe.save_pretrained(folder, **options)
    return folder


def load(folder: Path):
    absent = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    with quiet():
        return diffusers().StableDiffusionPipeline.from_pretrained(folder, **absent)


def fused(pipe, adapter: Path, file: str):
    """The pipeline with an adapter loaded and fused."""
    with quiet():
        pipe.load_lora_weights(str(adapter), weight_name=file)
        pipe.fuse_lora()
    return pipe


def family(root: Path, n_models: int = 3, **options) -> tuple[Path, list[Path]]:
    """The base and merged models of it, as pipeline folders."""
    base = save(pipeline(), root / "truth")
    models = []
    for seed in range(n_models):
        pipe = pipeline()
        tune(pipe, seed, **options)
        models.append(save(pipe, root / f"tune-{seed}"))
    return base, models


def weights(checkpoint: Checkpoint | Path) -> dict[str, np.ndarray]:
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    return {name: read_tensor(opened, name) for name in opened.tensors}


def state(model) -> dict[str, np.ndarray]:
    return {name: value.detach().float().numpy() for name, value in model.state_dict().items()}


def plain(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict after fusing, under the names that it had before: PEFT wraps its layers."""
    return {n.replace(".base_layer.", "."): v for n, v in state.items() if ".lora_" not in n}
