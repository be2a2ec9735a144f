"""What a model's config.json says, as far as its arithmetic goes: hashable, so static under jit."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from jdetune.errors import InputError

#: Scalings of rotary positions, and the numbers that each needs.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
_Config = TypeVar("_Config", bound="BertConfig | ViTConfig | LlamaConfig")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """BERT; names as in config.json.

    Attributes:
      labels: classes of the classification head, 0 for none.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    labels: int = 0


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """ViT, and DINOv2 where ``layer_scale`` is set; names as in config.json.

    Attributes:
      layer_scale: DINOv2's blocks: names, layer scale, and a head on class token and mean patch.
      labels: classes of the classification head, 0 for none.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    layer_scale: bool = False
    labels: int = 0


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Llama-type decoder; names as in config.json.

    Attributes:
      head_dim: width of one head.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: (name, value) pairs of the scaling, empty for none; see `rotary`.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    intermediate_size: int = 11008
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, str | float], ...] = ()
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False


def bert_config(config: Mapping[str, Any], labels: int = 0) -> BertConfig:
    """BERT's config from config.json.

    Raises:
      InputError: the model computes something else.
    """
    if config.get("position_embedding_type", "absolute") != "absolute" or config.get("is_decoder"):
        raise InputError("only BERT encoders with absolute positions can be run.")
    return _pick(BertConfig, config, labels=labels)


def vit_config(config: Mapping[str, Any], labels: int = 0) -> ViTConfig:
    """ViT's or DINOv2's config from config.json.

    Raises:
      InputError: the model computes something else.
    """
    for key in ("image_size", "patch_size"):
        if not isinstance(config.get(key, 0), int):
            raise InputError(f"{key} is {config[key]}: only square images and patches can be run.")
    if config.get("use_swiglu_ffn"):
        raise InputError("DINOv2-giant (use_swiglu_ffn) cannot be run; small, base and large can.")
    if config.get("model_type") != "dinov2":
        return _pick(ViTConfig, config, labels=labels)
    inner = int(config.get("hidden_size", 768) * config.get("mlp_ratio", 4))
    defaults = {"layer_norm_eps": 1e-6, "patch_size": 14}
    return _pick(
        ViTConfig,
        {**defaults, **config},
        intermediate_size=inner,
        layer_scale=True,
        labels=labels,
    )


def llama_config(config: Mapping[str, Any]) -> LlamaConfig:
    """A Llama-type decoder's config from config.json, of old or new form.

    Raises:
      InputError: the model computes something else.
    """
    if config.get("model_type") == "mistral" and config.get("sliding_window"):
        raise InputError("sliding-window attention cannot be run; set sliding_window to null.")
    heads = config.get("num_attention_heads", 32)
    head_dim = config.get("head_dim") or config.get("hidden_size", 4096) // heads
    groups = config.get("num_key_value_heads") or heads
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    if kind not in ROPE_KEYS:
        known = ", ".join(ROPE_KEYS)
        raise InputError(f"rope_type {kind!r} is not known; {known} can be run.")
    scaling = {"rope_type": kind, **{key: float(rope[key]) for key in ROPE_KEYS[kind]}}
    return _pick(
        LlamaConfig,
        config,
        head_dim=head_dim,
        num_key_value_heads=groups,
        rope_theta=float(theta),
        rope_scaling=tuple(scaling.items()) if kind != "default" else (),
    )


def _pick(kind: type[_Config], config: Mapping[str, Any], **known: Any) -> _Config:
    """Fields that config.json has, then those known better."""
    own = {field.name for field in dataclasses.fields(kind)}
    found = {key: value for key, value in config.items() if key in own and value is not None}
    return kind(**{**found, **known})
