"""What ends a packing: the manifest, and the proof that the store gives back every file."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jdetune.errors import VerificationError
from jdetune.solving import Progress
from jdetune.zoo.reading import Blobs, decode
from jdetune.zoo.scan import Source
from jdetune.zoo.store import File, Item, Manifest, Model


def assemble(
    sources: Sequence[Source],
    scans: Sequence[Sequence[Mapping[str, Any]]],
    done: Sequence[Mapping[str, Any]],
) -> Manifest:
    """The manifest of what the jobs wrote."""
    items: list[Item] = []
    places: dict[str, int] = {}
    for entry in done:
        first = len(items)
        for value in entry["items"]:
            shape = tuple(value["shape"]) if "shape" in value else None
            of = first + value["of"] if "of" in value else None
            items.append(Item(**{**value, "shape": shape, "of": of}))
        places |= {digest: first + place for digest, place in entry["digests"].items()}
    models = []
    for source, entries in zip(sources, scans, strict=True):
        files = [
            File(e["path"], e["size"], e["sha256"], tuple(places[span[2]] for span in e["spans"]))
            for e in entries
        ]
        models.append(Model(source.name, tuple(files)))
    return Manifest(tuple(models), tuple(items))


def check(manifest: Manifest, root: Path, progress: Progress | None) -> None:
    """Decodes every file and compares its digest with the original's."""
    meter = Meter(progress, "check", sum(model.size for model in manifest.models))
    blobs = Blobs(root)
    for model in manifest.models:
        for file in model.files:
            total = hashlib.sha256()
            for part in file.parts:
                for block in decode(manifest.items, part, blobs):
                    total.update(block)
                    meter.add(len(block))
            if total.hexdigest() != file.sha256:
                raise VerificationError(
                    f"{model.name}/{file.path}: decoding does not give back what was read. Nothing "
                    "was put in place. If the file changed meanwhile, run it again; if not, please "
                    "report this."
                )


def sweep(folder: Path, keep: Collection[Path]) -> None:
    """Removes all files of a folder but some: what was not taken, or was left half done."""
    for path in folder.rglob("*"):
        if path not in keep and (path.is_symlink() or not path.is_dir()):
            path.unlink()


class Meter:
    """Adds up what is done and tells it, in megabytes."""

    def __init__(
        self, progress: Progress | None, stage: str, total: int, unit: int = 1_000_000
    ) -> None:
        self._tell: Callable[[str, int, int], None] | None = progress
        self._stage, self._unit, self._done, self._total = stage, unit, 0, -(-total // unit)

    def add(self, amount: int) -> None:
        """So much more is done."""
        self._done += amount
        if self._tell is not None:
            self._tell(self._stage, min(-(-self._done // self._unit), self._total), self._total)
