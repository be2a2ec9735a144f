"""Weak scaling: as many times the layers as devices or processes, checked to give the same weights.

    python -m benchmarks.weak_scaling --layers=8

Devices are host devices (``JAX_NUM_CPU_DEVICES``) that share the cores of this machine, so the time
a layer can fall only until the cores are busy. Processes are ``jdetune recover`` on files, each on
one core of its own. ``efficiency`` is the time of one over the time of several with several times
the work. ``not compute`` is the share of the cores' time without computing (devices), or of the
run that is not the solver's: reading, comparing, writing, waiting for each other (processes).
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks import tables

FLAGS = flags.FLAGS

#: Solves made layers and prints seconds, share of idle cores and a digest; runs alone in a process.
_DEVICES = """
import hashlib, json, sys, time
from jdetune.cli.main import prepare_environment
prepare_environment()
import numpy as np, jdetune
from jdetune import synth
from jdetune.machine import cores
size, per, count = map(int, sys.argv[1:])
def layers(seed):
    made = (synth.family(5, size, size, 16, seed=seed + k) for k in range(per * count))
    return {str(k): family.merged for k, family in enumerate(made)}
jdetune.recover(layers(1000))
stacks = layers(0)
wall, cpu = time.perf_counter(), time.process_time()
found = jdetune.recover(stacks)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
assert found.ok
bases = [np.asarray(found[name].base) for name in stacks]
digests = [hashlib.sha256(base.tobytes()).hexdigest() for base in bases]
idle = max(0.0, 1 - cpu / (wall * min(cores(), max(count, 2))))
print(json.dumps({"seconds": wall, "idle": idle, "digests": digests}))
"""


def on_devices(size: int, per: int, count: int) -> dict[str, Any]:
    """Seconds, share of idle cores and digests of the bases with so many host devices."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(count), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _DEVICES, *map(str, (size, per, count))]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def write_models(root: Path, size: int, n_layers: int) -> list[Path]:
    """Five made models of one base, of four shapes, so that there are groups to share."""
    from jdetune import synth
    from jdetune.checkpoint import save_safetensors

    models: list[dict[str, np.ndarray]] = [{} for _ in range(5)]
    for layer in range(n_layers):
        merged = synth.family(5, size, size + 64 * (layer % 4), 16, seed=layer).merged
        for model, weights in zip(models, np.asarray(merged), strict=True):
            model[f"layers.{layer}.weight"] = weights
    paths = [root / f"{n_layers}-tune-{k}" / "model.safetensors" for k in range(5)]
    for path, model in zip(paths, models, strict=True):
        save_safetensors(path, model)
    return [path.parent for path in paths]


def in_processes(paths: list[Path], out: Path, count: int) -> dict[str, Any]:
    """Seconds and report of ``jdetune recover`` in so many processes of one core each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    plain = {n: v for n, v in os.environ.items() if n != "JAX_NUM_CPU_DEVICES"}
    available = sorted(os.sched_getaffinity(0))
    clock = time.perf_counter()
    running = []
    for index in range(count):
        command = [sys.executable, "-m", "jdetune", "recover", *map(str, paths), f"--out={out}"]
        if count > 1:
            command += [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
            command += [f"--process_id={index}"]
        process = subprocess.Popen(
            ["taskset", "--cpu-list", str(available[index % len(available)]), *command],
            env={**plain, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
    said = [process.communicate()[1] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("\n".join(said))
    report = json.loads((out / "report.json").read_text())
    return {"wall": time.perf_counter() - clock, **report["timing"], "seconds": report["seconds"]}


def digest_of(out: Path) -> str:
    """Digest of all files but the report, with their names."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.suffix != ".json")
    content = b"".join(str(p.relative_to(out)).encode() + p.read_bytes() for p in files)
    return hashlib.sha256(content).hexdigest()


def main(_: list[str]) -> None:
    """Prints both tables; the exit code is 1 where results differ."""
    rows, same, first = [], True, 0.0
    runs = {count: on_devices(FLAGS.size, FLAGS.layers, count) for count in (1, 2, 4, 8)}
    most = runs[8]["digests"]
    for count, run in runs.items():
        equal = run["digests"] == most[: len(run["digests"])]
        same &= equal
        efficiency = runs[1]["seconds"] / run["seconds"]
        rows.append(
            [f"{count} device(s)", f"{FLAGS.layers * count}", f"{run['seconds']:.2f}"]
            + [f"{efficiency:.2f}", f"{run['idle']:.0%}", "equal" if equal else "DIFFERENT"]
        )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for count in (1, 2):
            paths = write_models(root, FLAGS.size, FLAGS.layers * count)
            in_processes(paths, root / f"warm-{count}", 1)  # compiles, and is what to compare with
            run = in_processes(paths, root / f"out-{count}", count)
            equal = digest_of(root / f"warm-{count}") == digest_of(root / f"out-{count}")
            same &= equal
            first = run["seconds"] if count == 1 else first
            rows.append(
                [f"{count} process(es)", f"{FLAGS.layers * count}", f"{run['seconds']:.2f}"]
                + [f"{first / run['seconds']:.2f}", f"{run['not_in_solve']:.0%}"]
                + ["equal" if equal else "DIFFERENT"]
            )
    headers = ["on", "layers", "seconds", "efficiency", "not compute", "result"]
    sys.stdout.write(tables.table(headers, rows) + "\n")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    flags.DEFINE_integer("layers", 8, "Layers for each device or process.", lower_bound=1)
    flags.DEFINE_integer("size", 384, "Side of a layer.")
    app.run(main)
