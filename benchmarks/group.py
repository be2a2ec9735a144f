"""`jdetune group` on a mixed zoo of real merged models: right or wrong, time a model, bytes read.

    python -m benchmarks.group --recover

All models are all-MiniLM-L6-v2 with real adapters of rank 16, merged by PEFT's rule:

| members | base | stored |
|---|---|---|
| five | as shipped | float32 |
| three, with further adapters | as shipped | bfloat16 |
| four, with further adapters | its matrices quantised to int8 by rows and dequantised | float32 |
| one | as shipped, every weight moved at random (stands for a full fine-tune) | float32 |
| one copy of a merged model | | |
| one of another architecture: the first 192 columns of every matrix | | float32 |

With --recover the program goes on to recover both groups, and the bases are compared with the true
ones. Times are those of the whole program in a new process; the first run compiles.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import app, flags

from benchmarks import families
from benchmarks.tables import table
from jdetune.checkpoint import (
    Checkpoint,
    merge_peft,
    open_checkpoint,
    read_tensor,
    save_like,
    save_safetensors,
)
from jdetune.leak.defences import int8

_RECOVER = flags.DEFINE_boolean("recover", False, "Also recover the groups.")
_SET = "minilm-distinct"


def write_zoo(root: Path) -> dict[str, list[str]]:
    """Writes the models; returns the true groups by label."""
    from benchmarks.real_models import weights_file

    source = open_checkpoint(weights_file("minilm").parent)
    updates = families.factors(_SET, 12)
    rng = np.random.default_rng(0)

    def shipped(name: str) -> np.ndarray:
        return read_tensor(source, name)

    def quantised(name: str) -> np.ndarray:
        array = shipped(name)
        return int8(array) if array.ndim == 2 and array.dtype == np.float32 else array

    def moved(name: str) -> np.ndarray:
        array = shipped(name)
        if array.dtype != np.float32:
            return array
        step = 0.02 * float(np.std(array))
        return (array + step * rng.standard_normal(array.shape)).astype(np.float32)

    def merged(base: Any, index: int, dtype: Any) -> Any:
        def get(name: str) -> np.ndarray:
            array = base(name)
            array = array.astype(dtype) if array.dtype == np.float32 else array
            if name not in updates:
                return array
            one = updates[name][index]
            return merge_peft(array, one.left, one.right, one.scaling)

        return get

    def narrow(name: str) -> np.ndarray:
        array = shipped(name)
        return np.ascontiguousarray(array[..., :192]) if array.ndim == 2 else array

    half = ml_dtypes.bfloat16
    bf16 = [f"bf16-{index}" for index in range(5, 8)]
    groups = {
        "shipped": [f"fp32-{index}" for index in range(5)],
        "int8": [f"int8-{index}" for index in range(8, 12)],
    }
    save_like(source, root / "true-shipped", shipped)
    save_like(source, root / "true-int8", quantised)
    zoo = root / "zoo"
    for index, name in enumerate(groups["shipped"]):
        save_like(source, zoo / name, merged(shipped, index, np.float32))
    for index, name in enumerate(bf16, 5):
        save_like(source, zoo / name, merged(shipped, index, half))
    for index, name in enumerate(groups["int8"], 8):
        save_like(source, zoo / name, merged(quantised, index, np.float32))
    shutil.copytree(zoo / "fp32-2", zoo / "copy-of-2")
    save_like(source, zoo / "full", moved)
    _save_narrow(source, zoo / "narrow", narrow)
    groups["shipped"] += [*bf16, "copy-of-2"]
    return groups


def _save_narrow(source: Checkpoint, folder: Path, get: Any) -> None:
    save_safetensors(folder / "model.safetensors", {name: get(name) for name in source.tensors})
    shutil.copy(source.root / "config.json", folder)


def run(line: list[str]) -> tuple[dict[str, Any], float, float]:
    """JSON, seconds and processor seconds of a run of the program."""
    begin, before = time.monotonic(), os.times()
    done = subprocess.run(
        [sys.executable, "-m", "jdetune", "group", *line, "--json", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 5):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    after = os.times()
    used = sum(after[2:4]) - sum(before[2:4])
    return json.loads(done.stdout), time.monotonic() - begin, used


def judge(found: dict[str, Any], truth: dict[str, list[str]]) -> list[str]:
    """What is wrong with the groups; nothing if they are right."""
    wrong = []
    got = {frozenset(group["members"]) for group in found["groups"]}
    if got != {frozenset(members) for members in truth.values()}:
        wrong.append(f"groups are {[sorted(group) for group in got]}")
    if sorted(found["alone"]) != ["full", "narrow"]:
        wrong.append(f"alone are {found['alone']}")
    models = {entry["name"]: entry for entry in found["models"]}
    equals = [models[name]["equals"] for name in ("copy-of-2", "fp32-2")]
    if equals not in (["fp32-2", None], [None, "copy-of-2"]):
        wrong.append("the copy was not found")
    if "another architecture" not in (models["narrow"]["reason"] or ""):
        wrong.append("the narrow model is not told by its headers")
    return wrong


def main(argv: list[str]) -> None:
    """Prints the tree, the verdict and the times."""
    del argv
    with tempfile.TemporaryDirectory(prefix="jdetune-group-") as folder:
        root = Path(folder)
        os.environ["JDETUNE_CACHE"] = str(root / "cache")
        truth = write_zoo(root)
        models = sorted(str(path) for path in (root / "zoo").iterdir())
        stored = sum(path.stat().st_size for path in root.glob("zoo/*/*.safetensors"))
        found, first, first_cpu = run(models)
        again, second, second_cpu = run(models)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(render(found).replace(f"{root}/", ""))
        wrong = judge(found, truth) + judge(again, truth)
        print(f"\n{'right' if not wrong else 'WRONG: ' + '; '.join(wrong)}")
        rows = [
            [label, f"{spent:.1f}", f"{used:.1f}", f"{used / len(models):.2f}"]
            for label, spent, used in (
                ("first run", first, first_cpu),
                ("second run", second, second_cpu),
            )
        ]
        print(table(["", "seconds", "processor seconds", "of them a model"], rows))
        print(f"peak memory {peak:.0f} MiB, the program itself included")
        share = found["bytes_read"] / stored
        print(f"read {found['bytes_read'] / 1e6:.0f} of {stored / 1e6:.0f} MB ({share:.1%})")
        print(f"{len(found['comparisons'])} comparisons of {len(models)} models")
        if _RECOVER.value:
            recovered(root, models, truth)
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


def render(found: dict[str, Any]) -> str:
    """The tree, as the program prints it."""
    from jdetune.cli.group import render as text

    return text(found)


def recovered(root: Path, models: list[str], truth: dict[str, list[str]]) -> None:
    """Recovers the groups and compares their bases with the true ones."""
    from jdetune.verification import verify

    value, spent, _ = run([*models, "--recover", f"--out={root / 'out'}"])
    names = {frozenset(group["members"]): group["name"] for group in value["groups"]}
    rows = []
    for label, members in truth.items():
        out = root / "out" / names[frozenset(members)]
        result = verify(out, root / f"true-{label}")
        entry = next(run for run in value["runs"] if run["group"] == out.name)
        figures = [f"{result['w_error']:.2f}", f"{result['exact_fraction']:.4f}"]
        rows.append([out.name, label, str(len(members)), entry["verdict"], *figures])
    print(f"\nrecovered in {spent:.0f} s")
    print(table(["group", "true base", "models", "verdict", "W-error", "exact"], rows))
    _, spent, _ = run([*models, "--recover", f"--out={root / 'out'}"])
    print(f"the same command again: {spent:.1f} s, groups kept")


if __name__ == "__main__":
    app.run(main)
