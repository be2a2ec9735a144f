"""Checkpoints and adapters on disk: the only code that knows safetensors."""

from jdetune.checkpoint.adapter_reader import (
    Adapter,
    LoraUpdate,
    load_adapter,
    merge_peft,
    read_adapter,
)
from jdetune.checkpoint.adapters import AdapterFiles, write_adapter
from jdetune.checkpoint.index import Checkpoint, TensorInfo, open_checkpoint
from jdetune.checkpoint.manifest import Plan, TensorPlan, make_plan, select
from jdetune.checkpoint.reader import read_tensor
from jdetune.checkpoint.stacks import load_stack, save_adapters, save_base
from jdetune.checkpoint.writer import save_json, save_like, save_safetensors

__all__ = [
    "Adapter",
    "AdapterFiles",
    "Checkpoint",
    "LoraUpdate",
    "Plan",
    "TensorInfo",
    "TensorPlan",
    "load_adapter",
    "make_plan",
    "merge_peft",
    "open_checkpoint",
    "read_adapter",
    "read_tensor",
    "save_adapters",
    "save_base",
    "save_json",
    "save_like",
    "save_safetensors",
    "load_stack",
    "select",
    "write_adapter",
]
