"""Full disks, models that vanish or change, Ctrl-C: a clear error, and the run goes on later."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from jdetune import pipeline
from jdetune.cli import main as program
from jdetune.errors import InputError, OutputError, WriteError
from jdetune.pages.page import render
from jdetune.report import read_report
from tests import pico
from tests.test_distributed import command, files_of, plain_environment, write_family

#: Files that a run writes in the end: state, groups, base with 3 side files, adapters, page, cards,
#: report.
N_FILES = 1 + 4 + 4 + 3 * 3 + 1 + 4 + 1


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A family, its stand-in solver one matrix at a time, and the files of an undisturbed run."""
    monkeypatch.setattr("jdetune.checkpoint.manifest.GROUP_LAYERS", 1)
    family = pico.make(tmp_path / "zoo")
    teller = pico.truth_teller(family.base)
    pipeline.run(family.paths, tmp_path / "whole", recover_fn=teller)
    return family, teller, contents(tmp_path / "whole")


def contents(out):
    """Bytes by name; the reports, which say times, are compared apart."""
    return {n: p.read_bytes() for n, p in files_of(out).items() if not n.startswith("report.")}


def goes_on(family, teller, out, whole):
    """Runs again and compares; how many matrices were left to solve."""
    calls = []
    pipeline.run(family.paths, out, recover_fn=lambda s, **o: calls.extend(s) or teller(s, **o))
    assert contents(out) == whole
    assert (out / "report.html").read_text() == render(read_report(out))
    assert not (out / ".jdetune").exists()
    return len(calls)


def is_unfinished(out):
    """Nothing is in place, or all is, and the state is kept."""
    return {p.name for p in out.iterdir()} <= {".jdetune"} and (out / ".jdetune").exists()


@pytest.mark.parametrize("file", range(0, N_FILES, 2))
def test_a_disk_that_is_full_at_any_file(tmp_path, monkeypatch, zoo, file):
    family, teller, whole = zoo
    out, sync, count = tmp_path / "out", os.fsync, iter(range(999))

    def full(descriptor):
        if next(count) >= file:  # it stays full: what is written ahead is tried once more
            raise OSError(28, "No space left on device")
        return sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match="No space left on device.*Check space") as caught:
            pipeline.run(family.paths, out, recover_fn=teller)
    assert caught.value.exit_code == 3
    assert is_unfinished(out)
    goes_on(family, teller, out, whole)


def mounted(path, kib):
    """A disk of this size; what went wrong if it cannot be had."""
    path.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(path)]
    return subprocess.run(["mount", *options], capture_output=True, text=True, check=False).stderr


@pytest.mark.parametrize("kib", [4, 24, 40, 64, 96, 112, 128])
def test_a_small_disk(tmp_path, zoo, kib):
    family, teller, whole = zoo
    disk = tmp_path / "disk"
    if sys.platform != "linux" or os.geteuid() != 0 or mounted(disk, kib):
        pytest.skip("no disk can be mounted here")
    try:
        out = disk / "out"
        with pytest.raises(WriteError, match="No space left on device"):
            pipeline.run(family.paths, out, recover_fn=teller)
        assert is_unfinished(out)
        state = (out / ".jdetune" / "state.json").exists()
        solved = len(list(out.rglob("group-*.safetensors")))
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert goes_on(family, teller, out, whole) == 4 - (solved if state else 0)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_limit_on_the_size_of_files(tmp_path, zoo, capsys):
    family, teller, whole = zoo
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(WriteError, match="File too large"):
            pipeline.run(family.paths, tmp_path / "out", recover_fn=teller)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert is_unfinished(tmp_path / "out")
    assert goes_on(family, teller, tmp_path / "out", whole) == 0


def vanish(path):
    path.rename(path.with_suffix(".away"))


def shrink(path):
    shutil.copy2(path, path.with_suffix(".away"))
    os.truncate(path, 100)


def change(path):
    shutil.copy2(path, path.with_suffix(".away"))
    with path.open("r+b") as file:  # in place: a file that is written anew is short for a moment
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (vanish, "vanished"),
        (shrink, "changed while|shrank while"),  # whichever looks first
        (change, "changed while"),
    ],
)
@pytest.mark.parametrize("when", [("compare", 1), ("recover", 1), ("recover", 4)])
def test_a_model_that_is_harmed_while_it_is_used(tmp_path, monkeypatch, zoo, harm, said, when):
    # else all of it may have been read by then, and nothing is lost
    monkeypatch.setattr(pipeline, "writing_ahead", lambda *_: contextlib.nullcontext({}))
    family, teller, whole = zoo
    out, file = tmp_path / "out", family.paths[0] / "model.safetensors"
    done = []

    def harming(stage, count, _):
        if (stage, count) == when and not done:
            done.append(harm(file))

    with pytest.raises(InputError, match=said) as caught:
        pipeline.run(family.paths, out, progress=harming, recover_fn=teller)
    assert caught.value.exit_code == 3
    # all was compared already where the threads that compare were ahead of what is told
    compared = when[0] == "recover" or out.exists()
    assert is_unfinished(out) if compared else not out.exists()
    if harm is change and out.exists():
        with pytest.raises(OutputError, match="other models"):
            pipeline.run(family.paths, out, recover_fn=teller)
    file.with_suffix(".away").replace(file)
    left = goes_on(family, teller, out, whole)
    assert left <= 4 - when[1] if when[0] == "recover" else left == 4


def test_exit_codes_of_failing_disks(tmp_path, monkeypatch, capsys, zoo):
    family, _, _ = zoo

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    arguments = ["recover", *map(str, family.paths), f"--out={tmp_path / 'out'}"]
    assert program.main(arguments) == 3
    assert "then run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_and_twice(tmp_path, times):
    paths = write_family(tmp_path)
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(paths, out), env=plain_environment(), stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (out / ".jdetune" / "solved" / "first").exists():
        time.sleep(0.01)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert is_unfinished(out)
