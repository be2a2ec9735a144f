"""Files written tensor by tensor are those of the library."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdetune.checkpoint.stream import open_tensors, write_tensors
from jdetune.deferred import Deferred
from jdetune.errors import OutputError

DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "float16", "int32", "uint32", "float32"]
DTYPES += ["int64", "uint64", "float64"]


def tensors():
    rng = np.random.default_rng(0)
    made = {
        f"{k}.{d}": (9 * rng.standard_normal((3, k + 1))).astype(d) for k, d in enumerate(DTYPES)
    }
    made['caf\u00e9 "quoted"\\'] = rng.standard_normal(5).astype(ml_dtypes.bfloat16)
    made["a.scalar"], made["z.empty"] = np.array(3.5, np.float32), np.zeros((0, 4), np.float16)
    return made


def test_bytes_are_those_of_the_library(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_tensors(ours, tensors(), {"format": "pt"})
    save_file(tensors(), theirs, metadata={"format": "pt"})
    assert ours.read_bytes() == theirs.read_bytes()


def test_tensors_are_read_one_at_a_time_and_come_back(tmp_path):
    alive = []

    def later(array):
        return Deferred(array.dtype, array.shape, lambda: alive.append(1) or array)

    path = tmp_path / "x"
    write_tensors(path, {name: later(array) for name, array in tensors().items()}, {"a": "b"})
    assert len(alive) == len(tensors())
    found, metadata = open_tensors(path)
    assert metadata == {"a": "b"}
    for name, array in tensors().items():
        assert found[name].shape == array.shape
        assert np.asarray(found[name]).tobytes() == array.tobytes()
    assert load_file(path)["a.scalar"] == 3.5


def test_a_tensor_that_changes_its_size_is_an_error(tmp_path):
    lying = Deferred(np.dtype("float32"), (3,), lambda: np.ones(2, np.float32))
    with pytest.raises(OutputError, match="changed its size"):
        write_tensors(tmp_path / "x", {"lying": lying}, {})
