"""A run killed at any moment goes on with the same command and ends with the same bytes."""

import json
import random
import subprocess
import threading
import time

import pytest

from jdetune import outfolder, pipeline, solving
from jdetune.errors import OutputError
from tests import pico
from tests.test_distributed import command, files_of, plain_environment, untimed, write_family

#: Files and folders that appear one after another while a run goes on.
MILESTONES = ("state.json", "solved/first/group-00000.safetensors", "base", "adapters")


def kill_often(tmp_path, milestones, rng):
    """Kills a run just after each milestone, then lets it end; returns how often it was killed."""
    paths = write_family(tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {"env": plain_environment(), "capture_output": True, "timeout": 300}
    subprocess.run(command(paths, whole, "--masks"), check=True, **options)
    killed = 0
    for milestone in milestones:
        process = subprocess.Popen(
            command(paths, broken, "--masks"),
            env=plain_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not (broken / ".jdetune" / milestone).exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        killed += process.wait() == -9
        if (broken / "report.json").exists() and not (broken / ".jdetune").exists():
            break
    if not (broken / "report.json").exists() or (broken / ".jdetune").exists():
        subprocess.run(command(paths, broken, "--masks"), check=True, **options)
    assert not (broken / ".jdetune").exists()
    one, two = files_of(whole), files_of(broken)
    assert list(one) == list(two)
    for name in one:
        if name != "report.json":
            assert one[name].read_bytes() == two[name].read_bytes(), name
    first, second = (json.loads(f["report.json"].read_text()) for f in (one, two))
    assert untimed(first) == untimed(second)
    return killed


def test_killed_runs_go_on(tmp_path):
    assert kill_often(tmp_path, MILESTONES[:3], random.Random(0)) > 0


@pytest.mark.slow
def test_fifty_random_kills(tmp_path, capsys):
    rng = random.Random(1)
    killed = runs = 0
    while killed < 50:
        milestones = rng.choices(MILESTONES, k=4)
        found = kill_often(tmp_path / str(runs), milestones, rng)
        assert found, "every run ended before it was killed"
        killed, runs = killed + found, runs + 1
    with capsys.disabled():
        print(f"{killed} kills in {runs} runs, each with the bytes of an uninterrupted one")


def interrupted(tmp_path):
    """A run that fails after its first group; returns family, output and what was solved."""
    family = pico.make(tmp_path / "zoo")
    teller, calls = pico.truth_teller(family.base), []

    def failing(stacks, **options):
        calls.append(sorted(stacks))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return teller(stacks, **options)

    return family, tmp_path / "out", failing, calls


def one_by_one(monkeypatch):
    monkeypatch.setattr("jdetune.checkpoint.manifest.GROUP_LAYERS", 1)


def test_what_was_solved_before_an_interruption_is_not_solved_again(tmp_path, monkeypatch):
    one_by_one(monkeypatch)
    family, out, failing, calls = interrupted(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(family.paths, out, recover_fn=failing)
    assert [p.name for p in out.iterdir()] == [".jdetune"]
    again = []
    teller = pico.truth_teller(family.base)
    pipeline.run(
        family.paths, out, recover_fn=lambda s, **o: again.append(sorted(s)) or teller(s, **o)
    )
    assert len(again) == 3
    assert calls[0] not in again


def test_other_inputs_or_flags_are_refused_until_overwritten(tmp_path, monkeypatch):
    one_by_one(monkeypatch)
    family, out, failing, _ = interrupted(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(family.paths, out, recover_fn=failing)
    teller = pico.truth_teller(family.base)
    other = pico.make(tmp_path / "other", seed=1)
    with pytest.raises(OutputError, match="other models"):
        pipeline.run(other.paths, out, recover_fn=teller)
    with pytest.raises(OutputError, match="other flags"):
        pipeline.run(family.paths, out, pipeline.Options(exclude="value"), recover_fn=teller)
    anew = pipeline.Options(overwrite=True)
    other_teller = pico.truth_teller(other.base)
    assert pipeline.run(other.paths, out, anew, recover_fn=other_teller)["base"] is not None


@pytest.mark.parametrize("steps", range(8))
def test_killed_while_the_output_is_put_in_place(tmp_path, monkeypatch, steps):
    family = pico.make(tmp_path / "zoo")
    out, teller = tmp_path / "out", pico.truth_teller(family.base)
    pipeline.run(family.paths, out, recover_fn=teller)
    (out / "base" / "old").write_text("of the former output")
    rename, count = type(out).rename, iter(range(99))

    class Killed(BaseException):
        pass

    def die(self, target):
        if self.suffix != ".tmp" and next(count) == steps:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(out), "rename", die)
        patch.setattr(outfolder, "place", lambda out, stage: unguarded(out, stage))

        def unguarded(out, stage):
            new = [name for name in outfolder.PRODUCTS if (stage / name).exists()]
            placing = {"products": new, "known": list(outfolder.PRODUCTS)}
            outfolder.save_json(stage / outfolder._PLACING, placing)
            outfolder._move_all(out, stage, new, outfolder.PRODUCTS, [])
            outfolder._remove_stage(out, stage)

        again = pipeline.Options(overwrite=True)
        try:
            pipeline.run(family.paths, out, again, recover_fn=teller)
        except Killed:
            assert (out / ".jdetune").is_dir()
    if (out / ".jdetune").exists():
        pipeline.run(family.paths, out, recover_fn=None)  # solves nothing: it is all there
    assert sorted(p.name for p in out.iterdir()) == ["adapters", "base", "report.json"]
    assert not (out / "base" / "old").exists()


def test_the_next_group_is_read_while_one_is_solved(tmp_path, monkeypatch):
    one_by_one(monkeypatch)
    family = pico.make(tmp_path / "zoo")
    teller, honest = pico.truth_teller(family.base), solving.read_stack
    read = {name: threading.Event() for name in pico.SHAPES}
    order = []

    def reading(checkpoints, name):
        read[name].set()
        return honest(checkpoints, name)

    def solve(stacks, **options):
        order.extend(stacks)
        waiting = [name for name in read if "dense" not in name and name not in order]
        assert not waiting or read[waiting[0]].wait(10)  # would never come without reading ahead
        assert not any(read[name].is_set() for name in waiting[1:])  # but no more than one ahead
        return teller(stacks, **options)

    monkeypatch.setattr(solving, "read_stack", reading)
    report = pipeline.run(family.paths, tmp_path / "out", recover_fn=solve)
    assert report["summary"]["recovered"] == 4


def test_groups_are_a_quarter_of_the_budget():
    assert solving.group_bytes(pipeline.Options(max_memory=4000)) == 1000
    assert solving.group_bytes(pipeline.Options()) == solving.GROUP_BYTES


def test_a_small_budget_makes_more_groups_and_the_same_files(tmp_path):
    family = pico.make(tmp_path / "zoo")
    calls = []
    teller = pico.truth_teller(family.base)

    def counting(stacks, **options):
        calls.append(len(stacks))
        return teller(stacks, **options)

    pipeline.run(family.paths, tmp_path / "one", recover_fn=counting)
    small = pipeline.Options(max_memory=4 * 3 * 48 * 32 * 4)
    pipeline.run(family.paths, tmp_path / "many", small, recover_fn=counting)
    assert calls == [4, 1, 1, 1, 1]
    one, many = files_of(tmp_path / "one"), files_of(tmp_path / "many")
    assert all(one[n].read_bytes() == many[n].read_bytes() for n in one if n != "report.json")
