"""Seconds in which anything was done, whoever did it."""

import time

import pytest

from jdetune import busy as module
from jdetune.busy import COMPUTE, READ, TRANSFER, WRITE, Busy
from jdetune.report import overlap


@pytest.fixture
def clock(monkeypatch):
    """Time that goes on only when it is told to."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    assert time.monotonic() == 0.0
    return now


def test_what_overlaps_counts_once(clock):
    busy = Busy()
    with busy.doing(READ):
        clock[0] = 2.0
        with busy.doing(READ), busy.doing(WRITE):
            clock[0] = 3.0
        with busy.doing(COMPUTE):
            clock[0] = 7.0
    with busy.doing(WRITE):
        clock[0] = 8.0
    clock[0] = 9.0
    found = [busy.seconds(kind) for kind in (READ, WRITE, TRANSFER, COMPUTE)]
    assert found == [7.0, 2.0, 8.0, 4.0]
    said = overlap(busy, 9.0)
    assert said["transferring"] == 8.0
    assert said["over_larger"] == 1.125


def test_an_error_ends_what_was_done(clock):
    busy = Busy()

    def fail():
        with busy.doing(READ):
            clock[0] = 1.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock[0] = 5.0
    assert busy.seconds(READ) == busy.seconds(TRANSFER) == 1.0
