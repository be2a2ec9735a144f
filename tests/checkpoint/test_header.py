"""Headers: what safetensors accepts is read the same, and what does not fit the file is refused."""

import json
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from jdetune import pipeline
from jdetune.checkpoint import open_checkpoint, read_tensor
from jdetune.checkpoint.header import BITS, read_header
from jdetune.errors import InputError
from tests import pico

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path, header, n_bytes, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = (len(text) if length is None else length).to_bytes(8, "little")
    path.write_bytes(start + text + bytes(range(n_bytes)))
    return path


def entry(**changes):
    return {"a": {**F32, **changes}}


REFUSED = {
    "empty": (b"", 0, "not a whole"),
    "terabytes": (b"{}", 0, "claimed in a file of", 2**42),
    "negative": (b"{}", 0, "claimed in a file of", 2**64 - 1),
    "array": (b"[]", 0, "does not start with"),
    "space": (b' {"a": 1}', 0, "does not start with"),
    "no JSON": (b"{", 0, "not readable as JSON"),
    "not UTF-8": (b'{"\xff": 1}', 0, "not readable as JSON"),
    "twice": (b'{"a": %s, "a": %s}' % (b"{}", b"{}"), 0, "key a twice"),
    "twice inside": (b'{"a": {"dtype": "F32", "dtype": "F32"}}', 0, "key dtype twice"),
    "deep": (b'{"a":' * 5000 + b"1" + b"}" * 5000, 0, "levels"),
    "deep lists": (b'{"a":' + b"[" * 200_000, 0, "levels"),
    "many": (b'{"a":[' + b"0," * 4_000_001 + b"0]}", 0, "values in its JSON"),
    "NaN": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', 4, "no JSON"),
    "long integer": (b'{"a": ' + b"9" * 10_000 + b"}", 0, "not readable as JSON"),
    "entry": ({"a": [1, 2]}, 8, "alone"),
    "field missing": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "alone"),
    "field more": (entry(strides=[1]), 8, "alone"),
    "word": (entry(dtype=32), 8, "is no word"),
    "odd word": (entry(dtype="F32\x1b[2J"), 8, "is no word"),
    "shape": (entry(shape=2), 8, "list of at most 64 sizes"),
    "negative side": (entry(shape=[-2, -1]), 8, "list of at most 64 sizes"),
    "float side": (entry(shape=[2.0]), 8, "list of at most 64 sizes"),
    "bool side": (entry(shape=[True, 2]), 8, "list of at most 64 sizes"),
    "axes": (entry(shape=[1] * 65), 8, "list of at most 64 sizes"),
    "wrap": (entry(shape=[2**32, 2**32 + 2]), 8, "any memory|takes"),
    "wrap zero": (entry(shape=[2**62, 2**62, 0], data_offsets=[0, 0]), 0, "any memory"),
    "offsets": (entry(data_offsets=[0]), 8, "first and a last byte"),
    "reversed": (entry(data_offsets=[8, 0]), 8, "first and a last byte"),
    "short": (entry(data_offsets=[0, 4]), 4, "has 4 bytes, not what"),
    "gap": (entry(data_offsets=[4, 12]), 12, "gap"),
    "overlap": ({**entry(), "b": F32}, 8, "overlaps"),
    "past the end": (entry(), 4, "describes"),
    "rest": (entry(), 12, "describes"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "metadata is not text"),
    "metadata list": ({"__metadata__": [1]}, 0, "metadata is not text"),
    "long name": ({"a" * 1001: F32}, 8, "too long"),
    "parts": ({"a." * 64: F32}, 8, "too long"),
    "half a character": (b'{"\\ud800": %s}' % json.dumps(F32).encode(), 8, "no text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_does_not_describe_the_file(tmp_path, case):
    header, n_bytes, words, *length = REFUSED[case]
    path = write(tmp_path / "x.safetensors", header, n_bytes, *length)
    tracemalloc.start()
    with pytest.raises(InputError, match=words) as caught:
        open_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 + 10 * path.stat().st_size
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


def test_a_good_header_is_read_as_the_library_does(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"m": rng.standard_normal((3, 4)), "s": np.array(2.5, np.float32)}
    tensors |= {"z": np.zeros((0, 7), np.float16), "i": np.arange(5), 'q"\\\n\u00e9': np.ones(3)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"format": "pt"})
    found = open_checkpoint(path)
    with safe_open(path, "np") as handle:
        assert list(found.tensors) == list(handle.offset_keys())
        assert dict(read_header(path).metadata) == handle.metadata()
        for name in tensors:
            ours, theirs = read_tensor(found, name), handle.get_tensor(name)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("word", [*BITS, "F128", "MX_9"])
def test_every_word_has_the_librarys_size(tmp_path, word):
    bits = BITS.get(word)
    n_bytes = (8 if bits is None else bits) * 3
    header = {"a": {"dtype": word, "shape": [24], "data_offsets": [0, n_bytes]}}
    path = write(tmp_path / "x.safetensors", header, n_bytes)
    info = open_checkpoint(path).tensors["a"]
    assert info.n_bytes == n_bytes
    if bits is not None:
        with safe_open(path, "np") as handle:
            assert handle.get_slice("a").get_shape() == [24]
    if not info.is_known:
        with pytest.raises(InputError, match=f"dtype {word} is not known"):
            read_tensor(open_checkpoint(path), "a")


def test_nothing_is_allocated_for_a_claim(tmp_path):
    header = {"a": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}
    path = write(tmp_path / "x.safetensors", header, 8)
    tracemalloc.start()
    with pytest.raises(InputError, match="describes 1099511627"):
        open_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def with_odd_tensor(path, word, n_bytes):
    """Adds a tensor of 24 elements of a dtype that NumPy does not have."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header, size = json.loads(data[8:end]), len(data) - end
    header["odd"] = {"dtype": word, "shape": [24], "data_offsets": [size, size + n_bytes]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:] + bytes(n_bytes))


@pytest.mark.parametrize(("word", "n_bytes"), [("F4", 12), ("F8_E8M0", 24), ("NEW_9", 27)])
def test_other_dtypes_are_reported_and_the_rest_is_recovered(tmp_path, word, n_bytes):
    family = pico.make(tmp_path / "zoo")
    for path in family.paths:
        with_odd_tensor(path / "model.safetensors", word, n_bytes)
    report = pipeline.run(family.paths, tmp_path / "out", recover_fn=pico.truth_teller(family.base))
    odd = next(t for t in report["tensors"] if t["name"] == "odd")
    assert (odd["status"], odd["dtype"]) == ("skipped", word)
    assert f"dtype {word} is not known" in odd["reason"]
    assert report["summary"]["exit_code"] == 5
    assert report["summary"]["recovered"] == 4
    assert set(open_checkpoint(tmp_path / "out" / "base").tensors) == set(family.base)
    assert any("the base lacks 1 tensor(s), e.g. odd" in text for text in report["warnings"])


def test_zero_sizes_scalars_and_missing_tensors_are_accounted_for(tmp_path):
    family = pico.make(tmp_path / "zoo", n_models=4)
    for k, (path, model) in enumerate(zip(family.paths, family.models, strict=True)):
        more = {"empty": np.zeros((0, 5), np.float32), "scalar": np.array(k, np.float32)}
        more |= {"hollow": np.zeros((k, 0), np.float16)} if k else {}
        pico.write(path, {**model, **more})
    teller = pico.truth_teller(family.base)
    report = pipeline.run(family.paths, tmp_path / "out", recover_fn=teller)
    status = {t["name"]: t["status"] for t in report["tensors"]}
    assert status["empty"] == "identical"
    assert status["scalar"] == "per_model"
    assert status["hollow"] == "skipped"
    assert set(status) == set(family.base) | {"empty", "scalar", "hollow"}
