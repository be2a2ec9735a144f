"""Adapters of a known base on disk: what is extracted, kept, refused, and how that is said."""

import json
import warnings

import ml_dtypes
import numpy as np
import pytest

from jdetune import extraction
from jdetune.checkpoint import load_adapter, merge_peft, read_adapter
from jdetune.cli import main as program
from tests import pico

NAME = "encoder.layer.0.query.weight"


@pytest.fixture
def family(tmp_path):
    made = pico.make(tmp_path, n_models=2)
    pico.write(tmp_path / "base", made.base)
    return made


def call(capsys, *argv):
    code = program.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def extract(capsys, tmp_path, *models, flags=()):
    argv = ["extract", f"--base={tmp_path}/base", *models, f"--out={tmp_path}/out", *flags]
    return call(capsys, *argv)


def report_of(tmp_path):
    return json.loads((tmp_path / "out" / "report.json").read_text())


def entry(report, name, model="tune-0"):
    return next(t for t in report["tensors"] if (t["model"], t["name"]) == (model, name))


def changed(family, tmp_path, **changes):
    """The first model with some tensors exchanged; None takes one away."""
    model = {**family.models[0], **{k.replace("__", "."): v for k, v in changes.items()}}
    kept = {name: array for name, array in model.items() if array is not None}
    return pico.write(tmp_path / "tune-0", kept)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_known_factors_come_back(tmp_path, capsys, dtype):
    made = pico.make(tmp_path, n_models=2, dtype=dtype)
    pico.write(tmp_path / "base", made.base)
    code, text, err = extract(capsys, tmp_path, *made.paths)
    assert (code, err) == (0, "")
    assert "adapters/tune-1" in text
    report = report_of(tmp_path)
    assert report["summary"]["extracted"] == 8
    assert {(t["model"], t["name"]) for t in report["tensors"]} == {
        (f"tune-{i}", name) for i in range(2) for name in made.base
    }
    for i in range(2):
        found = load_adapter(tmp_path / "out" / "adapters" / f"tune-{i}")
        assert set(found) == set(made.factors[i])
        for name, (left, right) in made.factors[i].items():
            said = entry(report, name, f"tune-{i}")
            assert said["rank"] == found[name][0].shape[1] == 2
            truth = np.matmul(left.astype(np.float64), right)
            miss = np.matmul(found[name][0].astype(np.float64), found[name][1]) - truth
            # least squares: 0.32; float32 factors add 2^-25 of an update as large as the base
            limit = 0.7 if dtype == np.float32 else 0.3
            assert np.sqrt(np.mean(miss**2)) < limit * said["noise_rms_expected"]
            again = merge_peft(made.base[name], *found[name])
            assert said["remerge_match"] == np.mean(again == made.models[i][name])
            assert said["remerge_match"] > 0.75
            assert 0.8 < said["residual_ratio"] < (1.3 if dtype == np.float32 else 1.1)


def test_vectors_and_heads_are_kept_whole(tmp_path, family, capsys):
    rng = np.random.default_rng(1)
    head, norm = rng.standard_normal((3, 32)).astype(np.float32), np.full(32, 2, np.float32)
    new = {"classifier__weight": head, "encoder__norm__weight": norm, "extra__weight": head}
    model = changed(family, tmp_path, **new)
    code, _, _ = extract(capsys, tmp_path, model)
    report = report_of(tmp_path)
    assert code == 0
    assert report["summary"]["kept_whole"] == 3
    saved = read_adapter(tmp_path / "out" / "adapters" / "tune-0").saved
    np.testing.assert_array_equal(saved["classifier.weight"], head)
    np.testing.assert_array_equal(saved["encoder.norm.weight"], norm)
    np.testing.assert_array_equal(saved["extra.weight"], head)


def test_a_bias_keeps_its_whole_module_and_the_report_says_so(tmp_path, family, capsys):
    model = changed(family, tmp_path, encoder__layer__0__query__bias=np.ones(48, np.float32))
    assert extract(capsys, tmp_path, model)[0] == 0
    said = entry(report_of(tmp_path), NAME)
    assert said["status"] == "kept_whole"
    assert NAME in read_adapter(tmp_path / "out" / "adapters" / "tune-0").saved


def test_a_wrong_base_exits_4_and_writes_no_adapter(tmp_path, family, capsys):
    other = pico.make(tmp_path / "other", seed=9)
    pico.write(tmp_path / "base", {**other.base})
    code, text, _ = extract(capsys, tmp_path, *family.paths)
    assert code == 4
    assert "another base" in text
    assert "no adapter was written" in text
    assert not (tmp_path / "out" / "adapters").exists()
    pico.write(tmp_path / "base", {"x.weight": np.ones((3, 3), np.float32)})
    code, _, err = extract(capsys, tmp_path, *family.paths, flags=["--overwrite"])
    assert code == 4
    assert "no tensor in common" in err


def test_one_model_of_two_with_another_base_is_partial(tmp_path, family, capsys):
    other = pico.make(tmp_path / "other", n_models=1, seed=9)
    assert extract(capsys, tmp_path, family.paths[0], other.paths[0])[0] == 5
    report = report_of(tmp_path)
    assert [e["exit_code"] for e in report["inputs"]] == [0, 4]
    assert [e["written"] for e in report["inputs"]] == [True, False]


def test_a_full_rank_matrix_is_partial_and_kept_whole(tmp_path, family, capsys):
    noise = np.random.default_rng(2).standard_normal((48, 32)).astype(np.float32)
    model = changed(family, tmp_path, encoder__layer__0__query__weight=noise)
    code, text, _ = extract(capsys, tmp_path, model)
    assert code == 5
    assert "more than a low-rank update" in text
    assert entry(report_of(tmp_path), NAME)["status"] == "not_low_rank"
    saved = read_adapter(tmp_path / "out" / "adapters" / "tune-0").saved
    np.testing.assert_array_equal(saved[NAME], noise)


@pytest.mark.parametrize(
    ("value", "status", "words"),
    [
        (None, "skipped", "missing in the model"),
        (np.zeros((5, 32), np.float32), "skipped", "not the same kind"),
        ("nan", "failed", "NaN or infinity in element (3, 4) of the model"),
    ],
)
def test_broken_tensors_are_partial_and_named(tmp_path, family, capsys, value, status, words):
    if isinstance(value, str):
        value = family.models[0][NAME].copy()
        value[3, 4] = np.nan
    model = changed(family, tmp_path, **{NAME.replace(".", "__"): value})
    code, text, _ = extract(capsys, tmp_path, model)
    assert code == 5
    assert words in text
    assert entry(report_of(tmp_path), NAME)["status"] == status


def test_all_nan_exits_3(tmp_path, family, capsys):
    bad = {n.replace(".", "__"): np.full((48, 32), np.nan, np.float32) for n in family.factors[0]}
    assert extract(capsys, tmp_path, changed(family, tmp_path, **bad))[0] == 3


def test_a_given_rank_is_used(tmp_path, family, capsys):
    assert extract(capsys, tmp_path, family.paths[0], flags=["--rank=1"])[0] == 0
    said = entry(report_of(tmp_path), NAME)
    assert said["rank"] == 1
    assert said["residual_ratio"] > 100


def test_a_model_equal_to_the_base_has_an_adapter_of_nothing(tmp_path, family, capsys):
    assert extract(capsys, tmp_path, pico.write(tmp_path / "tune-0", family.base))[0] == 0
    assert report_of(tmp_path)["summary"]["identical"] == len(family.base)


def test_usage_and_protection(tmp_path, family, capsys):
    assert call(capsys, "extract", "m", "--out=x")[0] == 2
    assert call(capsys, "extract", "m", "--base=x")[0] == 2
    assert call(capsys, "extract", "--base=x", "--out=y")[0] == 2
    assert extract(capsys, tmp_path, family.paths[0], flags=["--rank=0"])[0] == 2
    assert extract(capsys, tmp_path, tmp_path / "none")[0] == 3
    argv = ["extract", f"--base={tmp_path}/base", family.paths[0], f"--out={tmp_path}/base/x"]
    assert call(capsys, *argv)[0] == 2
    code, text, _ = extract(capsys, tmp_path, family.paths[0], flags=["--json"])
    assert code == 0
    assert json.loads(text) == report_of(tmp_path)
    assert extract(capsys, tmp_path, family.paths[0])[0] == 2
    assert extract(capsys, tmp_path, family.paths[0], flags=["--overwrite"])[0] == 0
    code, _, err = call(capsys, "verify", tmp_path / "out")
    assert code == 3
    assert "no base was written" in err
    with pytest.raises(extraction.InputError, match="no model"):
        extraction.run(tmp_path / "base", [], tmp_path / "new")


@pytest.mark.interop
def test_what_peft_merged_is_extracted_loaded_and_merged_again(tmp_path, capsys):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shape = transformers.BertConfig(
            vocab_size=40,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
        )
        model = transformers.BertModel(shape)
        model.save_pretrained(tmp_path / "base")
        config = peft.LoraConfig(r=3, target_modules=["query", "word_embeddings"])
        config.init_lora_weights = False
        merged = peft.get_peft_model(model, config).merge_and_unload()
        merged.save_pretrained(tmp_path / "tune-0")
        assert extract(capsys, tmp_path, tmp_path / "tune-0")[0] == 0
        base = transformers.AutoModel.from_pretrained(tmp_path / "base")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapters" / "tune-0")
        again = loaded.merge_and_unload().state_dict()
    report = report_of(tmp_path)
    assert report["summary"]["extracted"] == 3
    for name, value in merged.state_dict().items():
        said = entry(report, name)
        if said["status"] == "identical":
            assert bool((again[name] == value).all()), name
        else:
            assert said["rank"] == 3
            share = float((again[name] == value).float().mean())
            # float32 factors of updates a hundred times the weights round by many of their ulps
            error = (again[name] - value).abs().max() / value.abs().max()
            assert float(error) < 2.0**-20
            assert abs(share - said["remerge_match"]) < 0.01
