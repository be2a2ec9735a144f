"""Thousands of damaged files: each is refused with a clear error or read right, and fast."""

import collections
import random
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from jdetune import pipeline
from jdetune.checkpoint import open_checkpoint, read_adapter, read_tensor
from jdetune.checkpoint.header import BITS
from jdetune.errors import InputError, JdetuneError
from jdetune.result import Adapters, Recoveries, Recovery
from jdetune.verification import verify
from tests import mutations, pico

#: Seconds of computing and of waiting (on a busy machine) that a case may take, and memory beside
#: some times the file's size.
SECONDS, PATIENCE = 5, 60
MEMORY = 16 << 20
TARGETS = (
    *("one/model.safetensors",) * 6,
    *("two/model-00001-of-00002.safetensors", "two/model-00002-of-00002.safetensors") * 2,
    *("two/model.safetensors.index.json",) * 4,
    *("one/config.json", "two/config.json", "one/tokenizer_config.json"),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    "done/report.json",
)


def write_zoo(root):
    """Two models to damage, in one file and in two, three good ones, an adapter, an output."""
    family = pico.make(root / "good")
    for name, shards in (("one", 1), ("two", 2)):
        pico.write(root / name, family.models[0], shards=shards, auto_map={"AutoModel": "x.Y"})
        (root / name / "tokenizer_config.json").write_text('{"a": {"auto_map": {"b": ["c"]}}}')
    pipeline.run(family.paths, root / "done", recover_fn=pico.truth_teller(family.base))
    shutil.copytree(root / "done" / "adapters" / "tune-0", root / "adapter")
    return family


def stand_in(stacks, solver=None, progress=None, **_):
    """A ``recover`` for matrices of any shape and content."""
    found = {}
    for name, stack in stacks.items():
        n, row, col = stack.shape
        found[name] = Recovery(
            base=stack[0],
            ranks=np.zeros(n, np.int32),
            adapters=Adapters(np.zeros((n, row, 1), np.float32), np.zeros((n, 1, col), np.float32)),
            status=np.array(0, np.int32),
            predicted_error=np.array(-9.0, np.float32),
            exact_fraction=np.array(np.nan, np.float32),
            amplification=np.array(np.nan, np.float32),
            certain=np.zeros((row, col), bool),
            stats={},
        )
    return Recoveries(found)


def read_all(folder):
    """Reads a model as jdetune does, and as safetensors does."""
    found = open_checkpoint(folder)
    infos = found.tensors.values()
    unknown = {i.file for i in infos if not i.is_known and i.dtype not in BITS}
    for name, info in found.tensors.items():
        if not info.is_known:
            with pytest.raises(InputError, match="not known"):
                read_tensor(found, name)
            continue
        ours = read_tensor(found, name)
        if info.file in unknown:  # the library refuses the whole file
            continue
        with safe_open(found.root / info.file, "np") as handle:  # what is accepted here is valid
            theirs = handle.get_tensor(name)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.tobytes() == theirs.tobytes()


def snapshot(root, out):
    """All that lies there, but for the output folder."""
    found = {}
    for path in sorted(root.rglob("*")):
        if not path.is_relative_to(out):
            stat = path.lstat()
            found[path] = (stat.st_mode, stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found


def try_case(root, target, good, out):
    """Reads what was damaged, and with ``good`` models recovers; whether it was refused."""
    kind = target.split("/")[0]
    message = ""
    try:
        if kind == "adapter":
            read_adapter(root / kind)
        elif kind == "done":
            verify(root / kind)
        else:
            read_all(root / kind)
            if good:
                pipeline.run([root / kind, *good], out, recover_fn=stand_in)
    except JdetuneError as error:
        message = str(error)
    assert message.isprintable(), repr(message)
    assert len(message) < 3000
    return bool(message)


def fuzz(tmp_path, count, seed, run_every):
    """Damages one file after another; returns counts by outcome."""
    root, out = tmp_path / "zoo", tmp_path / "zoo" / "out"
    family = write_zoo(root)
    rng, counts, slowest = random.Random(seed), collections.Counter(), 0.0
    for case in range(count):
        target = rng.choice(TARGETS)
        path = root / target
        kept = path.read_bytes()
        what = mutations.damage(rng, path)
        size = path.lstat().st_size if path.is_file() and what != "sparse" else 0
        good = family.paths if case % run_every == 0 else []
        before = snapshot(root, out)
        clock, begin = time.monotonic(), time.process_time()
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
        try:
            refused = try_case(root, target, good, out)
        except BaseException:
            print(f"case {case} of seed {seed}: {what} of {target}")
            raise
        used = tracemalloc.get_traced_memory()[1] - start
        seconds = time.process_time() - begin
        assert seconds < SECONDS, (case, what, target, seconds)
        assert time.monotonic() - clock < PATIENCE, (case, what, target)
        assert used < MEMORY + 64 * size, (case, what, target, used)
        assert snapshot(root, out) == before, (case, what, target)
        counts["refused" if refused else "read"] += 1
        counts["runs"] += bool(good) and not refused and target.startswith(("one", "two"))
        slowest = max(slowest, seconds)
        shutil.rmtree(out, ignore_errors=True)
        restore(path, kept)
    return counts, slowest


def restore(path: Path, data: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(data)


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def check(tmp_path, capsys, count, seed, run_every):
    clock = time.monotonic()
    counts, slowest = fuzz(tmp_path, count, seed, run_every)
    with capsys.disabled():
        print(
            f"\n{count} damaged files: {counts['refused']} refused, {counts['read']} read right "
            f"({counts['runs']} recovered from); slowest {slowest:.2f} s of computing, "
            f"all {time.monotonic() - clock:.0f} s"
        )
    assert counts["refused"] > count / 3
    assert counts["read"] > count / 50
    assert counts["runs"] > 0


def test_damaged_files(tmp_path, monkeypatch, capsys, traced):
    monkeypatch.chdir(tmp_path)
    check(tmp_path, capsys, count=300, seed=0, run_every=10)


@pytest.mark.slow
def test_thousands_of_damaged_files(tmp_path, monkeypatch, capsys, traced):
    monkeypatch.chdir(tmp_path)
    check(tmp_path, capsys, count=2200, seed=1, run_every=10)
