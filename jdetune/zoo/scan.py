"""Every file of the models to pack: its stretches, and the digests of both."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jdetune import outfolder
from jdetune.checkpoint.index import Checkpoint, open_checkpoint
from jdetune.checkpoint.reader import numpy_dtype
from jdetune.checkpoint.spans import Span, read_range, spans
from jdetune.errors import InputError
from jdetune.zoo.paths import problem_of
from jdetune.zoo.zstd import Counter

_BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to pack.

    Attributes:
      name: of its folder in the store.
      path: folder or file that was given.
      files: path in the folder to size and time of change, in order.
      checkpoint: its headers; without tensors if it cannot be read as merged weights.
      reason: why it cannot.
    """

    name: str
    path: Path
    files: Mapping[str, tuple[int, int]]
    checkpoint: Checkpoint
    reason: str | None = None

    def file(self, path: str) -> Path:
        """Where a file of it lies."""
        return self.path if self.path.is_file() else self.path / path

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())


def open_sources(models: Sequence[str | Path]) -> list[Source]:
    """Lists the files of every model.

    Raises:
      InputError: a path is missing or empty, or a file is none that a store can hold.
    """
    found = []
    for path in map(Path, models):
        if not path.exists():
            raise InputError(f"{path}: no such file or directory. Give folders or files of models.")
        try:
            checkpoint, reason = open_checkpoint(path), None
        except InputError as error:
            stem = path.stem if path.is_file() else path.resolve().name
            checkpoint = Checkpoint(stem, path, {}, (), {}, (), path)
            reason = str(error)
        found.append((path, checkpoint, reason))
    names = outfolder.model_names([checkpoint for _, checkpoint, _ in found])
    return [
        Source(name, path, _list_files(path), dataclasses.replace(checkpoint, name=name), reason)
        for name, (path, checkpoint, reason) in zip(names, found, strict=True)
    ]


def scan(source: Source, level: int | None, step: Callable[[int], None]) -> list[dict[str, Any]]:
    """Digests of a model's files and of their stretches.

    Args:
      source: the model.
      level: of zstandard, to measure what each file takes alone; None not to.
      step: told of bytes read.

    Returns:
      For every file ``path``, ``size``, ``sha256``, ``alone`` (bytes compressed alone) and
      ``spans``, each a list of start, size, digest, tensor name, dtype and shape.
    """
    entries = []
    for path, (size, _) in source.files.items():
        file = source.file(path)
        whole, found = hashlib.sha256(), []
        counter = None if level is None else Counter(level)
        for span in spans(file, size):
            own = hashlib.sha256()
            for block in read_range(file, span.start, span.size, _BLOCK):
                own.update(block)
                whole.update(block)
                if counter is not None:
                    counter.add(block)
                step(len(block))
            facts = [span.start, span.size, own.hexdigest(), span.name, span.dtype]
            found.append([*facts, list(span.shape)])
        alone = None if counter is None else counter.end()
        entry = {"path": path, "size": size, "sha256": whole.hexdigest(), "alone": alone}
        entries.append({**entry, "spans": found})
    check_unchanged(source)
    return entries


def check_unchanged(source: Source) -> None:
    """Raises InputError if files of a model came, went or changed since they were listed."""
    if _list_files(source.path) != dict(source.files):
        raise InputError(
            f"{source.path}: files in it changed while it was read. Run it again when nothing "
            "writes there."
        )


def width_of(span: Span) -> int:
    """Bytes of an element of a stretch; 1 where it is no tensor of a usual width."""
    width = numpy_dtype(span.dtype).itemsize if span.dtype is not None else 1
    return width if width in (2, 4, 8) else 1


def _list_files(path: Path) -> dict[str, tuple[int, int]]:
    if path.is_file():
        return {path.name: _facts(path, path.name)}
    found = {}
    for folder, folders, files in os.walk(path, onerror=_refuse):
        folders.sort()
        for name in folders:
            if (Path(folder) / name).is_symlink():
                raise InputError(
                    f"{Path(folder) / name}: a link to a folder. Copy what it points to, or "
                    "remove it."
                )
        for name in files:
            file = Path(folder) / name
            relative = file.relative_to(path).as_posix()
            _check_link(path, file)
            found[relative] = _facts(file, relative)
    if not found:
        raise InputError(f"{path}: holds no file. Give a model's folder.")
    return dict(sorted(found.items()))


def _facts(file: Path, relative: str) -> tuple[int, int]:
    problem = problem_of(relative)
    if problem is not None:
        raise InputError(f"{str(file)!r} cannot be packed: its name {problem}. Rename or move it.")
    if not file.is_file():
        raise InputError(f"{file}: no regular file. Remove it, or pack a copy of the model.")
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _check_link(root: Path, file: Path) -> None:
    """Allows links within the model, and those of a hub cache from a snapshot to its blobs."""
    if not file.is_symlink():
        return
    target, real = file.resolve(), root.resolve()
    blobs = real.parent.parent / "blobs"
    in_cache = real.parent.name == "snapshots" and target.is_relative_to(blobs)
    if not (target.is_relative_to(real) or in_cache):
        raise InputError(
            f"{file}: a link to {target}, outside of the model. Copy the file there, if it "
            "belongs to the model, or remove the link."
        )


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read ({error}). Check the rights.")
