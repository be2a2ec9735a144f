"""JSON that would cost more than it is worth is refused before it is parsed."""

import json
import time

import pytest

from jdetune.checkpoint.strict_json import MAX_DEPTH, is_deep, parse_object
from jdetune.errors import InputError


def test_what_the_library_reads_is_read(tmp_path):
    value = {"a": [1, 2.5, None, True, '\u00e9 " \\ [[{{'], "b": {"c": {}}, "limit": float("inf")}
    assert parse_object(json.dumps(value).encode(), "x") == value
    assert parse_object(json.dumps(value, ensure_ascii=False).encode(), "x") == value
    with pytest.raises(InputError, match="Infinity is no JSON"):
        parse_object(json.dumps(value).encode(), "x", constants=False)


@pytest.mark.parametrize("levels", [MAX_DEPTH - 1, MAX_DEPTH, MAX_DEPTH + 1, 3000])
def test_levels_are_counted(levels):
    text = b'{"a":' * levels + b"{}" + b"}" * levels
    assert is_deep(text) == (levels + 1 > MAX_DEPTH)
    strings = b'{"' + b"[{" * levels + b'\\"' + b"[" * levels + b'": 1}'
    assert not is_deep(strings)
    assert parse_object(strings, "x")


@pytest.mark.parametrize(
    "text",
    [b'{"' + b'\\"' * 2_000_000, b'{"a":' * 900_000, b"{" + b'"\\' * 2_000_000, b'{"":' + b"[" * 9],
    ids=["quotes", "levels", "backslashes", "open"],
)
def test_hostile_texts_take_linear_time(text):
    clock = time.process_time()
    with pytest.raises(InputError):
        parse_object(text, "x")
    assert time.process_time() - clock < 3  # quadratic would take hours


def test_only_objects(tmp_path):
    for text in (b"[]", b"1", b'"x"', b"null", b"", b"\xef\xbb\xbf{}"):
        with pytest.raises(InputError):
            parse_object(text, "x")
