"""Reads input files so that nothing that lies there can hang, crash or mislead a run.

Plain reads, no memory maps: a file that shrinks under a map kills the process with SIGBUS.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jdetune.errors import InputError, printable

#: Bytes that are read at once where a file need not be held.
CHUNK = 1 << 22
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_FLAGS = ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY")


class Stamp(NamedTuple):
    """What tells that a file is still the one that was opened before.

    Attributes:
      size: its bytes.
      mtime: time of the last change, in ns.
      inode: its number on the disk.
    """

    size: int
    mtime: int
    inode: int


class Source:
    """An open file that is read from any place; ends and errors are an InputError.

    Attributes:
      stamp: which file it is.
    """

    def __init__(self, path: Path, descriptor: int, stamp: Stamp) -> None:
        """Takes over an open descriptor."""
        self._path, self.stamp = path, stamp
        self._file = os.fdopen(descriptor, "rb", 0)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def fill(self, start: int, data: np.ndarray) -> None:
        """Reads bytes from ``start`` on until a flat uint8 array is full."""
        view, done = data.data, 0
        try:
            self._file.seek(start)
            while done < len(view):
                count = self._file.readinto(view[done:])
                if not count:
                    raise InputError(
                        f"{self._path}: ended at byte {start + done}, so it shrank while it was "
                        "read. Copy it again, and leave it alone while jdetune runs."
                    )
                done += count
        except OSError as error:
            raise unreadable(self._path, error) from error

    def bytes(self, start: int, size: int) -> bytes:
        """Some bytes; the size must have been checked against the file's."""
        data = np.empty(size, np.uint8)
        self.fill(start, data)
        return data.tobytes()

    def chunks(self, start: int, size: int) -> Iterator[np.ndarray]:
        """Bytes from ``start`` on in pieces; a piece is overwritten by the next."""
        room = np.empty(min(size, CHUNK), np.uint8)
        for first in range(0, size, CHUNK):
            part = room[: min(CHUNK, size - first)]
            self.fill(start + first, part)
            yield part


@contextlib.contextmanager
def opened(path: Path, former: Stamp | None = None) -> Iterator[Source]:
    """Opens a regular file; never waits for a pipe or a device.

    Args:
      path: the file.
      former: what it was when it was opened before.

    Raises:
      InputError: gone, no regular file, not readable, another file than before, or changed by the
        end: what was read from it meanwhile may be of two versions.
    """
    flags = os.O_RDONLY
    for name in _FLAGS:
        flags |= getattr(os, name, 0)
    try:
        check_regular(path, os.stat(path))
        descriptor = os.open(path, flags)
        found = os.fstat(descriptor)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    source = Source(path, descriptor, _stamp(found))
    try:
        check_regular(path, found)
        _check_same(path, former or source.stamp, source.stamp)
        yield source
        _check_same(path, source.stamp, _stamp(os.fstat(descriptor)))
    finally:
        source.close()


def _stamp(found: os.stat_result) -> Stamp:
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino)


def _check_same(path: Path, former: Stamp, now: Stamp) -> None:
    if now != former:
        raise InputError(
            f"{path}: changed while it was used: {former.size} bytes before, {now.size} now, or "
            "written anew. Run again when nothing writes to it."
        )


def check_regular(path: Path, found: os.stat_result) -> None:
    """Refuses what is no regular file."""
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise InputError(f"{path}: {kind}, not a regular file. Give a checkpoint of plain files.")


def unreadable(path: Path, error: Exception) -> InputError:
    """The error of a file that the system does not give."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: is not there, or vanished while it was used. Copy it again.")
    said = printable(error)
    return InputError(f"{path}: cannot be read ({said}). Check the disk and the rights.")


def read_whole(path: Path, limit: int) -> bytes:
    """A small file's bytes.

    Raises:
      InputError: not readable, or larger than ``limit``.
    """
    with opened(path) as source:
        size = source.stamp.size
        if size > limit:
            raise InputError(
                f"{path}: {size} bytes, of which {limit} are read at most. It is not what its "
                "name says; do not use this checkpoint if you do not trust it."
            )
        return source.bytes(0, size)


def check_inside(path: Path, root: Path) -> None:
    """Refuses links that lead out of a folder, but for those of the hub's cache.

    There ``models--NAME/snapshots/REVISION/FILE`` links to ``models--NAME/blobs/HASH``.

    Raises:
      InputError: it leads out.
    """
    try:
        real, folder = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:
        raise unreadable(path, OSError("links in a circle")) from error
    allowed = [folder]
    for place in (folder, *folder.parents):
        cached = place.parent.parent
        if place.parent.name == "snapshots" and cached.name.startswith("models--"):
            allowed.append(cached / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise InputError(
            f"{path}: links to {real}, out of its folder. Copy the file into the folder; do not "
            "use this checkpoint if you do not trust it."
        )
