"""Files written tensor by tensor are those of the library."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdetune.checkpoint.stream import begin_tensors, open_tensors, write_tensors
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


@pytest.mark.parametrize("first", [slice(0), slice(0, None, 3), slice(None, None, -1)])
def test_a_file_that_was_begun_is_gone_on_with(tmp_path, first):
    """Each tensor is written once, in any order, and the bytes are the same."""
    written = []

    def later(name, array):
        return Deferred(array.dtype, array.shape, lambda: written.append(name) or array)

    write_tensors(tmp_path / "whole", tensors(), {"a": "b"})
    arrays = {name: later(name, array) for name, array in tensors().items()}
    begun = begin_tensors(tmp_path / "begun", arrays, {"a": "b"}, list(arrays)[first])
    assert set(written) == begun.done == set(list(arrays)[first])
    write_tensors(tmp_path / "x", arrays, {"a": "b"}, begun)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(written) == sorted(arrays)
    assert not begun.path.exists()


def test_a_file_that_was_begun_for_other_tensors_is_not_used(tmp_path):
    begun = begin_tensors(tmp_path / "begun", tensors(), {"a": "b"}, tensors())
    rest = {name: array for name, array in tensors().items() if name != "a.scalar"}
    write_tensors(tmp_path / "whole", rest, {"a": "b"})
    write_tensors(tmp_path / "x", rest, {"a": "b"}, begun)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not begun.path.exists()


@pytest.mark.parametrize("harm", ["shorter", "longer"])
def test_a_file_that_was_begun_and_has_another_size_is_an_error(tmp_path, harm):
    rest = {"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}
    begun = begin_tensors(tmp_path / "begun", rest, {}, ["b"])
    size = begun.path.stat().st_size
    with begun.path.open("r+b") as file:
        file.truncate(size - 1 if harm == "shorter" else size + 1)
    with pytest.raises(OutputError, match="read back differs"):
        write_tensors(tmp_path / "x", rest, {}, begun)
