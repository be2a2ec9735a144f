"""Zoos on disk for tests of packing, and comparison of folders."""

import json
from pathlib import Path

import numpy as np

from tests import pico


def zoo(root: Path, n_models: int = 3, dtype: type = np.float32) -> pico.Pico:
    """A family with what real folders hold besides: subfolders, odd files, odd headers."""
    family = pico.make(root, n_models, dtype=dtype)
    for index, path in enumerate(family.paths):
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text('{"a": 1}')
        (path / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        (path / "empty").touch()
        (path / "notes.bin").write_bytes(np.random.default_rng(index).bytes(5000))
        (path / "broken.safetensors").write_bytes(b"\xff" * 100)
    return family


def unusual_header(path: Path) -> None:
    """Rewrites a safetensors file with another key order, padding, metadata and a gap."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    turned = {name: header[name] for name in sorted(header, reverse=True)}
    turned["__metadata__"] = {"format": "pt", "by": "é\n"}
    for info in header.values():
        info["data_offsets"] = [offset + 12 for offset in info["data_offsets"]]
    text = json.dumps(turned, indent=1).encode() + b" " * 37
    body = b"gap of bytes" + data[8 + length :]
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def files_of(root: Path) -> dict[str, bytes]:
    """Every regular file below a folder, by its path."""
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def same(paths: list[Path], out: Path) -> bool:
    """Whether every model's folder came back, and nothing else."""
    names = sorted(p.name for p in paths)
    return sorted(p.name for p in out.iterdir()) == names and all(
        files_of(p) == files_of(out / p.name) for p in paths
    )
