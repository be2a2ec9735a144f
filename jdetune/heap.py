"""The C library's heap: freed memory is kept for the next layer, not given back to the system.

Every layer needs the same large arrays. glibc maps each of them anew, and the system clears every
page again, which takes longest where memory is virtualised.
"""

import ctypes
import sys
from collections.abc import Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST = 2**31 - 1
_BEFORE = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")


class _Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = [(name, ctypes.c_size_t) for name in (*_BEFORE, "fordblks", "keepcost")]


def keep_freed(environment: Mapping[str, str]) -> bool:
    """Makes the whole process keep what it frees; for programs of our own, before they allocate.

    Only the one main heap can hold large arrays, so all threads share it.

    Args:
      environment: a setting of the user's in it (``MALLOC_...``, ``GLIBC_TUNABLES``) stays.

    Returns:
      Whether it was done: only with glibc.

    Example:
      >>> keep_freed({"MALLOC_ARENA_MAX": "2"})
      False
    """
    if any(name.startswith("MALLOC_") for name in environment) or "GLIBC_TUNABLES" in environment:
        return False
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _LARGEST))
    return sum(mallopt(name, value) for name, value in settings) == len(settings)


def kept() -> int:
    """Bytes that were freed and kept: this process can have them, the system has them not.

    Example:
      >>> kept() >= 0
      True
    """
    mallinfo = _function("mallinfo2")
    if mallinfo is None:
        return 0
    mallinfo.restype = _Mallinfo
    return mallinfo().fordblks


def _function(name: str):  # noqa: ANN202
    """A function of the C library, ``None`` where it is not glibc."""
    library = ctypes.CDLL(None) if sys.platform != "win32" else None
    return getattr(library, name, None) if hasattr(library, "gnu_get_libc_version") else None
