"""`jdetune extract` beside mergekit-extract-lora: the same files, both as programs, error and time.

    python -m benchmarks.extract --mergekit=PATH/TO/bin/mergekit-extract-lora

The real all-MiniLM-L6-v2, merged with real adapters of rank 16 by PEFT's rule and saved. mergekit
is given the rank, jdetune finds it. Without --mergekit (it pins other versions of much, so it wants
an environment of its own) the comparison is with torch.linalg.svd and torch.svd_lowrank of the
difference. Times are of whole programs, start and writing included, the least of --repeats; the
first run of jdetune, which compiles, is apart.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks import families
from benchmarks.tables import table
from jdetune.checkpoint import (
    LoraUpdate,
    merge_peft,
    open_checkpoint,
    read_adapter,
    read_tensor,
    save_like,
)

_MERGEKIT = flags.DEFINE_string("mergekit", None, "The program mergekit-extract-lora.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "How the models are stored.")
_SET = flags.DEFINE_string("adapters", "minilm-distinct", "Set of adapters, of all-MiniLM-L6-v2.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs.", lower_bound=1)


def write_models(root: Path, dtype: str) -> dict[str, families.Factors]:
    """Writes base and one merged model; returns the true updates."""
    from benchmarks.real_models import weights_file

    source = open_checkpoint(weights_file("minilm").parent)
    kind = np.dtype(families.DTYPES[dtype])
    truth = {name: models[0] for name, models in families.factors(_SET.value, 1).items()}

    def stored(name: str) -> np.ndarray:
        array = read_tensor(source, name)
        return array.astype(kind) if array.dtype == np.float32 else array

    def merged(name: str) -> np.ndarray:
        if name not in truth:
            return stored(name)
        one = truth[name]
        return merge_peft(stored(name), one.left, one.right, one.scaling)

    save_like(source, root / "base", stored)
    save_like(source, root / "tune", merged)
    for folder in ("base", "tune"):
        path = root / folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "torch_dtype": dtype}))
    return truth


def accuracy(root: Path, adapter: Path, truth: dict[str, families.Factors]) -> list[str]:
    """Ranks, relative error of the updates, and share of weights that a merge gives back."""
    updates = read_adapter(adapter).updates
    return figures(root, {name: updates[name] for name in truth}, truth)


def figures(
    root: Path, updates: dict[str, LoraUpdate], truth: dict[str, families.Factors]
) -> list[str]:
    """The table's cells of some updates."""
    base, model = (open_checkpoint(root / name) for name in ("base", "tune"))
    miss = size = equal = total = 0.0
    ranks = set()
    for name, one in truth.items():
        update = updates[name]
        true = np.matmul(one.left.astype(np.float64), one.right) * one.scaling
        ours = np.matmul(update.left.astype(np.float64), update.right) * update.scaling
        miss, size = miss + np.sum((ours - true) ** 2), size + np.sum(true**2)
        again = merge_peft(read_tensor(base, name), update.left, update.right, update.scaling)
        equal += float(np.sum(again == read_tensor(model, name)))
        total += again.size
        ranks.add(update.left.shape[1])
    said = ", ".join(map(str, sorted(ranks)))
    return [said, f"{np.sqrt(miss / size):.2e}", f"{equal / total:.4f}"]


def seconds(command: list[str], out: Path, repeats: int) -> list[float]:
    """Wall time of a program, run after run, each into an empty folder."""
    times = []
    for _ in range(repeats):
        shutil.rmtree(out, ignore_errors=True)
        begin = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        times.append(time.monotonic() - begin)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return times


def compare(root: Path, dtype: str) -> list[list[str]]:
    """Rows of one storage dtype."""
    truth = write_models(root, dtype)
    out = root / "ours"
    line = [sys.executable, "-m", "jdetune", "extract", f"--base={root / 'base'}"]
    line += [str(root / "tune"), f"--out={out}", "--quiet"]
    os.environ["JDETUNE_CACHE"] = str(root / "cache")
    first = seconds(line, out, 1)[0]
    least = min(seconds(line, out, _REPEATS.value))
    cells = accuracy(root, out / "adapters" / "tune", truth)
    rows = [[dtype, "jdetune extract", *cells, f"{least:.2f} (first run {first:.2f})"]]
    if _MERGEKIT.value is None:
        return rows + [[dtype, *row] for row in torch_rows(root, truth)]
    out = root / "theirs"
    line = [_MERGEKIT.value, "--model", str(root / "tune"), "--base-model", str(root / "base")]
    line += ["--out-path", str(out), "--max-rank", str(int(cells[0].split(", ")[-1])), "--quiet"]
    least = min(seconds(line, out, _REPEATS.value))
    return [*rows, [dtype, "mergekit-extract-lora", *accuracy(root, out, truth), f"{least:.2f}"]]


def torch_rows(root: Path, truth: dict[str, families.Factors]) -> list[list[str]]:
    """Plain decompositions of the float32 difference, of the changed matrices only, in process."""
    import torch

    base, model = (open_checkpoint(root / name) for name in ("base", "tune"))
    rank = max(one.right.shape[0] for one in truth.values())

    def full(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank] * s[:rank], vt[:rank]

    def sketched(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        u, s, v = torch.svd_lowrank(matrix, q=rank)
        return u * s, v.T

    methods: dict[str, Callable] = {"torch.linalg.svd": full, "torch.svd_lowrank": sketched}
    rows = []
    for label, method in methods.items():
        begin, updates = time.monotonic(), {}
        for name in truth:
            before, after = (read_tensor(c, name).astype(np.float32) for c in (base, model))
            left, right = (p.numpy() for p in method(torch.from_numpy(after - before)))
            updates[name] = LoraUpdate(left, right, 1.0)
        spent = time.monotonic() - begin
        cells = figures(root, updates, truth)
        rows.append([label, *cells, f"{spent:.2f} (in process, nothing written)"])
    return rows


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    rows = []
    for dtype in _DTYPES.value:
        with tempfile.TemporaryDirectory() as folder:
            rows += compare(Path(folder), dtype)
    head = ["stored", "method", "ranks", "relative error", "re-merge equal", "seconds"]
    print(table(head, rows))
    load = os.getloadavg()[0]
    print(f"\n{_SET.value}, all-MiniLM-L6-v2; {os.cpu_count()} cores, load {load:.1f}")


if __name__ == "__main__":
    app.run(main)
