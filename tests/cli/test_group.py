"""``jdetune group``: the tree, JSON, command lines, exit codes, and one recover per group."""

import json
import os
import shlex

import numpy as np
import pytest

from jdetune import solving
from jdetune.cli import main as program
from jdetune.cli.group_tree import ASCII, Node, draw
from tests import pico
from tests.cli.test_commands import call
from tests.zoo.test_runs import teller


@pytest.fixture
def zoo(tmp_path):
    return {
        letter: pico.make(tmp_path / "zoo" / letter, seed=seed) for seed, letter in enumerate("ab")
    }


def paths(zoo):
    return [path for family in zoo.values() for path in family.paths]


def full(zoo, tmp_path):
    rng = np.random.default_rng(0)
    model = {
        n: (w + 1e-3 * rng.standard_normal(w.shape)).astype(w.dtype)
        for n, w in zoo["a"].models[0].items()
    }
    return pico.write(tmp_path / "zoo" / "full tune", model)


def test_the_tree_and_the_commands(tmp_path, zoo, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = pico.write(tmp_path / "zoo" / "copy", zoo["a"].models[1])
    models = [os.path.relpath(path) for path in (*paths(zoo), copy, full(zoo, tmp_path))]
    code, text, err = call(capsys, "group", *models, "--masks", "--exclude=class|head")
    assert code == 5, err
    assert "8 models: 7 in 2 group(s) of three or more, 1 alone" in text
    assert "family-of-tune-0: bert, 3 models and 1 equal to one of them, float32" in text
    assert "├── tune-1  float32  rank 2\n│   └── copy  identical copy\n" in text
    assert "no low rank against tune-0 in 4 of 4 matrices" in text
    lines = [line.strip() for line in text.splitlines() if line.startswith("  jdetune recover")]
    assert [shlex.split(line) for line in lines] == [
        ["jdetune", "recover", *models[:3], models[6]]
        + ["--out=recovered/family-of-tune-0", "--masks", "--exclude=class|head"],
        ["jdetune", "recover", *models[3:6]]
        + ["--out=recovered/family-of-tune-0-2", "--masks", "--exclude=class|head"],
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["zoo"]
    assert program.main([*shlex.split(lines[0])[1:], "--dry_run"]) == 0
    capsys.readouterr()


def test_json_and_exit_codes(tmp_path, zoo, capsys):
    code, text, err = call(capsys, "group", *paths(zoo), "--json", "--layers=2", "--seed=1")
    found = json.loads(text)
    assert (code, err) == (0, "")
    assert found["schema"] == "jdetune.group/1"
    assert (found["layers"], found["seed"]) == (2, 1)
    assert [group["distinct"] for group in found["groups"]] == [3, 3]
    assert found["summary"] == {
        **{"models": 6, "groups": 2, "recoverable": 2, "grouped": 6, "alone": 0, "exit_code": 0}
    }
    assert found["groups"][0]["command"].startswith("jdetune recover ")
    assert {entry["verdict"] for entry in found["comparisons"]} == {"related", "unrelated"}
    assert call(capsys, "group", *paths(zoo)[:2])[0] == 5
    assert call(capsys, "group", *paths(zoo), tmp_path / "none")[0] == 3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no MODEL"),
        (["m", "--recover"], "--recover needs --out"),
        (["m", "--layers=0"], "--layers"),
        (["m", "--rank=much"], "--rank is auto"),
    ],
)
def test_usage_errors(argv, words, capsys):
    code, _, err = call(capsys, "group", *argv)
    assert code == 2
    assert words in err


def test_one_recover_per_group(tmp_path, zoo, capsys, monkeypatch):
    solved, out = [], tmp_path / "out"
    monkeypatch.setattr(solving, "default_recover", teller(zoo, solved))
    argv = ["group", *paths(zoo), "--recover", f"--out={out}"]
    code, text, _ = call(capsys, *argv, "--dry_run")
    assert (code, out.exists()) == (0, False)
    assert "to recover:" in text
    code, text, err = call(capsys, *argv)
    assert code == 0, err
    assert f"{out}/family-of-tune-0" in text
    assert (out / "family-of-tune-0-2" / "base" / "model.safetensors").exists()
    code, text, _ = call(capsys, *argv, "--json")
    assert json.loads(text) == json.loads((out / "groups.json").read_text())
    assert sorted(solved) == ["a", "b"]
    code, text, _ = call(capsys, *argv)
    assert "recovered (kept)" in text
    code, _, err = call(capsys, *argv, "--masks")
    assert code == 2
    assert "Its models or the flags have changed" in err
    code, _, err = call(capsys, "group", *paths(zoo), "--recover", f"--out={tmp_path}")
    assert code == 2
    assert "around the model" in err


def test_a_tree_in_ascii():
    node = Node("a", [Node("b", [Node("c"), Node("d")]), Node("e", [Node("f")])])
    assert draw([node], ASCII) == [
        *("a", "|-- b", "|   |-- c", "|   `-- d", "`-- e", "    `-- f"),
    ]
