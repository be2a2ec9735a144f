"""A run killed at any moment goes on with the same command and ends with the same bytes."""

import random
import signal
import subprocess
import threading
import time

import pytest

from jdetune import outfolder, pipeline, solving
from jdetune.errors import OutputError
from tests import pico
from tests.test_distributed import command, plain_environment, same_files, write_family

#: Files and folders that appear one after another while a run goes on.
MILESTONES = ("state.json", "solved/first/group-00000.safetensors", "base", "adapters")


def start(paths, out):
    return subprocess.Popen(
        command(paths, out, "--masks"),
        env=plain_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def is_done(out):
    return (out / "report.json").exists() and not (out / ".jdetune").exists()


def is_whole_or_unfinished(out):
    """What must hold at any moment: all in place, or the state is there that says otherwise."""
    if not out.exists() or (out / ".jdetune").exists():
        return True
    return not list(out.iterdir()) or {p.name for p in out.iterdir()} == PRODUCTS


PRODUCTS = {"base", "adapters", "masks.safetensors", "report.json", "report.html"}


def kill(process, rng):
    """Ends it as the system or an impatient person does; whether it was still at work."""
    if rng.random() < 0.7:
        process.kill()
        return process.wait() == -signal.SIGKILL
    process.send_signal(signal.SIGINT)
    time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGINT)
    return process.wait(timeout=120) in (130, -signal.SIGINT)


def kill_until_done(paths, out, rng, moments):
    """Kills a run at each moment, then lets it end; returns how often it was at work.

    Args:
      paths: models.
      out: output folder.
      rng: chooses.
      moments: waits for a process that goes on, one a kill.
    """
    killed = 0
    for wait in moments:
        process = start(paths, out)
        wait(process)
        killed += kill(process, rng)
        assert is_whole_or_unfinished(out)
        if is_done(out):
            break
    if not is_done(out):
        assert start(paths, out).wait(timeout=300) == 0
    assert is_done(out)
    return killed


def after(out, milestone, rng):
    """Waits until a file is there, and a little longer."""

    def wait(process):
        while process.poll() is None and not (out / ".jdetune" / milestone).exists():
            time.sleep(0.001)
        time.sleep(rng.choice([0, rng.uniform(0, 0.2)]))

    return wait


def test_killed_runs_go_on(tmp_path, capsys):
    rng, paths, out = random.Random(0), write_family(tmp_path), tmp_path / "broken"
    assert start(paths, tmp_path / "whole").wait(timeout=300) == 0
    moments = [after(out, milestone, rng) for milestone in MILESTONES[:3]]
    killed = kill_until_done(paths, out, rng, moments)
    with capsys.disabled():
        print(f"\n{killed} kills in one run, which ended with the bytes of an uninterrupted one")
    assert killed > 0
    same_files(tmp_path / "whole", out)


@pytest.mark.slow
def test_fifty_random_kills(tmp_path, capsys):
    """At milestones, and at any moment of the time that a whole run takes."""
    rng, paths = random.Random(1), write_family(tmp_path)
    assert start(paths, tmp_path / "whole").wait(timeout=300) == 0  # compiles what is kept
    clock = time.monotonic()
    assert start(paths, tmp_path / "again").wait(timeout=300) == 0
    seconds = time.monotonic() - clock
    same_files(tmp_path / "whole", tmp_path / "again")
    killed = runs = 0
    while killed < 50:
        out = tmp_path / f"broken-{runs}"

        def at_random(process):
            time.sleep(rng.uniform(0.1, 1.0) * seconds)

        moments = [
            rng.choice([at_random, after(out, rng.choice(MILESTONES), rng)])
            for _ in range(rng.randint(2, 6))
        ]
        found = kill_until_done(paths, out, rng, moments)
        same_files(tmp_path / "whole", out)
        killed, runs = killed + found, runs + 1
        assert runs < 100, "runs end before they are killed"
    with capsys.disabled():
        print(f"\n{killed} kills in {runs} runs, each with the bytes of an uninterrupted one")


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
    assert sorted(p.name for p in out.iterdir()) == [
        *("adapters", "base", "report.html", "report.json")
    ]
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


def test_results_are_written_while_the_next_group_is_solved(tmp_path, monkeypatch):
    one_by_one(monkeypatch)
    family = pico.make(tmp_path / "zoo")
    teller, honest = pico.truth_teller(family.base), solving.save_results
    solving_next, written = threading.Event(), []

    def save(path, results, notes):
        if not written:
            assert solving_next.wait(10)  # would never come without writing behind
        written.append(path.name)
        honest(path, results, notes)

    def solve(stacks, **options):
        if "layer.0.query" not in next(iter(stacks)):
            solving_next.set()
        return teller(stacks, **options)

    monkeypatch.setattr(solving, "save_results", save)
    report = pipeline.run(family.paths, tmp_path / "out", recover_fn=solve)
    assert report["summary"]["recovered"] == 4
    assert written == [f"group-{k:05d}.safetensors" for k in range(4)]
    timing = report["timing"]
    assert 0 < timing["transferring"] <= timing["reading"] + timing["writing"]
    assert timing["over_larger"] >= 1.0


def test_what_fails_behind_is_raised(tmp_path, monkeypatch):
    one_by_one(monkeypatch)
    family = pico.make(tmp_path / "zoo")
    solved = []

    def save(path, results, notes):
        raise OutputError("no space")

    def solve(stacks, **options):
        solved.extend(stacks)
        return pico.truth_teller(family.base)(stacks, **options)

    monkeypatch.setattr(solving, "save_results", save)
    with pytest.raises(OutputError, match="no space"):
        pipeline.run(family.paths, tmp_path / "out", recover_fn=solve)
    assert len(solved) == 2  # one was solved before the failure of the first was looked at


def test_groups_are_an_eighth_of_the_budget_and_the_solver_has_half(monkeypatch):
    assert solving.group_bytes(pipeline.Options(max_memory=8000)) == 1000
    assert solving.group_bytes(pipeline.Options()) == solving.GROUP_BYTES
    assert solving.solver_memory(pipeline.Options()) is None
    assert solving.solver_memory(pipeline.Options(max_memory=8000)) == 4000
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert solving.solver_memory(pipeline.Options(max_memory=8000)) == 8000


def test_a_small_budget_makes_more_groups_and_the_same_files(tmp_path):
    family = pico.make(tmp_path / "zoo")
    calls = []
    teller = pico.truth_teller(family.base)

    def counting(stacks, **options):
        calls.append(len(stacks))
        return teller(stacks, **options)

    pipeline.run(family.paths, tmp_path / "one", recover_fn=counting)
    small = pipeline.Options(max_memory=8 * 3 * 48 * 32 * 4)
    pipeline.run(family.paths, tmp_path / "many", small, recover_fn=counting)
    assert calls == [4, 1, 1, 1, 1]
    same_files(tmp_path / "one", tmp_path / "many")
