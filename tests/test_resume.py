"""A run killed at any moment goes on with the same command and ends with the same bytes."""

import json
import random
import subprocess
import time

import pytest

from jdetune import outfolder, pipeline
from jdetune.errors import OutputError
from tests import pico
from tests.test_distributed import command, files_of, plain_environment, untimed, write_family


def kill_often(tmp_path, kills, seed):
    """Starts and kills a run, then lets it end; returns how often it was killed before the end."""
    paths = write_family(tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run = subprocess.run
    options = {"env": plain_environment(), "capture_output": True, "timeout": 300}
    run(command(paths, whole, "--masks"), check=True, **options)  # compiles
    clock = time.monotonic()
    again = command(paths, whole, "--masks", "--overwrite")
    run(again, check=True, **options)
    longest = time.monotonic() - clock
    rng, killed = random.Random(seed), 0
    for _ in range(kills):
        process = subprocess.Popen(
            command(paths, broken, "--masks"),
            env=plain_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(rng.uniform(0.2, 0.95) * longest)
        process.kill()
        killed += process.wait() == -9
        if (broken / "report.json").exists() and not (broken / ".jdetune").exists():
            break
    if not (broken / "report.json").exists() or (broken / ".jdetune").exists():
        run(command(paths, broken, "--masks"), check=True, **options)
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
    assert kill_often(tmp_path, 3, 0) > 0


@pytest.mark.slow
def test_fifty_random_kills(tmp_path, capsys):
    killed = runs = 0
    while killed < 50:
        found = kill_often(tmp_path / str(runs), 10, runs)
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
            outfolder.save_json(stage / outfolder._PLACING, {"products": new})
            outfolder._move_all(out, stage, new, [])
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
