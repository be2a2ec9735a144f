"""Where compiled programs are kept between runs: a folder of one's own, one for each processor."""

import hashlib
import os
import platform
import stat
from collections.abc import MutableMapping
from pathlib import Path

_FOLDER = "JAX_COMPILATION_CACHE_DIR"


def use_compile_cache(environ: MutableMapping[str, str]) -> None:
    """Tells JAX, which must not be imported yet, to keep compiled programs.

    They are code: the folder belongs to the user and nobody else may write to it, or it is not
    used. A setting of the user's stays; ``JAX_COMPILATION_CACHE_DIR=`` (empty) turns it off.
    """
    if _FOLDER in environ:
        return
    folder = _cache_root(environ) / "compiled" / _processor()
    if not _is_private(folder):
        return
    environ[_FOLDER] = str(folder)
    environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def _cache_root(environ: MutableMapping[str, str]) -> Path:
    if "JDETUNE_CACHE" in environ:
        return Path(environ["JDETUNE_CACHE"])
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jdetune"


def _processor() -> str:
    """Programs for one kind of processor may not run on another that shares the home folder."""
    flags = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags += next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        pass
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}"


def _is_private(folder: Path) -> bool:
    """Whether the folder is there, made if need be, and only the user may write to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError:
        return False
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return mine and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
