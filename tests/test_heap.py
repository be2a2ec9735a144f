"""Memory that is freed and used again: kept by the process, and counted as free."""

import subprocess
import sys

import pytest

from jdetune import heap, machine

#: Page faults of every later round of allocating, filling and freeing 100 MB, and what is kept.
ROUNDS = """
import ctypes, resource, sys
from jdetune import heap
done = heap.keep_freed({}) if sys.argv[1] == "keep" else False
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
library.free.argtypes = (ctypes.c_void_p,)
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    room = library.malloc(100 * 2**20)
    library.memset(room, 1, 100 * 2**20)
    library.free(room)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(done), sum(faults[1:]), heap.kept())
"""

glibc = pytest.mark.skipif(heap._function("mallopt") is None, reason="only glibc keeps memory")


def rounds(how):
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS, how], capture_output=True, text=True, check=True, timeout=60
    )
    return [int(word) for word in done.stdout.split()]


@glibc
def test_freed_memory_is_used_again():
    done, faults, kept = rounds("keep")
    assert done == 1
    assert faults < 100
    assert kept >= 100 * 2**20
    done, faults, kept = rounds("as it is")
    assert done == 0
    assert faults > 100
    assert kept < 100 * 2**20


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_a_setting_of_the_users_stays(name):
    assert not heap.keep_freed({name: "1"})


def test_no_glibc_no_matter(monkeypatch):
    monkeypatch.setattr(heap, "_function", lambda name: None)
    assert not heap.keep_freed({})
    assert heap.kept() == 0


@glibc
def test_kept_memory_counts_as_free(monkeypatch):
    before = machine.free_memory()
    monkeypatch.setattr(heap, "kept", lambda: 2**50)
    assert machine.free_memory() - before > 2**49
