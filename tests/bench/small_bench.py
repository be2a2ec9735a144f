"""A small file of LoWRA Bench's schema, as the published data have it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SHAPES = {
    "layers.0.q_proj": (48, 32),
    "layers.0.v_proj": (48, 32),
    "layers.1.q_proj": (48, 32),
    "layers.1.v_proj": (48, 32),
}
MATRIX = pa.list_(pa.list_(pa.float32()))


def rows(n_loras: int = 5, rank: int = 2, alpha: float = 4.0, seed: int = 0) -> list[dict]:
    """One dict a layer; B and A of every LoRA are Gaussian."""
    rng = np.random.default_rng(seed)
    found = []
    for name, (row, col) in SHAPES.items():
        one: dict[str, Any] = {
            "layer_model": "tiny",
            "layer_name": name,
            "pre_ft_name": "org/tiny",
            "pre_ft_weight": (0.05 * rng.standard_normal((row, col))).astype(np.float32),
        }
        for i in range(n_loras):
            one |= {
                f"lora_{i}_name": f"org/tune-{i}",
                f"lora_{i}_rank": rank,
                f"lora_{i}_alpha": alpha,
                f"lora_{i}_A_weight": (0.1 * rng.standard_normal((rank, col))).astype(np.float32),
                f"lora_{i}_B_weight": (0.1 * rng.standard_normal((row, rank))).astype(np.float32),
            }
        found.append(one)
    return found


def table(content: list[dict], **types: pa.DataType) -> pa.Table:
    """Rows as Arrow has them; ``types`` replaces the types of some columns."""
    columns = {}
    for name in content[0]:
        values = [row[name] for row in content]
        nested = [value.tolist() if isinstance(value, np.ndarray) else value for value in values]
        default = MATRIX if name.endswith("weight") else None
        columns[name] = pa.array(nested, types.get(name, default))
    return pa.table(columns)


def write(folder: Path, content: list[dict], per_file: int = 2, **types: pa.DataType) -> Path:
    """Writes ``folder/vit/train-*.parquet``, two rows a file, one a row group."""
    place = folder / "vit"
    place.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(content), per_file):
        part = table(content[start : start + per_file], **types)
        pq.write_table(part, place / f"train-{start:05d}.parquet", row_group_size=1)
    return folder
