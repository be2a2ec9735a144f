"""Inputs from files: plain text, a line each, or JSON lines with answers, topics or token ids."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdetune.checkpoint.files import opened
from jdetune.checkpoint.strict_json import parse_object
from jdetune.errors import InputError
from jdetune.models.text import Codec, pad_batch

_MAX_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Text:
    """One input.

    Attributes:
      text: as a person reads it.
      ids: its tokens.
      given: how many of them are given; the rest is the answer.
      words: each token as text.
      topic: if it is known.
    """

    text: str
    ids: tuple[int, ...]
    given: int
    words: tuple[str, ...]
    topic: str | None = None


def read_texts(path: str | Path, tokenizer: Callable[[], Codec], limit: int) -> list[Text]:
    """Reads inputs.

    Args:
      path: a ``.jsonl`` file of objects with "text", or "prompt" and "answer", or "ids" and
        "given", each with a "topic" if there is one; any other file is text, an input a line.
      tokenizer: gives the model's; asked only where there is text.
      limit: tokens of an input at most; the rest is cut off.

    Raises:
      InputError: the file or a line cannot be read; names the line.
    """
    path, codec, found = Path(path), functools.cache(tokenizer), []
    for number, line in _lines(path):
        entry: dict[str, Any] = {"text": line}
        if path.suffix == ".jsonl":
            entry = parse_object(line.encode(), f"{path}, line {number}")
        found.append(_text(entry, codec, limit, f"{path}, line {number}"))
    if not found:
        raise InputError(f"{path}: no inputs in it. One a line is expected.")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with opened(path) as source:
        if source.stamp.size > _MAX_BYTES:
            raise InputError(
                f"{path}: {source.stamp.size} bytes are too many. Give a sample of it."
            )
        data = source.bytes(0, source.stamp.size)
    try:
        whole = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is no UTF-8 text ({error}). Convert it.") from error
    return ((n, line) for n, line in enumerate(whole.splitlines(), 1) if line.strip())


def _text(entry: dict[str, Any], codec: Callable[[], Codec], limit: int, where: str) -> Text:
    topic = entry.get("topic")
    if topic is not None and not isinstance(topic, str):
        raise InputError(f"{where}: topic is text.")
    if "ids" in entry:
        ids = entry["ids"]
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
            raise InputError(f"{where}: ids is a list of numbers.")
        given = entry.get("given", len(ids))
        if not isinstance(given, int) or not 0 <= given <= len(ids):
            raise InputError(f"{where}: given is how many of the ids are not the answer.")
        words = tuple(f" {i}" for i in ids[:limit])
        shown = "".join(words).strip()
        return Text(shown, tuple(ids[:limit]), min(given, limit), words, topic)
    parts = [entry.get("prompt", entry.get("text")), entry.get("answer", "")]
    if not all(isinstance(part, str) for part in parts) or not parts[0]:
        raise InputError(f'{where}: an object with "text", "prompt" or "ids" is expected.')
    encode, decode = codec().encode, codec().decode
    prompt, whole = list(encode(parts[0])), list(encode("".join(parts)))
    shared = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
        min(len(prompt), len(whole)),
    )
    given = shared if parts[1] else len(whole)
    ids = whole[:limit]
    words = tuple(decode([i]) for i in ids)
    return Text("".join(parts), tuple(ids), min(given, limit), words, topic)


def text_batches(
    texts: Sequence[Text], size: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of one height: which texts, ids, places that hold tokens, and that hold answers."""
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        ids, valid = pad_batch([text.ids for text in part], rows=size)
        given = np.array([text.given for text in part] + [0] * (size - len(part)))
        answer = valid & (np.arange(ids.shape[1]) >= given[:, None])
        yield slice(start, start + len(part)), ids, valid, answer
