"""Damages files in many ways, the same for a seed: bytes, lengths, JSON, and what the file is."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

INTEGERS = [0, -1, 1, 3, 7, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400]
TEXTS = ["", ".", "..", "../x", "/etc/passwd", "a\\b", "a/b", "\0", "\x1b[2J", "\u202e", "\ud800"]
TEXTS += ["con", "nul.safetensors", "x" * 3000, "<script>alert(1)</script>", "__metadata__", "a.b"]
TEXTS += ["F32", "F16", "BF16", "F4", "F8_E8M0", "I64", "C64", "F99", "model.safetensors", "(a+)+$"]
TEXTS += ["../../evil.safetensors", "model-00001-of-00002.safetensors", "{", "quantized", "LORA"]
OTHERS: list[Any] = [
    None,
    True,
    False,
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [0] * 70,
]


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def extend(rng: random.Random, data: bytes) -> bytes:
    return data + rng.randbytes(rng.choice([1, 8, 4096]))


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    near = rng.choice([16, 400, len(data)])
    for _ in range(rng.choice([1, 1, 2, 8, 64]) if data else 0):
        changed[rng.randrange(min(near, len(changed)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def splice(rng: random.Random, data: bytes) -> bytes:
    start, length, target = (rng.randrange(len(data) + 1) for _ in range(3))
    piece = data[start : start + min(length, rng.choice([4, 64, 4096]))]
    return data[:target] + piece + data[target + rng.choice([0, len(piece)]) :]


def noise(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    piece = rng.randbytes(rng.choice([1, 8, 64]))
    return data[:start] + piece + data[start + len(piece) :]


def cut_out(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice([1, 2, 8, 100]) :]


def claim(rng: random.Random, data: bytes) -> bytes:
    """Another length in the first eight bytes."""
    near = int.from_bytes(data[:8], "little") + rng.choice([-8, -1, 1, 8, 1000])
    value = rng.choice([near, *INTEGERS[:12]])
    return (value % 2**64).to_bytes(8, "little") + data[8:]


def deepen(rng: random.Random, data: bytes) -> bytes:
    depth = rng.choice([50, 101, 1000, 100_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    text = b'{"a":' + opening * depth + b"1" + closing * rng.choice([0, depth]) + b"}"
    return _with_text(data, text)


def twice(rng: random.Random, data: bytes) -> bytes:
    """The JSON's first pair once more."""
    text = _text_of(data).strip()
    end = text.find(b",")
    return _with_text(data, text[: end + 1] + text[1:]) if end > 0 else data


def edit(rng: random.Random, data: bytes) -> bytes:
    """Other values, keys and types in the JSON, which stays JSON."""
    try:
        value = json.loads(_text_of(data))
    except ValueError:
        return flip_bits(rng, data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        value = _edited(rng, value)
    return _with_text(data, json.dumps(value).encode())


def _edited(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.08:
            return {k: v for k, v in value.items() if k != key}
        if action < 0.2:
            return {rng.choice(TEXTS) if k == key else k: v for k, v in value.items()}
        if action < 0.28:
            return {**value, rng.choice(TEXTS): value[key]}
        return {**value, key: _edited(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [_edited(rng, v) if i == place else v for i, v in enumerate(value)]
    if isinstance(value, int) and rng.random() < 0.8:
        return rng.choice([value + rng.choice([-8, -4, 4, 8]), value * 2, *INTEGERS])
    if isinstance(value, str) and rng.random() < 0.8:
        return rng.choice(TEXTS)
    return rng.choice([rng.choice(INTEGERS), rng.choice(TEXTS), *OTHERS])


BYTES: list[Callable[[random.Random, bytes], bytes]] = [
    *(truncate, extend, flip_bits, flip_bits, splice, noise, cut_out, claim, deepen, twice),
    *(edit,) * 8,
]


def damage(rng: random.Random, path: Path) -> str:
    """Damages a file or puts something else in its place; returns what was done."""
    if rng.random() < 0.03:
        return replace(rng, path)
    change = rng.choice(BYTES)
    data = path.read_bytes()
    path.write_bytes(change(rng, data))
    return change.__name__


def replace(rng: random.Random, path: Path) -> str:
    path.unlink()
    kind = rng.choice(["nothing", "folder", "pipe", "out", "itself", "sparse"])
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "out":
        path.symlink_to("/etc/hostname")
    elif kind == "itself":
        path.symlink_to(path.name)
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 2**40)
    return kind


def _is_json(data: bytes) -> bool:
    return data.lstrip()[:1] == b"{"


def _text_of(data: bytes) -> bytes:
    """The JSON of a JSON file, or of a header."""
    if _is_json(data):
        return data
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def _with_text(data: bytes, text: bytes) -> bytes:
    """The file with another JSON, whose length is right."""
    if _is_json(data):
        return text
    rest = data[8 + int.from_bytes(data[:8], "little") :]
    return len(text).to_bytes(8, "little") + text + rest
