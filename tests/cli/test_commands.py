import json

import numpy as np
import pytest

from jdetune.cli import main as program
from tests import pico


@pytest.fixture
def family(tmp_path):
    made = pico.make(tmp_path)
    pico.write(tmp_path / "truth", made.base)
    return made


def call(capsys, *argv):
    code = program.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_recover_then_verify(tmp_path, family, capsys):
    out = tmp_path / "out"
    code, text, err = call(capsys, "recover", *family.paths, f"--out={out}")
    assert code == 0, err
    assert "4 of 4 differing matrices recovered from 3 models" in text
    assert f"base      {out}/base" in text
    assert "48 x 32 float32" in text
    code, text, _ = call(capsys, "verify", out, f"--reference={tmp_path}/truth")
    assert code == 0
    assert "passed" in text
    code, text, _ = call(
        capsys, "verify", out, f"--reference={tmp_path}/truth", "--max_error=-39", "--json"
    )
    assert code == 6
    found = json.loads(text)
    assert not found["passed"]
    assert "--max_error" in found["failures"][0]
    code, _, _ = call(capsys, "verify", out, f"--reference={tmp_path}/truth", "--max_error=-14")
    assert code == 0
    code, _, _ = call(capsys, "verify", out, f"--reference={tmp_path}/truth", "--min_exact=1.1")
    assert code == 6


def test_json_is_the_report_and_nothing_else(tmp_path, family, capsys):
    out = tmp_path / "out"
    code, text, err = call(capsys, "recover", *family.paths, f"--out={out}", "--json")
    assert code == 0
    assert json.loads(text) == json.loads((out / "report.json").read_text())
    assert err == ""


def test_dry_run_writes_nothing(tmp_path, family, capsys):
    out = tmp_path / "out"
    code, text, _ = call(capsys, "recover", *family.paths, f"--out={out}", "--dry_run")
    assert code == 0
    assert "encoder.layer.0.query.weight" in text
    assert not out.exists()
    code, text, _ = call(capsys, "recover", *family.paths, "--dry_run", "--json", "--exclude=query")
    assert code == 0
    actions = [tensor["action"] for tensor in json.loads(text)["tensors"]]
    assert actions.count("recover") == actions.count("skipped") == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no MODEL"),
        (["m"], "--out=DIR is missing"),
        (["m", "--out=x", "--solver=spectral"], "needs --rank"),
        (["m", "--out=x", "--rank=0"], "--rank"),
        (["m", "--out=x", "--rank=much"], "--rank is auto, an integer or a share"),
        (["m", "--out=x", "--solver=spectral", "--rank=0.5"], "needs --rank=INT"),
        (["m", "--out=x", "--solver=spectral", "--rank=3", "--steps=0"], "--steps"),
    ],
)
def test_usage_errors(argv, words, capsys):
    code, _, err = call(capsys, "recover", *argv)
    assert code == 2
    assert words in err


def test_input_errors(tmp_path, family, capsys):
    code, _, err = call(capsys, "recover", *family.paths[:2], "--out=x")
    assert code == 3
    assert "at least three" in err
    code, _, err = call(capsys, "recover", *family.paths, f"--out={family.paths[0]}")
    assert code == 2
    assert "Choose a folder" in err


def test_models_of_other_bases_exit_4(tmp_path, family, capsys):
    others = [pico.make(tmp_path / str(seed), n_models=1, seed=seed).paths[0] for seed in (7, 8)]
    out = tmp_path / "out"
    code, text, _ = call(capsys, "recover", family.paths[0], *others, f"--out={out}")
    assert code == 4
    assert "no base was written" in text
    assert not (out / "base").exists()
    code, text, _ = call(capsys, "inspect", family.paths[0], *others)
    assert code == 4
    assert "not recoverable" in text


def test_inspect(tmp_path, family, capsys):
    code, text, _ = call(capsys, "inspect", *family.paths)
    assert code == 0
    assert "encoder.layer.0.query.weight" in text
    assert "2,2,2" in text
    code, text, _ = call(capsys, "inspect", *family.paths, "--json", "--sample=1")
    found = json.loads(text)
    assert len(found["sample"]) == 1
    assert found["sample"][0]["ranks"] == [2, 2, 2]
    assert found["models"][0]["bytes"] == sum(v.nbytes for v in family.base.values())
    assert found["memory_bytes"] > found["models"][0]["bytes"]


def test_inspect_of_too_few_distinct_models_exits_3(tmp_path, family, capsys):
    pico.write(tmp_path / "copy", family.models[0])
    code, text, _ = call(capsys, "inspect", *family.paths[:2], tmp_path / "copy")
    assert code == 3
    assert "fewer than three distinct" in text


def test_inspect_names_what_is_unlike(tmp_path, family, capsys):
    model = {**family.models[1], "extra.weight": np.zeros((2, 2), np.float32)}
    pico.write(family.paths[1], model)
    _, text, _ = call(capsys, "inspect", *family.paths)
    assert "e.g. extra.weight" in text


def test_verify_needs_an_output(tmp_path, capsys):
    code, _, err = call(capsys, "verify", tmp_path)
    assert code == 3
    assert "report.json: missing" in err
    assert call(capsys, "verify")[0] == 2
    assert call(capsys, "verify", tmp_path, "--max_error=-3")[0] == 2


def test_inspect_tells_two_bases_from_too_few_models(tmp_path, family, capsys):
    other = pico.make(tmp_path / "other", n_models=1, seed=7)
    models = [*family.models[:2], other.models[0]]
    equal = "a.first.weight"  # sampled first: two of the three are equal in it
    for i, model in enumerate(models):
        rng = np.random.default_rng(i // 2)
        pico.write(
            tmp_path / f"m{i}", {equal: rng.standard_normal((48, 48)).astype(np.float32), **model}
        )
    paths = [tmp_path / f"m{i}" for i in range(3)]
    code, text, _ = call(capsys, "inspect", *paths, "--sample=1")
    assert code == 4
    assert "not recoverable" in text


def test_inspect_goes_on_until_three_models_are_distinct(tmp_path, family, capsys):
    rng = np.random.default_rng(3)
    zero = np.zeros((48, 48), np.float32)
    update = np.matmul(*pico.pair(rng, (48, 48), 1))
    for i, model in enumerate(family.models):
        pico.write(family.paths[i], {"a.first.weight": zero + update * (i == 2), **model})
    code, text, _ = call(capsys, "inspect", *family.paths, "--sample=1", "--json")
    found = json.loads(text)
    assert found["distinct_in_sample"] == 3
    assert [entry["name"] for entry in found["sample"]][0] == "a.first.weight"
    assert code == 0


@pytest.mark.slow
def test_models_of_several_dtypes_are_solved_together(tmp_path, capsys):
    found = pico.make(tmp_path, n_models=4)
    half = {name: array.astype(np.float16) for name, array in found.models[1].items()}
    pico.write(found.paths[1], half)
    assert call(capsys, "inspect", *found.paths)[0] == 0
    code, text, _ = call(capsys, "recover", *found.paths, f"--out={tmp_path / 'out'}", "--json")
    assert code == 0
    assert {entry["dtype"] for entry in json.loads(text)["inputs"]} == {"float32", "float16"}
    assert call(capsys, "verify", tmp_path / "out")[0] == 0


def test_verify_takes_platform(tmp_path, capsys):
    assert call(capsys, "verify", tmp_path, "--platform=cpu")[0] == 3  # no report, not usage
