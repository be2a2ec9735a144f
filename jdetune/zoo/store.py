"""What a packed store says about itself: models, their files, and the objects these are made of.

A file is the bytes of its objects, one after another. An object is kept in a blob, a file called
like its own digest; a sibling's difference and a re-merged matrix also need another object, which
stands before it and needs none. docs/store.md has the layout.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdetune.checkpoint.writer import save_json
from jdetune.zoo.floats import WIDTH
from jdetune.zoo.paths import clash_of, problem_of
from jdetune.zoo.remerge import MAX_FACTOR
from jdetune.zoo.zstd import StoreError

SCHEMA = "jdetune.store/1"
MANIFEST, BLOBS = "manifest.json", "blobs"
#: A manifest has some 100 bytes a tensor and model.
MAX_MANIFEST = 1 << 27
MAX_COLS = 1 << 24
_MAX_SIZE = 1 << 50
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Item:
    """An object.

    Attributes:
      kind: ``plain``, ``delta`` (beside another) or ``merge`` (another plus update and residual).
      size: its bytes.
      width: bytes of an element: 1, 2, 4 or 8.
      blob: digest and name of the file that holds it.
      stored: bytes of that file.
      of: number of the object that it needs.
      shape: rows and columns, of a merge.
      rank: of the update, of a merge.
      dtype: of the elements, of a merge.
      base_dtype: of the other object's elements, of a merge.
    """

    kind: str
    size: int
    width: int
    blob: str
    stored: int
    of: int | None = None
    shape: tuple[int, int] | None = None
    rank: int | None = None
    dtype: str | None = None
    base_dtype: str | None = None

    @property
    def merged(self) -> tuple[tuple[int, int], str, str, int]:
        """Shape, dtype, the base's dtype and rank of a merge.

        Raises:
          TypeError: it is none.
        """
        if self.shape is None or self.dtype is None or self.base_dtype is None or self.rank is None:
            raise TypeError(f"a {self.kind} object is no merge")
        return self.shape, self.dtype, self.base_dtype, self.rank

    def to_json(self) -> dict[str, Any]:
        """Its fields but those that are not there."""
        found = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return {**found, "shape": list(self.shape)} if self.shape is not None else found


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a model: its path in the folder, its digest, and its objects in order."""

    path: str
    size: int
    sha256: str
    parts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model: the name of its folder, and its files."""

    name: str
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All that a store holds."""

    models: tuple[Model, ...]
    items: tuple[Item, ...]


def write_manifest(path: Path, manifest: Manifest, **said: Any) -> None:
    """Writes a manifest, with further facts that readers ignore."""
    models = [dataclasses.asdict(model) for model in manifest.models]
    objects = [item.to_json() for item in manifest.items]
    save_json(path, {"schema": SCHEMA, **said, "models": models, "objects": objects})


def read_manifest(store: Path) -> Manifest:
    """The manifest of a store, with everything in it checked that can be without decoding.

    Raises:
      StoreError: the folder is no store, or its manifest is damaged, hostile or of another schema.
    """
    path = store / MANIFEST
    content = _load(path)
    schema = content.get("schema")
    if schema != SCHEMA:
        raise StoreError(
            f"{path}: schema {str(schema)[:50]!r} is not {SCHEMA}. Give a folder that jdetune pack "
            "wrote, or use the version of jdetune that wrote it."
        )
    try:
        items: list[Item] = []
        for value in _list(content, "objects"):
            items.append(_item(value, items))
        models = tuple(_model(value, items) for value in _list(content, "models"))
        clash = clash_of([model.name.casefold() for model in models])
        if clash is not None:
            raise StoreError(f"two models are called {clash!r}")
    except StoreError as error:
        raise StoreError(
            f"{path}: {error}. It is damaged or was tampered with: copy the store again, and do "
            "not use it if you do not trust where it is from."
        ) from error
    return Manifest(models, tuple(items))


def _load(path: Path) -> dict[str, Any]:
    try:
        if path.is_symlink() or not path.is_file():
            raise StoreError(
                f"{path}: no such file. Give a folder that jdetune pack wrote; one that holds "
                ".jdetune only is not finished: give the same jdetune pack again."
            )
        if path.stat().st_size > MAX_MANIFEST:
            raise StoreError(f"{path}: larger than {MAX_MANIFEST} bytes, which no manifest is.")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{path}: not readable as JSON ({error}). Copy the store again."
        ) from error
    if not isinstance(content, dict):
        raise StoreError(f"{path}: a JSON object was expected. Copy the store again.")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _item(value: Any, before: Sequence[Item]) -> Item:
    if not isinstance(value, dict):
        raise StoreError("an object is not a JSON object")
    kind, width = value.get("kind"), value.get("width")
    if kind not in ("plain", "delta", "merge") or width not in (1, 2, 4, 8):
        raise StoreError("an object is of an unknown kind")
    fields = ("kind", "size", "width", "blob", "stored")
    own = {
        "plain": fields,
        "delta": (*fields, "of"),
        "merge": (*fields, "of", "shape", "rank", "dtype", "base_dtype"),
    }[kind]
    if set(value) != set(own):
        raise StoreError(f"a {kind} object has other fields than {', '.join(own)}")
    if not isinstance(value["blob"], str) or not _DIGEST.fullmatch(value["blob"]):
        raise StoreError("a blob is not called like a digest")
    size, stored = _count(value["size"], "size"), _count(value["stored"], "stored")
    item = Item(kind, size, width, value["blob"], stored)
    if kind == "plain":
        return item
    of = _count(value["of"], "of")
    if of >= len(before) or before[of].kind != "plain":
        raise StoreError("an object needs one that does not stand before it, or is no plain one")
    if kind == "delta":
        if (before[of].size, before[of].width) != (size, width) or size % width or width == 1:
            raise StoreError("a delta object has another size than what it needs")
        return dataclasses.replace(item, of=of)
    shape = value["shape"]
    if not isinstance(shape, list) or len(shape) != 2:
        raise StoreError("a merge object has no shape")
    rows, cols = (_count(side, "shape") for side in shape)
    rank = _count(value["rank"], "rank")
    dtype, base_dtype = value["dtype"], value["base_dtype"]
    if not (isinstance(dtype, str) and isinstance(base_dtype, str)):
        raise StoreError("a merge object has no dtype")
    if dtype not in WIDTH or base_dtype not in WIDTH or WIDTH[dtype] != width:
        raise StoreError("a merge object has an unknown dtype")
    fits = rows * cols * width == size and rows * cols * WIDTH[base_dtype] == before[of].size
    if not fits or not 0 < cols <= MAX_COLS or rank * (rows + cols) > MAX_FACTOR:
        raise StoreError("a merge object has another shape than what it needs, or is too large")
    return dataclasses.replace(
        item, of=of, shape=(rows, cols), rank=rank, dtype=dtype, base_dtype=base_dtype
    )


def _model(value: Any, items: Sequence[Item]) -> Model:
    if not isinstance(value, dict) or set(value) != {"name", "files"}:
        raise StoreError("a model has other fields than name, files")
    name = value["name"]
    if not isinstance(name, str) or "/" in name or name.startswith(".") or problem_of(name):
        raise StoreError(f"model name {str(name)[:80]!r} names no folder")
    files = tuple(_file(entry, items) for entry in _list(value, "files"))
    clash = clash_of([file.path for file in files])
    if clash is not None:
        raise StoreError(f"path {clash!r} stands twice, or is a file and a folder")
    return Model(name, files)


def _file(value: Any, items: Sequence[Item]) -> File:
    if not isinstance(value, dict) or set(value) != {"path", "size", "sha256", "parts"}:
        raise StoreError("a file has other fields than path, size, sha256, parts")
    path, digest = value["path"], value["sha256"]
    problem = problem_of(path) if isinstance(path, str) else "is no text"
    if problem is not None:
        raise StoreError(f"path {str(path)[:80]!r} {problem}")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise StoreError(f"sha256 of {path!r} is none")
    parts = tuple(_count(part, "parts") for part in _list(value, "parts"))
    size = _count(value["size"], "size")
    if any(part >= len(items) for part in parts) or sum(items[p].size for p in parts) != size:
        raise StoreError(f"the parts of {path!r} do not make up its size")
    return File(path, size, digest, parts)


def _list(value: dict[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list):
        raise StoreError(f"{key} is not a list")
    return found


def _count(value: Any, key: str) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_SIZE:
        raise StoreError(f"{key} is not a count")
    return value
