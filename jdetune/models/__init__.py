"""Small Flax models that load real checkpoints: BERT, ViT and DINOv2, Llama-type decoders.

Weights are a plain dict from tensor name to array, as the checkpoint names and orients them;
`run` is a pure function of weights, LoRA factors and inputs.
"""

from jdetune.models.bert import Bert, mean_pool, normalise
from jdetune.models.config import BertConfig, LlamaConfig, ViTConfig
from jdetune.models.generation import Generated, Sampling, generate
from jdetune.models.hooks import Hooks, Place
from jdetune.models.layers import Lora
from jdetune.models.llama import Llama, empty_cache
from jdetune.models.lora import init_lora, linear_layers, load_lora, merge_lora, stack_adapters
from jdetune.models.names import Model
from jdetune.models.output import Cache, Output
from jdetune.models.params import Params, build, init_params, layout, load, load_params, to_hf
from jdetune.models.run import run
from jdetune.models.vit import ViT

__all__ = [
    "Bert",
    "BertConfig",
    "Cache",
    "Generated",
    "Hooks",
    "Llama",
    "LlamaConfig",
    "Lora",
    "Model",
    "Output",
    "Params",
    "Place",
    "Sampling",
    "ViT",
    "ViTConfig",
    "build",
    "empty_cache",
    "generate",
    "init_lora",
    "init_params",
    "layout",
    "linear_layers",
    "load",
    "load_lora",
    "load_params",
    "mean_pool",
    "merge_lora",
    "normalise",
    "run",
    "stack_adapters",
    "to_hf",
]
