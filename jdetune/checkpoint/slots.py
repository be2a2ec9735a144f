"""Where adapter files of image models hold an update: diffusers' modules and kohya's names.

A tensor has one slot, or three if it holds query, key and value in one, as OpenCLIP's does; it has
none if no such file can hold its update (embeddings, the VAE).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jdetune.checkpoint import pipeline_folder, sd_names, single_file
from jdetune.checkpoint.index import FLOATS, Checkpoint

#: Last words of modules that look up rows of their weight.
_EMBEDDINGS = (
    *("token_embedding", "position_embedding", "embed_tokens", "shared", "class_embedding"),
    *("embedding_table", "relative_attention_bias"),
)
#: Text encoders of the original layout: prefix, number and whether names are OpenCLIP's.
_ORIGINAL_TEXT = (
    ("cond_stage_model.transformer.", 1, False),
    ("cond_stage_model.model.", 1, True),
    ("conditioner.embedders.0.transformer.", 1, False),
    ("conditioner.embedders.0.model.", 1, True),
    ("conditioner.embedders.1.model.", 2, True),
    ("text_encoders.clip_l.transformer.", 1, False),
    ("text_encoders.clip_g.transformer.", 2, False),
)


@dataclasses.dataclass(frozen=True)
class Slot:
    """A module that an adapter file knows.

    Attributes:
      component: diffusers' name of the model it belongs to.
      module: its path in that model, None if diffusers' names are not known.
      kohya: its name in a kohya file, None if kohya has none.
      part: which of the equal parts of the tensor's rows it is.
      parts: how many there are.
    """

    component: str
    module: str | None
    kohya: str | None
    part: int = 0
    parts: int = 1


@dataclasses.dataclass(frozen=True)
class Piece:
    """Factors of one slot in a file's orientation.

    Attributes:
      slot: where they go.
      down: [rank, in], or [rank, in, height, width] of a convolution.
      up: [out, rank], or [out, rank, 1, 1].
    """

    slot: Slot
    down: np.ndarray
    up: np.ndarray


def slots_of(checkpoint: Checkpoint) -> dict[str, tuple[Slot, ...]]:
    """Slots of every tensor that has one, by name."""
    if pipeline_folder.is_pipeline(checkpoint):
        found: dict[str, tuple[Slot, ...]] = {}
        parts = pipeline_folder.components(checkpoint)
        for part in parts:
            view = pipeline_folder.component_view(checkpoint, part)
            table = _component_slots(view, part, several="text_encoder_2" in parts)
            found |= {f"{part}/{name}": slots for name, slots in table.items()}
        with_unet = "unet" in parts
        return found if with_unet else {n: _without_kohya(slots) for n, slots in found.items()}
    if single_file.is_original_layout(checkpoint):
        return _original_slots(checkpoint)
    component = _component_kind(checkpoint.config)
    return {} if component is None else _component_slots(checkpoint, component)


def pieces(
    name: str, left: np.ndarray, right: np.ndarray, shape: tuple[int, ...], slots: tuple[Slot, ...]
) -> Iterator[Piece]:
    """Factors of a tensor, cut into its slots.

    Args:
      name: the tensor, for messages.
      left: [row, rank].
      right: [rank, col]; the columns of a convolution are in, height and width.
      shape: the tensor's own.
      slots: where they go.
    """
    rank = left.shape[1]
    down = right.astype(np.float32).reshape(rank, *shape[1:])
    rows = len(left) // slots[0].parts
    if rows * slots[0].parts != shape[0]:
        raise ValueError(f"{name}: {shape[0]} rows cannot be cut into {slots[0].parts} parts")
    for slot in slots:
        up = left[slot.part * rows : (slot.part + 1) * rows].astype(np.float32)
        yield Piece(slot, down, up.reshape(rows, rank, *(1 for _ in shape[2:])))


def joined(found: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Factors of a tensor from those of its slots, in order: the inverse of ``pieces``.

    Returns:
      left [row, rank] and right [rank, col], block by block where there are several slots.
    """
    flat = [(u.reshape(len(u), -1), d.reshape(len(d), -1)) for d, u in found]
    rows, ranks = (
        np.cumsum([0, *sizes]) for sizes in zip(*(u.shape for u, _ in flat), strict=True)
    )
    left = np.zeros((rows[-1], ranks[-1]), np.float32)
    for i, (up, _) in enumerate(flat):
        left[rows[i] : rows[i + 1], ranks[i] : ranks[i + 1]] = up
    return left, np.concatenate([down for _, down in flat])


def is_sdxl(checkpoint: Checkpoint) -> bool:
    """Whether a model is a Stable Diffusion XL, by its parts."""
    if pipeline_folder.is_pipeline(checkpoint):
        return "unet/add_embedding.linear_1.weight" in checkpoint.tensors
    names = ("add_embedding.linear_1.weight", f"{single_file.DENOISER}label_emb.0.0.weight")
    return any(name in checkpoint.tensors for name in names)


def _component_kind(config: Mapping[str, Any]) -> str | None:
    """Diffusers' name of a model that stands alone, by its config."""
    name = str(config.get("_class_name", ""))
    if "UNet" in name:
        return "unet"
    if "Transformer" in name:
        return "transformer"
    return "text_encoder" if config.get("model_type") == "clip_text_model" else None


def _component_slots(
    view: Checkpoint, component: str, several: bool = False
) -> dict[str, tuple[Slot, ...]]:
    """Slots of one component in diffusers' and transformers' layout."""
    modules = {name: name.removesuffix(".weight") for name in view.tensors if _can_hold(view, name)}
    if component == "unet":
        kohya = {m: _kohya("lora_unet", n) for m, n in _kohya_unet(view, modules.values()).items()}
        return {n: (Slot("unet", m, kohya.get(m)),) for n, m in modules.items()}
    if component in ("transformer", "transformer_2", "unet_2"):
        return {n: (Slot(component, m, None),) for n, m in modules.items()}
    prefix = {"text_encoder": "lora_te1" if several else "lora_te", "text_encoder_2": "lora_te2"}
    clip = view.config.get("model_type", "clip_text_model") == "clip_text_model"
    if component not in prefix or not clip:
        return {}
    paths = {n: sd_names.clip_module(m) for n, m in modules.items()}
    return {n: (Slot(component, m, _kohya(prefix[component], m)),) for n, m in paths.items()}


def _kohya_unet(view: Checkpoint, modules: Any) -> dict[str, str]:
    """Paths of a UNet's modules as kohya names them: diffusers' own, the original's for SDXL."""
    modules = list(modules)
    if not is_sdxl(view):
        return {module: module for module in modules}
    depth = sd_names.diffusers_depth(view.tensors)
    words = (
        n.split(".") for n in view.tensors if n.startswith("up_blocks.") and ".attentions." in n
    )
    attended = {".".join(parts[:2]) for parts in words}
    found = {m: sd_names.unet_to_original(m, depth, attended) for m in modules}
    return {module: name for module, name in found.items() if name is not None}


def _original_slots(checkpoint: Checkpoint) -> dict[str, tuple[Slot, ...]]:
    """Slots of a single file in the original layout."""
    prefix = single_file.denoiser_prefix(checkpoint)
    inner = [n.removeprefix(prefix) for n in checkpoint.tensors if n.startswith(prefix)]
    depth = sd_names.original_depth(inner)
    sdxl, several = is_sdxl(checkpoint), _has_second_text_encoder(checkpoint)
    found: dict[str, tuple[Slot, ...]] = {}
    for name in checkpoint.tensors:
        if not _can_hold(checkpoint, name):
            continue
        slots = _original_text(name, several)
        if not slots and name.startswith(prefix) and _is_denoiser(name, prefix):
            module = name.removeprefix(prefix).removesuffix(".weight")
            theirs = sd_names.unet_to_diffusers(module, depth) if depth else None
            named = theirs if depth and not sdxl else module
            if named is not None:
                component = "unet" if depth else "transformer"
                slots = (Slot(component, theirs, _kohya("lora_unet", named)),)
        if slots:
            found[name] = slots
    return found


def _is_denoiser(name: str, prefix: str) -> bool:
    """Whether a name that starts with the prefix is the denoiser's; all are where it is empty."""
    others = ("first_stage_model.", "model_ema.", "text_encoders.", "vae.")
    return bool(prefix) or not name.startswith(others)


def _original_text(name: str, several: bool) -> tuple[Slot, ...]:
    for prefix, number, open_clip in _ORIGINAL_TEXT:
        if not name.startswith(prefix):
            continue
        module = name.removeprefix(prefix).removesuffix(".weight").removesuffix(".in_proj_weight")
        paths = sd_names.open_clip_modules(module) if open_clip else (sd_names.clip_module(module),)
        component = "text_encoder" if number == 1 else "text_encoder_2"
        named = f"lora_te{number if several else ''}"
        return tuple(
            Slot(component, path, _kohya(named, path), i, len(paths))
            for i, path in enumerate(paths)
        )
    return ()


def _has_second_text_encoder(checkpoint: Checkpoint) -> bool:
    words = ("conditioner.embedders.1.", "text_encoders.clip_g.", "text_encoders.t5")
    return any(name.startswith(words) for name in checkpoint.tensors)


def _can_hold(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is the weight of a linear or convolutional module."""
    info = checkpoint.tensors[name]
    module, _, last = name.rpartition(".")
    is_weight = last == "weight" and module.rpartition(".")[2] not in _EMBEDDINGS
    fused = last == "in_proj_weight"
    return len(info.shape) > 1 and info.dtype in FLOATS and (is_weight or fused)


def _kohya(prefix: str, path: str) -> str:
    return f"{prefix}_{path.replace('.', '_')}"


def _without_kohya(slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
    return tuple(dataclasses.replace(slot, kohya=None) for slot in slots)
