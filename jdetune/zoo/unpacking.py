"""A store in, every original file out."""

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jdetune import outfolder
from jdetune.checkpoint.chunks import digest_file, save_chunks
from jdetune.errors import InputError, OutputError, VerificationError
from jdetune.solving import Progress
from jdetune.zoo.finishing import Meter, sweep
from jdetune.zoo.reading import Blobs, decode
from jdetune.zoo.store import MANIFEST, File, Manifest, Model, read_manifest
from jdetune.zoo.zstd import StoreError, library


def run(
    store: str | Path,
    out: str | Path,
    only: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the models of a store, each into a folder of its name, byte for byte as they were.

    Args:
      store: folder that ``packing.run`` wrote.
      out: folder to write; built in OUT/.jdetune and put in place at the end.
      only: names of models; all if empty.
      progress: told of every step.

    Returns:
      What was written.

    Raises:
      StoreError: the store is damaged or hostile.
      VerificationError: a blob or a file has another digest than the store says.
      OutputError: OUT cannot be used, or the disk is too small; nothing is put in place.
    """
    store, out, begin = Path(store), Path(out), time.monotonic()
    library()
    manifest = read_manifest(store)
    models = chosen(store, manifest, only)
    names = [model.name for model in models]
    if not (outfolder.finish_placing(out) and _is_all_done(out, models)):
        outfolder.check_out(out, [store], overwrite=False)
        _check_room(models, out)
        blobs = _check_blobs(manifest, models, store, progress)
        state = {"store": {"manifest": digest_file(store / MANIFEST)}, "models": {"names": names}}
        stage = outfolder.start_stage(out, state)
        try:
            _write_all(manifest, models, blobs, stage, progress)
        except (StoreError, VerificationError):
            outfolder.drop_stage(out)
            raise
        root = stage / outfolder.SOLVED
        for name in names:
            (root / name).rename(stage / name)
        outfolder.place(out, stage, names)
    return _said(store, out, models, time.monotonic() - begin)


def describe(store: str | Path, only: Sequence[str] = ()) -> dict[str, Any]:
    """What ``run`` would write, by the manifest alone."""
    store = Path(store)
    return _said(store, None, chosen(store, read_manifest(store), only), 0.0)


def _said(store: Path, out: Path | None, models: Sequence[Model], seconds: float) -> dict[str, Any]:
    return {
        "schema": "jdetune.unpack/1",
        "store": str(store),
        "out": None if out is None else str(out),
        "seconds": seconds,
        "bytes": sum(model.size for model in models),
        "models": [{"name": m.name, "files": len(m.files), "bytes": m.size} for m in models],
        "exit_code": 0,
    }


def chosen(store: Path, manifest: Manifest, only: Sequence[str]) -> list[Model]:
    """The models to unpack.

    Raises:
      InputError: the store has none of a name.
    """
    known = {model.name: model for model in manifest.models}
    missing = [name for name in only if name not in known]
    if missing:
        raise InputError(
            f"{store}: holds no model {missing[0]!r}. It holds {', '.join(known) or 'none'}."
        )
    return [model for model in manifest.models if not only or model.name in only]


def _check_blobs(
    manifest: Manifest, models: Sequence[Model], store: Path, progress: Progress | None
) -> Blobs:
    """Hashes all blobs that the models need, before anything is written."""
    needed = {part for model in models for file in model.files for part in file.parts}
    needed |= {of for part in needed if (of := manifest.items[part].of) is not None}
    blobs, meter = Blobs(store), Meter(progress, "check", len(needed), unit=1)
    for part in sorted(needed):
        blobs.check(manifest.items[part])
        meter.add(1)
    return blobs


def _write_all(
    manifest: Manifest,
    models: Sequence[Model],
    blobs: Blobs,
    stage: Path,
    progress: Progress | None,
) -> None:
    root = stage / outfolder.SOLVED
    todo = _todo(models, root)
    done = {path for path, file in todo if _is_done(path, file)}
    sweep(root, done)
    meter = Meter(progress, "unpack", sum(file.size for _, file in todo))
    for model in models:
        (root / model.name).mkdir(exist_ok=True)
    for path, file in todo:
        if path in done:
            meter.add(file.size)
        else:
            save_chunks(path, _content(manifest, file, blobs, meter), file.sha256)


def _check_room(models: Sequence[Model], out: Path) -> None:
    """Raises OutputError where the disk cannot hold what is not there yet."""
    todo = _todo(models, out / outfolder.STAGE / outfolder.SOLVED)
    wanted = sum(file.size for path, file in todo if not path.exists())
    there = next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if wanted > free:
        raise OutputError(
            f"--out={out}: {wanted} bytes are to be written and {free} are free. Make room, or "
            "unpack single models with --only."
        )


def _todo(models: Sequence[Model], root: Path) -> list[tuple[Path, File]]:
    return [(root / model.name / file.path, file) for model in models for file in model.files]


def _content(manifest: Manifest, file: File, blobs: Blobs, meter: Meter) -> Iterator[bytes]:
    for part in file.parts:
        for block in decode(manifest.items, part, blobs):
            yield block
            meter.add(len(block))


def _is_all_done(out: Path, models: Sequence[Model]) -> bool:
    """Whether all files are in place; they are if only that was left when a run was killed."""
    return all(_is_done(out / model.name / f.path, f) for model in models for f in model.files)


def _is_done(path: Path, file: File) -> bool:
    """Whether an interrupted run wrote a file, and it is still what it wrote."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size:
        return False
    return digest_file(path) == file.sha256
