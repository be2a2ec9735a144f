"""Killed packing and unpacking go on, and end with the bytes of uninterrupted ones."""

import random
import subprocess
import sys
import time

import pytest

from jdetune import outfolder
from jdetune.errors import OutputError
from jdetune.zoo import jobs, packing, unpacking
from jdetune.zoo.packing import Options
from tests import pico
from tests.test_distributed import plain_environment
from tests.zoo.zoo_files import files_of, same, zoo


def without_report(root):
    return {name: data for name, data in files_of(root).items() if name != "report.json"}


class Killed(BaseException):
    """Stands for a signal."""


def failing_after(monkeypatch, target, calls):
    """Makes a function die at a call."""
    module, name = target
    honest, count = getattr(module, name), iter(range(10**6))

    def die(*args, **options):
        if next(count) == calls:
            raise Killed
        return honest(*args, **options)

    monkeypatch.setattr(module, name, die)


@pytest.mark.parametrize(
    ("target", "calls"),
    [
        ((packing, "scan"), 1),
        ((packing, "solve_one_base"), 0),
        ((jobs, "encode"), 0),
        ((jobs, "encode"), 9),
        ((packing, "check"), 0),
        ((packing, "summarise"), 0),
        ((outfolder, "place"), 0),
    ],
)
def test_packing_goes_on(tmp_path, monkeypatch, target, calls):
    family = zoo(tmp_path / "zoo", 3)
    monkeypatch.setattr("jdetune.zoo.jobs._TRIES", 0)
    teller = pico.truth_teller(family.base)
    packing.run(family.paths, tmp_path / "whole", recover_fn=teller)
    out = tmp_path / "store"
    with monkeypatch.context() as patch:
        failing_after(patch, target, calls)
        with pytest.raises(Killed):
            packing.run(family.paths, out, recover_fn=teller)
    assert [p.name for p in out.iterdir()] == [".jdetune"]
    solved = out / ".jdetune" / "solved"
    (solved / "blobs" / "ab").mkdir(parents=True, exist_ok=True)
    (solved / "blobs" / ".new.1.tmp").write_bytes(b"half")  # as kill -9 leaves it
    (solved / "blobs" / "ab" / ".new.1.tmp").write_bytes(b"half")
    with pytest.raises(OutputError, match="other flags"):
        packing.run(family.paths, out, Options(level=5), recover_fn=teller)
    encoded = []
    honest = jobs.encode
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "encode", lambda *a: encoded.append(a[0]) or honest(*a))
        packing.run(family.paths, out, recover_fn=teller)
    assert without_report(out) == without_report(tmp_path / "whole")
    if target == (jobs, "encode"):
        assert len(encoded) == len(jobs.plan_jobs(*planned(family))) - calls


def planned(family):
    sources = packing.plan(family.paths)
    return sources, [packing.scan(source, None, lambda n: None) for source in sources]


@pytest.mark.parametrize("steps", range(5))
def test_packing_killed_while_the_store_is_put_in_place(tmp_path, monkeypatch, steps):
    family = zoo(tmp_path / "zoo", 3)
    out, teller = tmp_path / "store", pico.truth_teller(family.base)
    rename, count = type(out).rename, iter(range(99))

    def die(self, target):
        if target.parent == out and next(count) == steps:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(out), "rename", die)
        patch.setattr(outfolder, "place", _unguarded)
        try:
            packing.run(family.paths, out, recover_fn=teller)
        except Killed:
            assert (out / ".jdetune").is_dir()
    if (out / ".jdetune").exists():
        report = packing.run(family.paths, out, recover_fn=None)  # nothing is packed again
        assert report["schema"] == "jdetune.pack/1"
    assert sorted(p.name for p in out.iterdir()) == ["blobs", "manifest.json", "report.json"]
    unpacking.run(out, tmp_path / "back")
    assert same(family.paths, tmp_path / "back")


def _unguarded(out, stage, products=outfolder.PRODUCTS):
    """What ``place`` does if it is killed: nothing is moved back."""
    new = [name for name in products if (stage / name).exists()]
    outfolder.save_json(stage / outfolder._PLACING, {"products": new, "known": list(products)})
    outfolder._move_all(out, stage, new, products, [])
    outfolder._remove_stage(out, stage)


@pytest.mark.parametrize("calls", [0, 5, 20])
def test_unpacking_goes_on(tmp_path, monkeypatch, calls):
    family = zoo(tmp_path / "zoo", 3)
    store, out = tmp_path / "store", tmp_path / "back"
    packing.run(family.paths, store, recover_fn=pico.truth_teller(family.base))
    with monkeypatch.context() as patch:
        failing_after(patch, (unpacking, "save_chunks"), calls)
        with pytest.raises(Killed):
            unpacking.run(store, out)
    assert [p.name for p in out.iterdir()] == [".jdetune"]
    (out / ".jdetune" / "solved" / "tune-1" / ".config.json.1.tmp").write_bytes(b"half")
    again, honest = [], unpacking.save_chunks
    with monkeypatch.context() as patch:
        patch.setattr(unpacking, "save_chunks", lambda *a: again.append(a[0]) or honest(*a))
        unpacking.run(store, out)
    assert len(again) == 3 * 10 - calls
    assert same(family.paths, out)


@pytest.mark.parametrize("steps", range(4))
def test_unpacking_killed_while_models_are_put_in_place(tmp_path, monkeypatch, steps):
    family = zoo(tmp_path / "zoo", 3)
    store, out = tmp_path / "store", tmp_path / "back"
    packing.run(family.paths, store, recover_fn=pico.truth_teller(family.base))
    rename, count = type(out).rename, iter(range(99))

    def die(self, target):
        if target.parent == out and next(count) == steps:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(out), "rename", die)
        patch.setattr(outfolder, "place", _unguarded)
        try:
            unpacking.run(store, out)
        except Killed:
            assert (out / ".jdetune").is_dir()
    if (out / ".jdetune").exists():
        unpacking.run(store, out)
    assert same(family.paths, out)


def timed(command):
    """Runs a command to its end; returns seconds."""
    begin = time.monotonic()
    subprocess.run(command, check=True, env=plain_environment(), capture_output=True)
    return time.monotonic() - begin


def kill_at_random(command, out, rng, seconds, most):
    """Runs a command that takes so long, killing it at random moments.

    Returns how often, and how long the command takes: as it did now if nothing interrupted it.
    """
    killed = 0
    while True:
        begin = time.monotonic()
        process = subprocess.Popen(
            command,
            env=plain_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            process.wait(timeout=rng.uniform(0.2, 1) * seconds if killed < most else 300)
        except subprocess.TimeoutExpired:
            process.kill()
        error = process.communicate()[1].decode()
        if process.returncode == 0:
            return killed, seconds if killed else time.monotonic() - begin
        assert process.returncode == -9, error
        killed += 1
        if out.exists() and not (out / ".jdetune").exists():
            return killed, seconds  # all was in place already; the caller compares it


@pytest.mark.slow
def test_programs_killed_at_random_moments(tmp_path, capsys):
    rng = random.Random(0)
    family = zoo(tmp_path / "zoo", 4)
    program = [sys.executable, "-m", "jdetune"]
    pack = [*program, "pack", *map(str, family.paths), "--nopolish"]
    whole = tmp_path / "whole"
    packing_takes = timed([*pack, f"--out={whole}"])
    unpacking_takes = timed([*program, "unpack", str(whole), f"--out={tmp_path / 'back'}"])
    killed = runs = 0
    while killed < 50 and runs < 40:
        store, back = tmp_path / f"store-{runs}", tmp_path / f"back-{runs}"
        command = [*pack, f"--out={store}"]
        packs, packing_takes = kill_at_random(command, store, rng, packing_takes, 8)
        command = [*program, "unpack", str(store), f"--out={back}"]
        unpacks, unpacking_takes = kill_at_random(command, back, rng, unpacking_takes, 4)
        killed += packs + unpacks
        assert without_report(store) == without_report(whole)
        assert same(family.paths, back)
        runs += 1
    assert killed >= 50
    with capsys.disabled():
        print(f"{killed} kills in {runs} rounds of pack and unpack, each with the same bytes")
