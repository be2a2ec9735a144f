"""``jdetune bench lowra`` from a parquet file to tables, JSON and figures."""

import json

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

from jdetune.cli.main import main  # noqa: E402
from tests.bench import small_bench  # noqa: E402


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run on a small file of the published schema, all methods beside each other."""
    root = tmp_path_factory.mktemp("bench")
    small_bench.write(root / "data", small_bench.rows())
    argv = ["bench", "lowra", "--subset=vit", f"--data={root}/data", f"--out={root}/out"]
    argv += ["--n=2,3", "--repeats=2", "--steps=40", "--layers=2", "--quiet"]
    assert main(argv) == 5  # two models are too few for jdetune, and these cells say so
    return root, argv, json.loads((root / "out" / "results.json").read_text())


def test_every_method_has_a_row_for_every_n(finished):
    _, _, results = finished
    rows = {(row["method"], row["n"]): row for row in results["rows"]}
    assert len(rows) == 8
    assert all(row["layers"] == 2 and row["repeats"] == 2 for row in rows.values())
    error = {method: rows[method, 3]["w_error"] for method, n in rows if n == 3}
    assert error["mean-lora"] < error["lora-ft"] < -2
    assert error["jdetune"] < -15
    assert error["jdetune"] < error["paper"] < error["mean-lora"] - 1
    assert rows["jdetune", 3]["exact_fraction"] > 0.8


def test_what_is_not_solved_is_a_row_with_its_reason(finished):
    _, _, results = finished
    (failure,) = [f for f in results["failures"] if f["method"] == "jdetune"]
    assert (failure["n"], failure["status"], failure["cells"]) == (2, "TOO_FEW_MODELS", 4)
    assert "three distinct models" in failure["reason"]
    row = next(r for r in results["rows"] if (r["method"], r["n"]) == ("jdetune", 2))
    assert row["w_error"] is None
    assert row["failed"] == 4


def test_the_json_states_data_sampling_and_contradictions(finished):
    _, _, results = finished
    assert results["schema"] == "jdetune.bench/1"
    assert results["sampling"]["layers"] == 2
    assert results["sampling"]["layers_in_all"] == 4
    assert results["origin"]["subset"] == "vit"
    said = " ".join(results["notes"])
    assert "300 is taken" in said
    assert "264 is taken" in said
    assert "published subset has 24 layers of 15" in said
    cell = next(c for c in results["cells"] if c["method"] == "jdetune" and c["n"] == 3)
    assert len(cell["models"]) == 3
    assert cell["ranks"] == [2, 2, 2]
    assert cell["predicted_error"] is not None


def test_tables_and_figures_are_written(finished):
    root, _, results = finished
    tables = (root / "out" / "tables.md").read_text()
    for title in ("LoRA FT", "Mean LoRA", "Spectral DeTuning", "jdetune", "q_proj", "v_proj"):
        assert title in tables
    assert len(results["figures"]) == 4
    for name in results["figures"]:
        assert (root / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_a_second_run_solves_nothing_and_adds_what_is_new(finished, monkeypatch, capsys):
    from jdetune.bench import methods

    root, argv, results = finished
    solved = []
    true = methods.run
    monkeypatch.setattr(methods, "run", lambda m, t: solved.append(m) or true(m, t))
    assert main([*argv, "--json"]) == 5
    assert not solved
    assert json.loads(capsys.readouterr().out)["rows"] == results["rows"]
    more = [word for word in argv if not word.startswith("--n=")]
    assert main([*more, "--n=3", "--repeats=3", "--methods=mean-lora"]) == 0
    assert solved == ["mean-lora"] * 2
    assert "Mean LoRA" in capsys.readouterr().out


def test_bfloat16_merges_are_scored_on_their_own_grid(finished, tmp_path):
    root, _, _ = finished
    argv = ["bench", "lowra", f"--data={root}/data", f"--out={tmp_path}", "--n=3", "--repeats=1"]
    argv += ["--layers=1", "--merge_dtype=bfloat16", "--methods=mean-lora", "--nofigures"]
    assert main([*argv, "--quiet"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["merge_dtype"] == "bfloat16"
    assert results["rows"][0]["w_error"] < -2
    assert results["figures"] == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "say which benchmark"),
        (["lowra", "--out=o"], 2, "--data=DIR is missing"),
        (["lowra", "--data=d", "--out=o", "--subset=none"], 2, "--subset"),
        (["lowra", "--data=d", "--out=o", "--n=x"], 3, "no folder"),
        (["lowra", "--data=nowhere", "--out=o"], 3, "hf download"),
    ],
)
def test_wrong_calls_say_what_to_do(words, code, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_the_example_flags_parse():
    from pathlib import Path

    from jdetune.bench.subsets import SUBSETS
    from jdetune.cli.bench import make_command

    for name in ("bench_vit", "bench_mistral_sft"):
        path = Path(__file__).parents[2] / "configs" / f"{name}.flags"
        command = make_command()
        command.parse([f"--flagfile={path}"])
        subset = SUBSETS[command["subset"]]
        assert int(command["n"]) == subset.n
        assert (command["steps"] or subset.steps) == subset.steps
