"""Huge pages for large arrays, where the system gives them to programs that ask.

Every layer needs gigabytes of new arrays, and the system clears and maps them in pages of 4 KiB,
one at a time. glibc asks for huge pages if it is told so when the process starts; not later.
"""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb=1"
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def wanted(environment: MutableMapping[str, str], switch: Path = SWITCH) -> bool:
    """Whether to ask: with glibc, on a system that waits for it, unless the user has set the heap.

    Args:
      environment: a ``MALLOC_...`` variable or ``GLIBC_TUNABLES`` in it stays as it is.
      switch: the system's setting.

    Example:
      >>> wanted({"GLIBC_TUNABLES": "glibc.malloc.check=1"})
      False
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in environment):
        return False
    try:
        glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
        return glibc and "[madvise]" in switch.read_text(encoding="ascii")
    except (AttributeError, OSError, ValueError):
        return False


def start_again(environment: MutableMapping[str, str]) -> None:
    """Puts the same program with huge pages in the place of this process; else returns.

    Args:
      environment: of this process; the new one finds the tunable in it, and so does not do this.
    """
    if sys.executable and wanted(environment):
        environment["GLIBC_TUNABLES"] = TUNABLE
        try:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        except OSError:  # as before, then
            del environment["GLIBC_TUNABLES"]
