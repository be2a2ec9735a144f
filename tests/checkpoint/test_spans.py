"""Stretches of safetensors files cover them; odd files are one stretch."""

import json

import numpy as np
import pytest

from jdetune.checkpoint import save_safetensors
from jdetune.checkpoint.chunks import save_by_content, save_chunks
from jdetune.checkpoint.spans import Span, read_range, spans
from jdetune.errors import InputError, VerificationError


def raw(path, header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return spans(path, path.stat().st_size)


def entry(start, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape} | {
        "data_offsets": [start, end]
    }


def test_spans_cover_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"a": np.ones((3, 2), np.float32), "b": np.zeros((0, 4)), "c": np.arange(5)}
    save_safetensors(path, tensors)
    found = spans(path, path.stat().st_size)
    assert [s.name for s in found] == [None, "c", "a"]
    assert found[2][2:] == ("a", "float32", (3, 2))
    data = b"".join(b"".join(read_range(path, s.start, s.size, 7)) for s in found)
    assert data == path.read_bytes()


def test_gaps_and_what_follows_are_spans(tmp_path):
    found = raw(tmp_path / "a.safetensors", {"a": entry(2, 4), "b": entry(6, 8)}, bytes(11))
    assert [(s.name, s.size) for s in found[1:]] == [
        *[(None, 2), ("a", 2), (None, 2), ("b", 2), (None, 3)]
    ]


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 4), "b": entry(2, 6)},  # overlap
        {"a": entry(0, 40)},  # beyond the end
        {"a": entry(4, 2)},
        {"a": entry(-4, 2)},
        {"a": entry(0, 4, "F32", [2])},
        {"a": entry(0, 4, "F99")},
        {"a": entry(0, 4, "F32", [True])},
        {"a": {"dtype": "U8"}},
        {"a": 3},
        [1],
        b"no json",
        b"[" * 100_000,
        b"{}",
    ],
)
def test_odd_files_are_one_span(tmp_path, header):
    path = tmp_path / "a.safetensors"
    found = raw(path, header, bytes(8))
    assert sum(s.size for s in found) == path.stat().st_size
    assert all(s.name is None for s in found)


def test_a_header_that_claims_too_much_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    for length in (0, 2**63, 2**40, 100):
        assert raw(path, {"a": entry(0, 4)}, bytes(4), length) == [Span(0, path.stat().st_size)]
    path.write_bytes(b"")
    assert spans(path, 0) == []


def test_other_files_are_one_span(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    assert spans(path, 2) == [Span(0, 2)]


def test_a_file_that_became_shorter_is_an_error(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    with pytest.raises(InputError, match="shorter"):
        list(read_range(path, 1, 5, 2))


def test_chunks_are_whole_or_not_there(tmp_path):
    digest = save_chunks(tmp_path / "x" / "a", [b"ab", b"", b"c"])
    assert (tmp_path / "x" / "a").read_bytes() == b"abc"
    assert save_by_content(tmp_path, [b"abc"]) == (digest, 3)
    assert (tmp_path / digest[:2] / digest).read_bytes() == b"abc"
    with pytest.raises(VerificationError):
        save_chunks(tmp_path / "b", [b"abd"], digest)

    def failing():
        yield b"a"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_chunks(tmp_path / "b", failing())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["x", digest[:2]])
