"""What needs no solving is written while the rest is solved; no byte depends on it."""

import contextlib
import dataclasses
import threading
import time
import types

import numpy as np
import pytest

from jdetune import ahead, pipeline, solving
from jdetune.checkpoint import open_checkpoint, read_tensor
from jdetune.distributed import Processes
from jdetune.result import Recoveries
from jdetune.status import Status
from tests import pico

IDENTICAL = {
    "encoder.layer.0.dense.weight",
    *("encoder.norm.weight", "encoder.norm.bias", "classifier.weight", "classifier.bias"),
}
QUERY = "encoder.layer.0.query.weight"


def contents(folder):
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and "report" not in p.name]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def run(family, out, teller=None, **options):
    teller = teller or pico.truth_teller(family.base)
    return pipeline.run(family.paths, out, pipeline.Options(**options), recover_fn=teller)


@contextlib.contextmanager
def nothing_ahead(*_):
    yield {}


@pytest.fixture
def seen(monkeypatch):
    """Makes solving wait for what is written ahead; tells what was, and what was written anew."""
    found, finished = {}, threading.Event()
    honest, save = ahead.begin_shard, ahead._begin_files

    def begin(template, path, file, get_tensor, is_ready):
        found[file] = honest(template, path, file, get_tensor, is_ready)
        return found[file]

    def begin_files(*arguments):
        try:
            save(*arguments)
        finally:
            finished.set()

    solve = solving._solve_group

    def late(*arguments):
        assert finished.wait(10)
        return solve(*arguments)

    monkeypatch.setattr(ahead, "begin_shard", begin)
    monkeypatch.setattr(ahead, "_begin_files", begin_files)
    monkeypatch.setattr(solving, "_solve_group", late)
    return found


def plainly(monkeypatch, family, out, teller=None, **options):
    """The same run without writing ahead."""
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "writing_ahead", nothing_ahead)
        run(family, out, teller, **options)
    return contents(out)


@pytest.mark.parametrize("shards", [1, 2])
def test_what_is_equal_is_written_before_anything_is_solved(tmp_path, monkeypatch, seen, shards):
    family = pico.make(tmp_path / "zoo")
    for path, model in zip(family.paths, family.models, strict=True):
        pico.write(path, model, shards)
        if shards > 1:
            (path / "model.safetensors").unlink()
    run(family, tmp_path / "out")
    assert len(seen) == shards
    assert set().union(*(begun.done for begun in seen.values())) == IDENTICAL
    assert contents(tmp_path / "out") == plainly(monkeypatch, family, tmp_path / "plain")


@pytest.mark.parametrize("wrong", ["a matrix without a base", "a narrower base"])
def test_wrong_guesses_cost_nothing_but_time(tmp_path, monkeypatch, seen, wrong):
    family = pico.make(tmp_path / "zoo")
    failing, half = pico.truth_teller(family.base, {QUERY: Status.NOT_LOW_RANK}), {}
    half = {name: array.astype(np.float16) for name, array in family.base.items()}
    teller = failing if "without" in wrong else pico.truth_teller(half)
    run(family, tmp_path / "out", teller)
    assert [begun.done for begun in seen.values()] == [IDENTICAL]
    assert contents(tmp_path / "out") == plainly(monkeypatch, family, tmp_path / "plain", teller)


def test_a_tensor_that_takes_too_much_memory_waits(tmp_path, monkeypatch, seen):
    family = pico.make(tmp_path / "zoo")
    # an eighth of it is less than the largest tensor, 24 x 24
    run(family, tmp_path / "out", max_memory=8 * (24 * 24 * 4 - 1))
    assert [begun.done for begun in seen.values()] == [IDENTICAL - {"encoder.layer.0.dense.weight"}]
    assert contents(tmp_path / "out") == plainly(monkeypatch, family, tmp_path / "plain")


def test_it_ends_with_the_solving(tmp_path, monkeypatch):
    """What is not written by then is written after it."""
    family, solved, began = pico.make(tmp_path / "zoo"), threading.Event(), threading.Event()
    found, honest = {}, ahead.begin_shard

    def begin(template, path, file, get_tensor, is_ready):
        def ready(name):
            first = not began.is_set()
            began.set()
            if not first:
                assert solved.wait(10)
            return is_ready(name)

        found[file] = honest(template, path, file, get_tensor, ready)
        return found[file]

    class Event(threading.Event):
        def set(self):
            super().set()
            solved.set()

    teller = pico.truth_teller(family.base)

    def late(*arguments, **options):
        assert began.wait(10)
        return teller(*arguments, **options)

    monkeypatch.setattr(ahead, "begin_shard", begin)
    monkeypatch.setattr(ahead, "threading", types.SimpleNamespace(Event=Event))
    run(family, tmp_path / "out", late)
    assert len(found["model.safetensors"].done) < len(IDENTICAL)
    assert contents(tmp_path / "out") == plainly(monkeypatch, family, tmp_path / "plain")


@pytest.mark.usefixtures("seen")
def test_what_was_read_is_not_lost_with_its_model(tmp_path, monkeypatch):
    """A model that vanishes when the last matrix is solved was read as it was compared."""
    family = pico.make(tmp_path / "zoo")
    file = family.paths[0] / "model.safetensors"
    kept = file.read_bytes()

    def vanish(stage, done, total):
        if stage == "recover" and done == total:
            file.unlink(missing_ok=True)

    teller = pico.truth_teller(family.base)
    pipeline.run(family.paths, tmp_path / "out", progress=vanish, recover_fn=teller)
    assert not file.exists()
    file.write_bytes(kept)
    assert contents(tmp_path / "out") == plainly(monkeypatch, family, tmp_path / "plain")


def test_what_fails_ahead_is_done_again(tmp_path, monkeypatch, seen):
    family = pico.make(tmp_path / "zoo")
    real = ahead.deferred

    def broken(checkpoint, name):
        later = real(checkpoint, name)
        return ahead.Deferred(later.dtype, later.shape, unreadable)

    def unreadable():
        raise OSError("no space left")

    monkeypatch.setattr(ahead, "deferred", broken)
    run(family, tmp_path / "out")
    assert not seen
    monkeypatch.undo()
    assert contents(tmp_path / "out") == plainly(monkeypatch, family, tmp_path / "plain")


def test_mistakes_in_it_are_not_hidden(tmp_path, monkeypatch):
    family = pico.make(tmp_path / "zoo")

    def wrong(*_):
        raise TypeError("a mistake")

    monkeypatch.setattr(ahead, "guess", wrong)
    with pytest.raises(TypeError, match="a mistake"):
        run(family, tmp_path / "out")


def test_the_vote_of_models_that_are_left_out_does_not_count(tmp_path, seen):
    """What was begun with another majority is not gone on with, though all offsets are the same."""
    family = pico.make(tmp_path, n_models=5)
    for index, model in enumerate(family.models):
        odd = np.full(3, 1 if index in (0, 3, 4) else 2, np.float32)
        pico.write(family.paths[index], {**model, "classifier.bias": odd})

    def teller(stacks, solver, progress):
        found = {}
        for name, stack in stacks.items():
            known = pico.known(stack, family.base[name])
            groups = np.array([0, 0, 0, 1, 2], np.int32)[
                : len(stack)
            ]  # the last two have other bases
            found[name] = dataclasses.replace(known, stats={**known.stats, "base_group": groups})
        return Recoveries(found)

    run(family, tmp_path / "out", teller)
    assert "classifier.bias" in seen["model.safetensors"].done
    bias = read_tensor(open_checkpoint(tmp_path / "out" / "base"), "classifier.bias")
    np.testing.assert_array_equal(bias, np.full(3, 2, np.float32))


def test_processes_that_share_a_folder_write_to_files_of_their_own(tmp_path):
    family = pico.make(tmp_path / "zoo")
    for path, model in zip(family.paths, family.models, strict=True):
        pico.write(path, model, 3)
        (path / "model.safetensors").unlink()
    options = pipeline.Options()
    plan = pipeline.plan_models(pipeline.open_models(family.paths), options)
    found = []
    for index in range(2):
        with ahead.writing_ahead(plan, tmp_path / "ahead", Processes(index, 2), 2**20) as begun:
            while len(begun) < (2, 1)[index]:
                time.sleep(0.01)
        found += [(file, part.path) for file, part in begun.items()]
    assert sorted(file for file, _ in found) == sorted(plan.checkpoints[0].files)
    assert len({path for _, path in found}) == 3


def test_files_of_other_models_are_dropped(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"")
    begun = {"x": ahead.Begun(path, b"", frozenset())}
    ahead.drop(begun)
    assert not begun
    assert not path.exists()
