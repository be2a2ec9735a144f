"""The output folder: what may be written where, staging, and names of models."""

import errno
import os
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jdetune.checkpoint.index import Checkpoint, read_json
from jdetune.checkpoint.writer import save_json
from jdetune.errors import InputError, OutputError, WriteError

STAGE = ".jdetune"
#: In the stage: results of what was solved, what they depend on, and what is being put in place.
SOLVED = "solved"
_STATE = "state.json"
_PLACING = "placing.json"
#: What jdetune leaves in OUT, in the order it is put in place; nothing else is ever removed.
PRODUCTS = (
    *("base", "adapters", "merged", "blobs"),
    *("masks.safetensors", "manifest.json", "report.html", "report.json"),
)
_SCHEMAS = ("jdetune.report/", "jdetune.pack/")
#: Bytes of a model's name: some disks take 255 in all, and other words are added to it.
_MAX_NAME = 100
_RESERVED = {"con", "prn", "aux", "nul"} | {f"{p}{k}" for p in ("com", "lpt") for k in range(10)}


def check_out(out: Path, models: Sequence[Path], overwrite: bool) -> None:
    """Refuses an output folder that would endanger the inputs or somebody's files.

    Args:
      out: the folder asked for; need not exist.
      models: paths of the models.
      overwrite: whether a former output of jdetune may be replaced.

    Raises:
      OutputError: OUT touches a model, or exists and may not be replaced.
    """
    check_apart(out, models)
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"--out={out}: is a file. Choose a folder.")
    if _is_empty(out):
        return
    if not overwrite:
        raise OutputError(f"--out={out}: is not empty. Choose another folder, or add --overwrite.")
    if not _is_ours(out):
        raise OutputError(
            f"--out={out}: holds files that jdetune did not write, so --overwrite leaves it alone. "
            "Choose another folder."
        )


def check_apart(out: Path, models: Sequence[Path]) -> None:
    """Refuses an output folder that is a model, lies in one or holds one."""
    real = out.resolve()
    for model in models:
        path = model.resolve()
        if real == path or real.is_relative_to(path) or path.is_relative_to(real):
            raise OutputError(
                f"--out={out}: equal to, inside or around the model {model}. Choose a folder that "
                "holds no input."
            )


def check_demo(out: Path, base: Path, overwrite: bool) -> None:
    """Refuses a demo's folder that is not empty, or that is no former demo with overwrite."""
    check_out(out / "recovered", [base], overwrite)
    if out.is_file():
        raise OutputError(f"--out={out}: is a file. Choose a folder.")
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if found and not overwrite:
        raise OutputError(f"--out={out}: is not empty. Choose another folder, or add --overwrite.")
    if not found <= {"models", "recovered"}:
        raise OutputError(
            f"--out={out}: holds files that the demo did not write. Choose another folder."
        )
    former = out / "recovered"
    if found and not (_is_ours(former) or (former / STAGE).is_dir()):
        raise OutputError(f"--out={out}: is no former demo. Choose another folder.")


def start_stage(out: Path, state: Mapping[str, Any] | None = None, overwrite: bool = False) -> Path:
    """OUT/.jdetune to build in: what an interrupted run solved stays, if it was the same run.

    Args:
      out: the output folder.
      state: what results depend on, as JSON; ``software`` in it may differ, then all starts anew.
        None for work that cannot go on.
      overwrite: start anew where inputs or options differ.

    Raises:
      OutputError: OUT cannot be written, or holds an interrupted run of other inputs or options.
    """
    stage = out / STAGE
    former = _former_state(stage)
    wanted = state or {}
    different = [key for key in former if former[key] != wanted.get(key) and key != "software"]
    if former and different and not overwrite:
        raise OutputError(
            f"--out={out}: holds an interrupted run with other {' and '.join(different)}. Give the "
            "same models and flags to go on, or add --overwrite to start anew."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        if former and former == state:
            for path in stage.iterdir():
                if path.name not in (_STATE, SOLVED):
                    _remove(path)
            return stage
        _remove(stage)
        (stage / SOLVED).mkdir(parents=True)
    except OSError as error:
        kind = WriteError if error.errno == errno.ENOSPC else OutputError
        raise kind(f"--out={out}: cannot be written ({error}). Check space and rights.") from error
    if state is not None:
        save_json(stage / _STATE, state)
    return stage


def drop_stage(out: Path) -> None:
    """Removes OUT/.jdetune, and OUT if nothing else is in it: what was refused leaves no trace."""
    _remove(out / STAGE)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()


def _former_state(stage: Path) -> dict[str, Any]:
    """State of an interrupted run; empty if there is none."""
    try:
        return read_json(stage / _STATE)
    except InputError:
        return {}


def place(out: Path, stage: Path, products: Sequence[str] = PRODUCTS) -> None:
    """Puts what was built in place of a former output; the report comes last.

    The former output is moved aside first and removed at the very end; if a step between fails, it
    is moved back. If the process is killed, ``finish_placing`` goes on.

    Args:
      out: the output folder.
      stage: where it was built.
      products: names that an output may have, in the order they are put in place.
    """
    new = [name for name in products if os.path.lexists(stage / name)]
    moved: list[tuple[Path, Path]] = []
    save_json(stage / _PLACING, {"products": new, "known": list(products)})
    try:
        _move_all(out, stage, new, products, moved)
    except BaseException as error:
        for source, target in reversed(moved):
            target.rename(source)
        (stage / _PLACING).unlink()
        if not isinstance(error, OSError):
            raise
        raise WriteError(f"--out={out}: cannot be finished ({error}); see {stage}.") from error
    _remove_stage(out, stage)


def finish_placing(out: Path) -> bool:
    """Goes on where a run was killed while it put its output in place; whether there was one."""
    stage = out / STAGE
    if not (stage / _PLACING).exists():
        return False
    try:
        placing = read_json(stage / _PLACING)
        _move_all(out, stage, placing["products"], placing["known"], [])
    except OSError as error:
        raise WriteError(f"--out={out}: cannot be finished ({error}); see {stage}.") from error
    _remove_stage(out, stage)
    return True


def _move_all(
    out: Path,
    stage: Path,
    new: Sequence[str],
    products: Sequence[str],
    moved: list[tuple[Path, Path]],
) -> None:
    """Moves former products aside and new ones in place, but for those that are there already."""
    aside = stage / "former"
    aside.mkdir(exist_ok=True)

    def move(source: Path, target: Path) -> None:
        if os.path.lexists(source):
            source.rename(target)
            moved.append((source, target))

    for name in reversed(products):
        if name not in new or os.path.lexists(stage / name):
            move(out / name, aside / name)
    for name in new:
        move(stage / name, out / name)


def _remove_stage(out: Path, stage: Path) -> None:
    """Removes the stage, last what says that placing is not finished."""
    try:
        for path in stage.iterdir():
            if path.name != _PLACING:
                _remove(path)
        _remove(stage)
    except OSError as error:
        raise WriteError(f"--out={out}: {stage} cannot be removed ({error}).") from error


def model_names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Folder names of the models: basenames made safe, and unique also on case-blind disks."""
    names: list[str] = []
    taken: set[str] = set()
    for checkpoint in checkpoints:
        name = checkpoint.name
        if name == "model" and checkpoint.path.is_file():
            name = checkpoint.path.resolve().parent.name
        stem = safe_name(name)
        unique, count = stem, 1
        while unique.casefold() in taken:
            count += 1
            unique = f"{stem}-{count}"
        taken.add(unique.casefold())
        names.append(unique)
    return names


def safe_name(name: str) -> str:
    """A folder name of letters, digits, dot, dash and underscore that every system takes.

    Example:
      >>> safe_name("my model/.."), safe_name(".."), safe_name("con.txt")
      ('my-model', 'model', 'model-con.txt')
    """
    plain = unicodedata.normalize("NFC", name)
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in plain).lstrip(".-")
    short = kept.encode()[:_MAX_NAME].decode(errors="ignore").rstrip(".-") or "model"
    return f"model-{short}" if short.split(".")[0].casefold() in _RESERVED else short


def _is_empty(out: Path) -> bool:
    """Whether nothing is in it, or only what an interrupted run left."""
    return all(path.name == STAGE and path.is_dir() for path in out.iterdir())


def _is_ours(out: Path) -> bool:
    """Whether a former report says that jdetune wrote it."""
    try:
        return str(read_json(out / "report.json").get("schema", "")).startswith(_SCHEMAS)
    except InputError:
        return False


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder; never follows a link."""
    if path.is_symlink() or path.is_file():
        os.unlink(path)
    elif path.is_dir():
        shutil.rmtree(path)
