"""The program starts again with huge pages where they help, once, as the same process."""

import os
import subprocess
import sys

import pytest

from jdetune.cli import huge_pages

#: Prints what it was started with and the page faults of filling 100 MB.
PROGRAM = """
import ctypes, os, resource, sys
from jdetune.cli import huge_pages
huge_pages.start_again(os.environ)
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
library.memset(library.malloc(100 * 2**20), 1, 100 * 2**20)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(os.getpid(), faults, sys.flags.optimize, *sys.argv[1:])
"""


@pytest.fixture
def on_request(tmp_path):
    switch = tmp_path / "enabled"
    switch.write_text("always [madvise] never\n")
    return switch


@pytest.mark.skipif(not huge_pages.wanted({}), reason="this system has no huge pages on request")
@pytest.mark.parametrize(("own", "least", "most"), [({}, 0, 5000), ({"MALLOC_X": "1"}, 20000, 1e6)])
def test_the_same_process_has_huge_pages(own, least, most):
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    with subprocess.Popen(
        [sys.executable, "-O", "-c", PROGRAM, "one", "two words"],
        stdout=subprocess.PIPE,
        text=True,
        env=plain | own,
    ) as process:
        words = process.communicate(timeout=60)[0].split()
    assert words[0] == str(process.pid)
    assert words[2:] == ["1", "one", "two", "words"]
    assert least <= int(words[1]) < most


@pytest.mark.skipif(not hasattr(os, "confstr"), reason="no C library to ask")
def test_wanted_with_glibc_where_the_system_waits_for_it(on_request, monkeypatch):
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36")
    assert huge_pages.wanted({}, on_request)
    monkeypatch.setattr(os, "confstr", lambda name: None)
    assert not huge_pages.wanted({}, on_request)


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_a_setting_of_the_users_stays(name, on_request):
    assert not huge_pages.wanted({name: "1"}, on_request)


@pytest.mark.parametrize("text", ["[always] madvise never", "always madvise [never]", None])
def test_not_wanted_where_the_system_does_not_wait_for_it(text, on_request):
    if text is None:
        on_request.unlink()
    else:
        on_request.write_text(text)
    assert not huge_pages.wanted({}, on_request)


def test_goes_on_where_it_cannot_start_again(monkeypatch):
    tried, environment = [], {}

    def fail(*arguments):
        tried.append((arguments, dict(environment)))
        raise OSError("no such program")

    monkeypatch.setattr(huge_pages, "wanted", lambda environment: True)
    monkeypatch.setattr(os, "execv", fail)
    huge_pages.start_again(environment)
    (program, command), seen = tried[0]
    assert program == command[0] == sys.executable
    assert command[1:] == sys.orig_argv[1:]
    assert seen == {"GLIBC_TUNABLES": huge_pages.TUNABLE}
    assert environment == {}
