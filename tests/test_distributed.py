"""Several processes: who does what, byte-identical output, and failures that all hear of."""

import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from jdetune.distributed import ALONE, PeerError, Processes, join, launched
from jdetune.errors import JdetuneError
from jdetune.pages.page import render
from tests import pico

SHAPES = {"a": (64, 48), "b": (80, 56), "c": (64, 48)}
TIMES = {"started_at", "seconds", "timing", "command"}


def write_family(root, n_models=3):
    """Models with matrices of two shapes, in two shards."""
    rng = np.random.default_rng(0)
    base = {f"encoder.{n}.weight": rng.standard_normal(s) for n, s in SHAPES.items()}
    paths = []
    for model in range(n_models):
        tuned = {}
        for name, weights in base.items():
            left, right = (rng.standard_normal((side, 3)) for side in weights.shape)
            tuned[name] = (0.02 * weights + 1e-3 * left @ right.T).astype(np.float32)
        paths.append(pico.write(root / f"tune-{model}", tuned, shards=2))
    return paths


def command(paths, out, *flags):
    return [sys.executable, "-m", "jdetune", "recover", *map(str, paths), f"--out={out}", *flags]


def plain_environment():
    """As a user has it: without the eight host devices of the tests."""
    plain = {n: v for n, v in os.environ.items() if n not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    return {**plain, "JAX_PLATFORMS": "cpu"}


def start(paths, out, index, port, *flags, count=2):
    where = f"--coordinator=localhost:{port}"
    return subprocess.Popen(
        command(paths, out, where, f"--num_processes={count}", f"--process_id={index}", *flags),
        env=plain_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def files_of(out):
    return {p.relative_to(out).as_posix(): p for p in sorted(out.rglob("*")) if p.is_file()}


def untimed(report):
    tensors = [{k: v for k, v in t.items() if k != "seconds"} for t in report["tensors"]]
    return {**{k: v for k, v in report.items() if k not in TIMES}, "tensors": tensors}


def same_files(one, two):
    """Checks that two outputs are equal byte by byte, but for times and the command that was typed.

    Returns both reports.
    """
    ours, theirs = files_of(one), files_of(two)
    assert list(ours) == list(theirs)
    reports = [json.loads(files["report.json"].read_text()) for files in (ours, theirs)]
    assert untimed(reports[0]) == untimed(reports[1])
    for files, report in zip((ours, theirs), reports, strict=True):
        assert files["report.html"].read_text() == render(report)
    for name in ours:
        if not name.startswith("report."):
            parts = [path.read_bytes() for path in (ours[name], theirs[name])]
            if name.endswith("README.md"):
                said = [report["command"].encode() for report in reports]
                assert all(command in part for command, part in zip(said, parts, strict=True))
                parts = [part.replace(c, b"") for c, part in zip(said, parts, strict=True)]
            assert parts[0] == parts[1], name
    return reports


def test_two_processes_write_what_one_does(tmp_path):
    paths = write_family(tmp_path)
    alone, together = tmp_path / "alone", tmp_path / "together"
    subprocess.run(
        command(paths, alone, "--masks"),
        env=plain_environment(),
        check=True,
        timeout=120,
        capture_output=True,
    )
    port = free_port()
    running = [start(paths, together, k, port, "--masks") for k in (0, 1)]
    said = [process.communicate(timeout=180) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert said[0][0].startswith("3 of 3 differing matrices recovered")
    assert said[1][0] == ""
    first, second = same_files(alone, together)
    assert (first["timing"]["processes"], second["timing"]["processes"]) == (1, 2)


def test_a_failure_of_one_process_ends_all_of_them(tmp_path):
    paths = write_family(tmp_path)
    out, port = tmp_path / "out", free_port()
    running = [start(paths, out, 0, port), start([*paths[:2], "missing"], out, 1, port)]
    said = [process.communicate(timeout=180)[1] for process in running]
    assert [process.returncode for process in running] == [3, 3], said
    assert "missing: no such file" in said[1]
    assert "process 1: missing: no such file" in said[0]
    assert not (out / "base").exists()


def test_work_is_shared_by_size():
    sizes = [5, 9, 1, 1, 4, 0, 0]
    shares = [Processes(k, 3).share(sizes) for k in range(3)]
    assert sorted(sum(shares, [])) == list(range(len(sizes)))
    assert max(sum(sizes[i] for i in share) for share in shares) == 9
    assert all(Processes(k, 8).share([]) == [] for k in range(8))
    assert ALONE.share(sizes) == list(range(len(sizes)))


def test_joining_alone_and_with_half_of_the_flags(monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert join(None, None, None) is ALONE
    with pytest.raises(JdetuneError, match="need --coordinator"):
        join(None, 2, None)
    assert launched({"OMPI_COMM_WORLD_SIZE": "2"})
    assert not launched({"SLURM_NTASKS": "4"})


@pytest.mark.parametrize("launcher", ["slurm", "ompi"])
def test_launchers_are_found_in_the_environment(launcher):
    number = free_port() % 2**12  # both derive the port from the job's number
    code = (
        "from jdetune.distributed import join; p = join(None, None, None)\n"
        "print(p.exchange(10 + p.index), p.index, p.count)"
    )
    running = []
    for rank in (0, 1):
        told = {
            "slurm": {
                "SLURM_JOB_ID": f"{number}",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": "2",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": f"{rank}",
                "SLURM_LOCALID": f"{rank}",
            },
            "ompi": {
                "OMPI_MCA_orte_hnp_uri": f"{number * 2**12}.0;tcp://127.0.0.1:1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": f"{rank}",
                "OMPI_COMM_WORLD_LOCAL_RANK": f"{rank}",
            },
        }[launcher]
        environment = {**plain_environment(), **told}
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
            )
        )
    said = [process.communicate(timeout=120)[0] for process in running]
    assert said == ["[10, 11] 0 2\n", "[10, 11] 1 2\n"]


def test_an_error_of_the_only_process_stays_as_it_is():
    with pytest.raises(KeyError), ALONE.together():
        raise KeyError("x")
    assert PeerError("text", 4).exit_code == 4


def test_a_killed_process_is_missed_at_once_and_nothing_is_put_in_place(tmp_path):
    paths = write_family(tmp_path)
    out, port = tmp_path / "out", free_port()
    running = [start(paths, out, k, port) for k in (0, 1)]
    while not (out / ".jdetune" / "solved").exists() and running[0].poll() is None:
        time.sleep(0.05)
    running[1].kill()
    said = running[0].communicate(timeout=120)[1]
    running[1].communicate()
    assert running[0].returncode == 3, said
    assert "does not answer any more" in said
    assert [path.name for path in out.iterdir()] == [".jdetune"]
