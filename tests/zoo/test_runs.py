"""One recovery per group: what is written, kept, gone on with and refused."""

import json
import shlex

import numpy as np
import pytest

from jdetune.errors import InputError, OutputError
from jdetune.pipeline import Options
from jdetune.zoo import group_report, runs
from jdetune.zoo.grouping import open_zoo
from tests import pico

FOUND = {"schema": group_report.SCHEMA, "summary": {"exit_code": 0}}


@pytest.fixture
def zoo(tmp_path):
    return {letter: pico.make(tmp_path / letter, seed=seed) for seed, letter in enumerate("ab")}


def jobs(zoo):
    return [
        runs.Job(
            f"family-of-{letter}",
            tuple(map(str, family.paths)),
            tuple(open_zoo(family.paths)),
            f"jdetune recover {letter}",
        )
        for letter, family in zoo.items()
    ]


def teller(zoo, solved=None, stop_at=None):
    """Knows all bases by their nearness; notes whose group it solved."""

    def recover(stacks, solver=None, progress=None, **_):
        name, stack = next(iter(stacks.items()))
        far = {letter: np.abs(stack[0] - f.base[name]).mean() for letter, f in zoo.items()}
        letter = min(far, key=lambda key: far[key])
        if letter == stop_at:
            raise KeyboardInterrupt
        if solved is not None:
            solved.append(letter)
        return pico.truth_teller(zoo[letter].base)(stacks, progress=progress)

    return recover


def run(zoo, out, options=None, **more):
    return runs.run_all(jobs(zoo), out, options or Options(), FOUND, **more)


def timeless(path):
    content = json.loads(path.read_text())
    for entry in content["runs"]:
        entry |= {"seconds": None, "kept": None}
    return content


def test_every_group_gets_its_folder(tmp_path, zoo):
    out, told = tmp_path / "out", []
    value = run(zoo, out, recover_fn=teller(zoo), progress=lambda *step: told.append(step))
    assert sorted(p.name for p in out.iterdir()) == ["family-of-a", "family-of-b", "groups.json"]
    assert value == json.loads((out / "groups.json").read_text())
    assert value["summary"]["exit_code"] == 0
    assert [(e["group"], e["verdict"], e["recovered"]) for e in value["runs"]] == [
        ("family-of-a", "recovered", 4),
        ("family-of-b", "recovered", 4),
    ]
    assert {step[0] for step in told} == {
        f"{number}/2 {stage}" for number in (1, 2) for stage in ("compare", "recover", "write")
    }
    assert json.loads((out / "family-of-b" / "report.json").read_text())["command"] == (
        "jdetune recover b"
    )


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_done_is_not_done_again(tmp_path, zoo, overwrite):
    out, solved = tmp_path / "out", []
    run(zoo, out, recover_fn=teller(zoo))
    again = run(zoo, out, Options(overwrite=overwrite), recover_fn=teller(zoo, solved))
    assert solved == []
    assert all(entry["kept"] for entry in again["runs"])
    assert not (out / ".jdetune").exists()


def test_an_interrupted_zoo_goes_on(tmp_path, zoo):
    out, solved = tmp_path / "out", []
    with pytest.raises(KeyboardInterrupt):
        run(zoo, out, recover_fn=teller(zoo, stop_at="b"))
    assert (out / ".jdetune").is_dir()
    assert not (out / "groups.json").exists()
    run(zoo, out, recover_fn=teller(zoo, solved))
    assert set(solved) == {"b"}
    assert not (out / ".jdetune").exists()
    whole = tmp_path / "whole"
    run(zoo, whole, recover_fn=teller(zoo))
    text = (whole / "groups.json").read_text().replace(str(whole), str(out))
    (whole / "groups.json").write_text(text)
    assert timeless(out / "groups.json") == timeless(whole / "groups.json")


@pytest.mark.parametrize("at", range(1, 6))
def test_killed_between_two_notes(tmp_path, zoo, monkeypatch, at):
    """Notes are taken before and after each group, and at the end."""
    out, solved, count = tmp_path / "out", [], iter(range(1, 99))
    save = runs.save_json

    class Killed(BaseException):
        pass

    def die(path, content):
        if next(count) == at:
            raise Killed
        save(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_json", die)
        with pytest.raises(Killed):
            run(zoo, out, recover_fn=teller(zoo, solved))
    run(zoo, out, recover_fn=teller(zoo, solved))
    assert len(solved) == 2  # each group once, in one call
    assert not (out / ".jdetune").exists()


def test_changed_models_or_flags_are_refused_before_any_work(tmp_path, zoo):
    out, solved = tmp_path / "out", []
    run(zoo, out, recover_fn=teller(zoo))
    with pytest.raises(OutputError, match=r"--overwrite. Its models or the flags have changed"):
        run(zoo, out, Options(exclude="value"), recover_fn=teller(zoo, solved))
    model = dict(zoo["b"].models[0])
    model["classifier.bias"] = model["classifier.bias"] + 1
    pico.write(zoo["b"].paths[0], model)
    with pytest.raises(OutputError, match="family-of-b: is not empty"):
        run(zoo, out, recover_fn=teller(zoo, solved))
    assert solved == []
    again = run(zoo, out, Options(overwrite=True), recover_fn=teller(zoo, solved))
    assert set(solved) == {"b"}
    assert [entry["kept"] for entry in again["runs"]] == [True, False]


def test_a_group_that_fails_leaves_the_others(tmp_path, zoo):
    out, solved = tmp_path / "out", []
    tell = teller(zoo)

    def failing(stacks, **options):
        found = tell(stacks, **options)
        name, stack = next(iter(stacks.items()))
        if np.abs(stack[0] - zoo["a"].base[name]).mean() < 0.05:
            raise InputError("a is broken. Copy it again.")
        return found

    value = run(zoo, out, recover_fn=failing)
    assert value["summary"]["exit_code"] == 5
    assert [entry["error"] for entry in value["runs"]] == ["a is broken. Copy it again.", None]
    assert [entry["exit_code"] for entry in value["runs"]] == [3, 0]
    value = run(zoo, out, recover_fn=teller(zoo, solved))
    assert solved == ["a"]
    assert value["summary"]["exit_code"] == 0


def test_exit_codes():
    def code(grouping, *codes):
        found = {"summary": {"exit_code": grouping}}
        return runs._exit_code(found, [{"exit_code": code} for code in codes])

    assert code(0, 0, 0) == 0
    assert code(5, 0, 0) == code(0, 0, 5) == code(0, 0, 4) == code(0, 5) == code(5) == 5
    assert code(0, 4, 3) == code(5, 4) == 4
    assert code(0, 3) == 3


def test_somebody_elses_folder_is_left_alone(tmp_path, zoo):
    paths = [path for family in zoo.values() for path in family.paths]
    with pytest.raises(OutputError, match="around the model"):
        runs.check_out(tmp_path, paths)
    with pytest.raises(OutputError, match="inside or around"):
        runs.check_out(paths[0] / "out", paths)
    other = tmp_path / "other"
    other.mkdir()
    runs.check_out(other, paths)
    (other / "groups.json").write_text("{}")
    with pytest.raises(OutputError, match="holds files that"):
        runs.check_out(other, paths)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        runs.check_out(tmp_path / "file", paths)


def test_command_lines_survive_a_shell():
    models = ["zoo/it's", "a b", "$(x)", "-dash", "org/name@v1"]
    line = group_report.command_line(models, "out dir", ["--exclude=a|b"])
    words = shlex.split(line)
    assert words[:2] == ["jdetune", "recover"]
    assert words[-len(models) :] == models
    assert "--out=out dir" in words
    assert "--exclude=a|b" in words
