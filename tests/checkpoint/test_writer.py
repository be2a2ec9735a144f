import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from jdetune.checkpoint import (
    open_checkpoint,
    read_tensor,
    save_json,
    save_like,
    save_safetensors,
    stream,
)
from jdetune.errors import OutputError
from tests import pico

GRID = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize(
    "array",
    [GRID.T, np.asfortranarray(GRID), GRID[:, ::2], GRID[::-1], np.broadcast_to(GRID[0], (3, 4))],
    ids=["transpose", "fortran", "strided", "reversed", "broadcast"],
)
def test_any_memory_order_is_written_right(tmp_path, array):
    save_safetensors(tmp_path / "a.safetensors", {"x": array})
    np.testing.assert_array_equal(load_file(tmp_path / "a.safetensors")["x"], array)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_dtypes_and_shapes_come_back(tmp_path, dtype):
    tensors = {"m": GRID.astype(dtype), "s": np.array(3, dtype), "e": np.zeros((0, 4), dtype)}
    path = pico.write(tmp_path / "m", tensors)
    checkpoint = open_checkpoint(path)
    for name, array in tensors.items():
        read = read_tensor(checkpoint, name)
        assert read.dtype == array.dtype
        assert read.shape == array.shape
        assert read.tobytes() == array.tobytes()


def test_header_says_pt(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"x": GRID})
    with safe_open(tmp_path / "a.safetensors", "np") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_a_write_that_reads_back_wrong_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"x": GRID})
    monkeypatch.setattr(stream, "_digest", lambda file, size: file.read(size) and b"other")
    with pytest.raises(OutputError, match="x read back differs"):
        save_safetensors(path, {"x": GRID})
    np.testing.assert_array_equal(load_file(path)["x"], GRID)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_save_like_keeps_shards_and_side_files(tmp_path):
    tensors = {f"l{i}.weight": GRID + i for i in range(5)}
    template = open_checkpoint(pico.write(tmp_path / "m", tensors, shards=2))
    (tmp_path / "m" / "old.safetensors.index.json").write_text("{}")
    out = tmp_path / "out"
    count = save_like(
        template, out, lambda n: None if n == "l4.weight" else read_tensor(template, n) + 1
    )
    written = open_checkpoint(out)
    assert written.files == template.files
    assert count == written.n_parameters == 48
    assert set(written.tensors) == set(tensors) - {"l4.weight"}
    text = (out / "model.safetensors.index.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert json.loads(text)["metadata"] == {"total_parameters": 48, "total_size": 192}
    rest = {p.name for p in out.iterdir()} - {*written.files, "model.safetensors.index.json"}
    assert rest == {"config.json", "tokenizer.json", "vocab.txt"}
    np.testing.assert_array_equal(read_tensor(written, "l3.weight"), GRID + 4)


def test_save_like_names_a_single_file_model(tmp_path):
    save_safetensors(tmp_path / "odd.safetensors", {"x.weight": GRID})
    template = open_checkpoint(tmp_path / "odd.safetensors")
    save_like(template, tmp_path / "out", lambda n: read_tensor(template, n))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
