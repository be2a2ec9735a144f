"""``jdetune pack`` and ``jdetune unpack``: tables, JSON, exit codes."""

import json

import pytest

from jdetune.cli import main as program
from tests import pico
from tests.zoo.zoo_files import same, zoo


@pytest.fixture
def family(tmp_path, monkeypatch):
    made = zoo(tmp_path / "zoo", 3)
    teller = pico.truth_teller(made.base)
    monkeypatch.setattr("jdetune.solving.default_recover", lambda s, **o: teller(s))
    return made


def call(capsys, *argv):
    code = program.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_pack_then_unpack(tmp_path, family, capsys):
    store, back = tmp_path / "store", tmp_path / "back"
    code, text, err = call(capsys, "pack", *family.paths, f"--out={store}")
    assert code == 0, err
    for words in ("zstd -3 of every file", "equal tensors and files once", "LoRA factors"):
        assert words in text
    assert "bits for each of 18432 elements" in text
    assert f"next: jdetune unpack {store}" in text
    code, text, _ = call(capsys, "unpack", store, "--dry_run", "--json")
    assert code == 0
    assert json.loads(text)["out"] is None
    code, text, _ = call(capsys, "unpack", store, f"--out={back}")
    assert code == 0
    assert "every file has its sha256" in text
    assert same(family.paths, back)
    one = tmp_path / "one"
    code, text, _ = call(capsys, "unpack", store, f"--out={one}", "--only=tune-1", "--json")
    assert code == 0
    assert [m["name"] for m in json.loads(text)["models"]] == ["tune-1"]
    assert same(family.paths[1:2], one)


def test_json_and_no_comparison(tmp_path, family, capsys):
    flags = ("--json", "--nocompare", "--level=1")
    code, text, err = call(capsys, "pack", *family.paths, f"--out={tmp_path / 'store'}", *flags)
    assert code == 0
    assert err == ""
    report = json.loads(text)
    assert report == json.loads((tmp_path / "store" / "report.json").read_text())
    assert report["level"] == 1
    assert report["others"]["per_file_zstd"] is None


def test_dry_run_writes_nothing(tmp_path, family, capsys):
    store = tmp_path / "store"
    code, text, _ = call(capsys, "pack", *family.paths, f"--out={store}", "--dry_run")
    assert code == 0
    assert "tune-2" in text
    assert not store.exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["pack"], "no MODEL"),
        (["pack", "m"], "--out=STORE is missing"),
        (["pack", "m", "--out=x", "--level=20"], "--level is 1 to 19"),
        (["pack", "m", "--out=x", "--level=0"], "level"),
        (["pack", "m", "--out=x", "--max_memory=much"], "--max_memory is a size"),
        (["unpack"], "give one STORE"),
        (["unpack", "a", "b"], "give one STORE"),
        (["unpack", "a"], "--out=DIR is missing"),
    ],
)
def test_usage_errors(argv, words, capsys):
    code, _, err = call(capsys, *argv)
    assert code == 2
    assert words in err


def test_exit_codes(tmp_path, family, capsys):
    store, back = tmp_path / "store", tmp_path / "back"
    assert call(capsys, "pack", tmp_path / "nothing", f"--out={store}")[0] == 3
    assert call(capsys, "unpack", tmp_path / "nothing", f"--out={back}")[0] == 3
    assert call(capsys, "pack", *family.paths, f"--out={store}")[0] == 0
    assert call(capsys, "pack", *family.paths, f"--out={store}")[0] == 2
    assert call(capsys, "unpack", store, f"--out={back}", "--only=x")[0] == 3
    manifest = store / "manifest.json"
    content = json.loads(manifest.read_text())
    content["models"][0]["files"][0]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    code, _, err = call(capsys, "unpack", store, f"--out={back}")
    assert code == 6
    assert "not the digest" in err
    assert not back.exists()
