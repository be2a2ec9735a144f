"""Memory and overlap of ``jdetune recover`` on checkpoints larger than its budget.

    python -m benchmarks.pipeline

Writes made checkpoints (8 of 1 GiB by default, float32 layers of 1024 x 1024), of which ``--tuned``
layers differ by LoRA updates and the others are equal in all models: all bytes are read, hashed and
compared all the same. Runs the command line on them and samples the memory of its process.

The run passes where its peak stays below ``--max_memory`` plus what ``import jax`` and the largest
single group need: a layer of all models solved alone in a process of its own, which includes the
import and the compiled programs (taken from the cache of a run before, in both). ``over larger`` is
the run's time over the larger of reading plus writing and computing (digests count as computing);
it passes at 1.2.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks import tables
from jdetune.checkpoint import save_json, save_safetensors
from jdetune.cli.common import parse_size
from jdetune.deferred import Deferred

FLAGS = flags.FLAGS
MIB = 2**20
#: The run's time over the larger of transfer and computing, at most.
OVERLAP_LIMIT = 1.2

#: Peak memory of a process: after the import, and after one layer of all models was solved.
_ALONE = """
import json, sys
from jdetune.cli.main import prepare_environment
prepare_environment()
import jax
from benchmarks.pipeline import peak_memory, seeded_layer
jax.devices()
imported = peak_memory("self")
import numpy as np, jdetune
count, side, rank, budget = map(int, sys.argv[1:])
stack = np.stack([seeded_layer(0, side, rank, model) for model in range(count)])
read = peak_memory("self")
found = jdetune.recover({"layer": stack}, max_memory=budget)
assert found.ok
print(json.dumps({"imported": imported, "read": read, "solved": peak_memory("self")}))
"""


def peak_memory(process: int | str) -> int:
    """Largest resident memory of a process so far, in bytes; 0 if it is gone."""
    return _status_bytes(process, "VmHWM:")


def _status_bytes(process: int | str, key: str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def seeded_layer(layer: int, side: int, rank: int, model: int | None) -> np.ndarray:
    """One layer of the base, or as a model has it, [side, side], float32."""
    rng = np.random.default_rng([layer, 0])
    base = 0.02 * rng.standard_normal((side, side), np.float32)
    if model is None:
        return base
    rng = np.random.default_rng([layer, 1 + model])
    left, right = rng.standard_normal((2, side, rank), np.float32)
    return base + np.float32(2e-3 / rank**0.5) * (left @ right.T)


def write_models(
    root: Path, models: int, layers: int, tuned: int, side: int, rank: int
) -> list[Path]:
    """Checkpoints of square layers; those that are tuned are spread evenly."""
    every = max(1, layers // tuned) if tuned else layers + 1
    kind, shape = np.dtype(np.float32), (side, side)

    def read(layer: int, model: int) -> np.ndarray:
        differs = layer % every == 0 and layer // every < tuned
        return seeded_layer(layer, side, rank, model if differs else None)

    paths = []
    for model in range(models):
        path = root / f"tune-{model}"
        tensors = {
            f"layers.{k:03d}.weight": Deferred(kind, shape, lambda k=k, m=model: read(k, m))
            for k in range(layers)
        }
        save_safetensors(path / "model.safetensors", tensors)
        save_json(path / "config.json", {"model_type": "made"})
        paths.append(path)
    return paths


def drop_cache(paths: list[Path]) -> None:
    """Asks the system to forget the files, so that they are read from the disk."""
    for path in paths:
        with (path / "model.safetensors").open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def recover(paths: list[Path], out: Path, max_memory: str) -> tuple[dict[str, Any], int, float]:
    """Runs the command line: report, peak memory with children, and seconds."""
    command = [sys.executable, "-m", "jdetune", "recover", *map(str, paths), f"--out={out}"]
    command += [f"--max_memory={max_memory}", "--platform=cpu", "--overwrite"]
    peak, clock = [0], time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def sample() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], peak_memory(process.pid), _family_memory(process.pid))
            time.sleep(0.05)

    thread = threading.Thread(target=sample)
    thread.start()
    said = process.communicate()[0]
    thread.join()
    seconds = time.monotonic() - clock
    print(said)
    if process.returncode != 0:
        raise SystemExit(f"jdetune recover ended with {process.returncode}")
    return json.loads((out / "report.json").read_text()), peak[0], seconds


def _family_memory(pid: int) -> int:
    """Resident memory of a process and its children now."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = _status_bytes(pid, "VmRSS:")
    return own + sum(_family_memory(int(child)) for child in children)


def alone(models: int, side: int, rank: int, budget: int) -> dict[str, int]:
    """Peak memory of the import, of one layer of all models in memory, and of it solved."""
    arguments = map(str, (models, side, rank, budget))
    command = [sys.executable, "-c", _ALONE, *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def measure(root: Path) -> bool:
    """Prints all figures; whether both limits are kept."""
    budget = parse_size(FLAGS.max_memory, "--max_memory") or 0
    paths = write_models(root, FLAGS.models, FLAGS.layers, FLAGS.tuned, FLAGS.side, FLAGS.rank)
    total = sum((path / "model.safetensors").stat().st_size for path in paths)
    cold = alone(FLAGS.models, FLAGS.side, FLAGS.rank, budget)  # compiles, and keeps the programs
    one = alone(FLAGS.models, FLAGS.side, FLAGS.rank, budget)
    if FLAGS.cold:
        drop_cache(paths)
    load = os.getloadavg()[0]
    report, peak, seconds = recover(paths, root / "out", FLAGS.max_memory)
    limit, timing = budget + one["solved"], report["timing"]
    rows = [
        ["models", f"{FLAGS.models} of {total / FLAGS.models / 2**30:.2f} GiB"],
        ["layers that differ, of all", f"{FLAGS.tuned} of {FLAGS.layers}"],
        ["import jax, MiB", f"{one['imported'] / MIB:.0f}"],
        [
            "one layer of all models solved alone, import included, MiB",
            f"{one['solved'] / MIB:.0f}",
        ],
        ["the same where programs are compiled first, MiB", f"{cold['solved'] / MIB:.0f}"],
        ["--max_memory, MiB", f"{budget / MIB:.0f}"],
        ["peak allowed, MiB", f"{limit / MIB:.0f}"],
        ["peak, MiB", f"{peak / MIB:.0f}"],
        ["reading, s", f"{timing['reading']:.1f}"],
        ["writing, s", f"{timing['writing']:.1f}"],
        ["reading or writing, s", f"{timing['transferring']:.1f}"],
        ["computing, s", f"{timing['computing']:.1f}"],
        ["wall, s (with start of Python)", f"{report['seconds']:.1f} ({seconds:.1f})"],
        ["over larger", f"{timing['over_larger']:.2f}"],
        ["load average at the start", f"{load:.1f}"],
    ]
    print(tables.table(["figure", "value"], rows))
    fits, overlaps = peak < limit, timing["over_larger"] <= OVERLAP_LIMIT
    print(f"memory: {'pass' if fits else 'FAIL'}; overlap: {'pass' if overlaps else 'FAIL'}")
    return fits and overlaps


def main(argv: list[str]) -> None:
    """Writes the models, measures and removes them."""
    del argv
    root = Path(tempfile.mkdtemp(prefix="jdetune-pipeline-", dir=FLAGS.root))
    try:
        good = measure(root)
    finally:
        shutil.rmtree(root)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    flags.DEFINE_integer("models", 8, "Checkpoints.")
    flags.DEFINE_integer("layers", 256, "Layers of each; 256 of 1024 x 1024 are 1 GiB.")
    flags.DEFINE_integer("tuned", 16, "Layers in which the models differ.")
    flags.DEFINE_integer("side", 1024, "Rows and columns of a layer.")
    flags.DEFINE_integer("rank", 16, "Rank of the updates.")
    flags.DEFINE_string("max_memory", "512MiB", "Budget of the run.")
    flags.DEFINE_string("root", None, "Folder for the checkpoints; the system's if left out.")
    flags.DEFINE_boolean("cold", False, "Have the models read from the disk, not from memory.")
    app.run(main)
