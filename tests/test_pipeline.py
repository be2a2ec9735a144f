import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jdetune import outfolder, pipeline, products
from jdetune.checkpoint import merge_peft, open_checkpoint, read_adapter, read_tensor
from jdetune.errors import InputError, OutputError
from jdetune.status import Status
from jdetune.verification import verify
from tests import pico


def run(family, out, statuses=None, **options):
    teller = pico.truth_teller(family.base, statuses)
    return pipeline.run(family.paths, out, pipeline.Options(**options), recover_fn=teller)


def rewrite(family):
    for path, model in zip(family.paths, family.models, strict=True):
        pico.write(path, model)


def statuses_of(report):
    return {tensor["name"]: tensor["status"] for tensor in report["tensors"]}


def test_writes_base_adapters_and_report(tmp_path):
    family = pico.make(tmp_path)
    seen = []
    report = pipeline.run(
        family.paths,
        tmp_path / "out",
        progress=lambda *step: seen.append(step),
        recover_fn=pico.truth_teller(family.base),
    )
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"base", "adapters", "report.html", "report.json"}
    assert json.loads((out / "report.json").read_text()) == report
    base = open_checkpoint(out / "base")
    for name, truth in family.base.items():
        np.testing.assert_array_equal(read_tensor(base, name), truth)
    for i, model in enumerate(family.models):
        adapter = read_adapter(out / "adapters" / f"tune-{i}")
        for name, update in adapter.updates.items():
            again = merge_peft(read_tensor(base, name), update.left, update.right, update.scaling)
            np.testing.assert_allclose(again, model[name], atol=3e-8)  # an ulp at 0.25
    assert report["schema"] == "jdetune.report/1"
    assert report["summary"]["exit_code"] == 0
    assert report["summary"]["recovered"] == 4
    assert report["summary"]["copied"] == 5
    assert report["inputs"][1]["ranks"]["encoder.layer.0.query.weight"] == 2
    assert ("recover", 4, 4) in seen
    entry = next(t for t in report["tensors"] if t["status"] == "recovered")
    assert entry["code"] == "OK"
    assert entry["ranks"] == [2, 2, 2]
    assert entry["predicted_error"] == -40.0
    assert entry["exact_fraction_est"] is None
    # float32 products of refactored updates round differently in a fifth of the elements
    assert min(entry["remerge_match"]) > 0.7


def test_two_axes_that_differ_and_vectors_that_differ(tmp_path):
    family = pico.make(tmp_path)
    for i, model in enumerate(family.models):
        model["classifier.bias"] = np.full(3, i, np.float32)
    family.models[0]["encoder.norm.bias"] = np.ones(32, np.float32)
    rewrite(family)
    report = run(family, tmp_path / "out")
    assert statuses_of(report)["classifier.bias"] == "per_model"
    assert statuses_of(report)["encoder.norm.bias"] == "consensus"
    assert report["summary"]["exit_code"] == 5
    voted, lacking = report["warnings"]
    assert "encoder.norm.bias, are the majority's copy: 2 of 3 models" in voted
    assert "not so tune-0, whose adapters keep their own" in voted
    assert "lacks 1 tensor(s), e.g. classifier.bias: differs in most models" in lacking
    base = open_checkpoint(tmp_path / "out" / "base")
    assert "classifier.bias" not in base.tensors
    np.testing.assert_array_equal(read_tensor(base, "encoder.norm.bias"), np.zeros(32))
    for i in range(3):
        saved = read_adapter(tmp_path / "out" / "adapters" / f"tune-{i}").saved
        np.testing.assert_array_equal(saved["classifier.bias"], np.full(3, i))
        np.testing.assert_array_equal(saved["classifier.weight"], family.base["classifier.weight"])


def test_some_failures_are_partial(tmp_path):
    family = pico.make(tmp_path)
    bad = "encoder.layer.0.value.weight"
    report = run(family, tmp_path / "out", {bad: Status.NOT_LOW_RANK})
    assert report["summary"]["exit_code"] == 5
    assert statuses_of(report)[bad] == "failed"
    entry = next(t for t in report["tensors"] if t["name"] == bad)
    assert entry["reason"] == Status.NOT_LOW_RANK.message
    assert bad not in open_checkpoint(tmp_path / "out" / "base").tensors
    assert bad not in read_adapter(tmp_path / "out" / "adapters" / "tune-0").updates


@pytest.mark.parametrize(
    ("status", "code"),
    [(Status.NOT_LOW_RANK, 4), (Status.NON_FINITE, 3), (Status.SHARED_DIRECTIONS, 4)],
)
def test_nothing_recovered_writes_no_base(tmp_path, status, code):
    family = pico.make(tmp_path)
    report = run(family, tmp_path / "out", dict.fromkeys(family.factors[0], status))
    assert report["summary"]["exit_code"] == code
    assert not report["summary"]["base_written"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.html", "report.json"}


def test_a_doubtful_base_is_written_but_not_a_success(tmp_path):
    family = pico.make(tmp_path)
    statuses = dict.fromkeys(family.factors[0], Status.NOISE_DOMINATED)
    report = run(family, tmp_path / "out", statuses)
    assert report["summary"]["exit_code"] == 4
    assert report["summary"]["base_written"]


def test_too_few_distinct_models(tmp_path):
    family = pico.make(tmp_path)
    with pytest.raises(InputError, match=r"2 model\(s\) given.*fewer|2 model\(s\) given"):
        pipeline.run(family.paths[:2], tmp_path / "out")
    pico.write(family.paths[2], family.models[0])
    with pytest.raises(InputError, match="tune-2 equals tune-0"):
        pipeline.run(family.paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_duplicates_are_reported_and_get_no_adapter(tmp_path):
    family = pico.make(tmp_path, n_models=4)
    family.models[3] = family.models[0]
    rewrite(family)
    report = run(family, tmp_path / "out")
    assert report["inputs"][3]["duplicate_of"] == "tune-0"
    assert "tune-3 equals tune-0" in report["warnings"][0]
    assert not (tmp_path / "out" / "adapters" / "tune-3").exists()


def test_shard_layout_is_kept_and_bf16_stays(tmp_path):
    import ml_dtypes

    family = pico.make(tmp_path, dtype=ml_dtypes.bfloat16)
    for path, model in zip(family.paths, family.models, strict=True):
        (path / "model.safetensors").unlink()
        pico.write(path, model, shards=3)
    report = run(family, tmp_path / "out")
    assert report["base"]["dtype"] == "bfloat16"
    base = open_checkpoint(tmp_path / "out" / "base")
    assert base.files == open_checkpoint(family.paths[0]).files
    for name, truth in family.base.items():
        assert read_tensor(base, name).tobytes() == truth.tobytes()


def test_a_crash_leaves_the_stage_and_no_base(tmp_path, monkeypatch):
    family = pico.make(tmp_path)

    def crash(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(products, "write_as", crash)
    with pytest.raises(OSError, match="disk full"):
        run(family, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".jdetune"]
    monkeypatch.undo()
    run(family, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / ".jdetune").exists()


def test_out_is_protected(tmp_path):
    family = pico.make(tmp_path / "zoo")
    out = tmp_path / "out"
    run(family, out)
    with pytest.raises(OutputError, match="not empty"):
        run(family, out)
    (out / "notes.txt").write_text("mine")
    run(family, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "base").mkdir()
    with pytest.raises(OutputError, match="did not write"):
        run(family, tmp_path / "home", overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(family.paths[0])
    for bad in (family.paths[0], family.paths[0] / "x", tmp_path / "zoo", tmp_path, link):
        with pytest.raises(OutputError, match="equal to, inside or around"):
            run(family, bad, overwrite=True)


def test_names_are_safe_and_unique(tmp_path):
    family = pico.make(tmp_path)
    odd = [tmp_path / name / "tune" for name in ("a", "b")] + [tmp_path / "c" / "..  \n odd"]
    for path, model in zip(odd, family.models, strict=True):
        pico.write(path, model)
    names = [c.name for c in pipeline.open_models(odd)]
    assert names[:2] == ["tune", "tune-2"]
    assert names[2] == "odd"
    assert outfolder.safe_name("..") == "model"
    assert "/" not in outfolder.safe_name("a/../b")


def test_excluded_matrices_are_skipped_without_blame(tmp_path):
    family = pico.make(tmp_path)
    report = run(family, tmp_path / "out", exclude="value")
    assert report["summary"]["skipped"] == 2
    assert report["summary"]["exit_code"] == 0
    assert any("lacks 2 tensor" in text for text in report["warnings"])


def test_the_real_solver_end_to_end(tmp_path):
    family = pico.make(tmp_path, n_models=3, rank=2)
    report = pipeline.run(family.paths, tmp_path / "out")
    assert report["summary"]["exit_code"] == 0
    base = open_checkpoint(tmp_path / "out" / "base")
    for name in family.factors[0]:
        # rounding errors of three models at weights below 0.25: a few of 1.5e-8
        np.testing.assert_allclose(read_tensor(base, name), family.base[name], atol=2e-7)


def with_other_bias(model, value=1.0):
    return {**model, "encoder.norm.bias": np.full(32, value, np.float32)}


def test_a_twin_in_all_matrices_is_no_third_model(tmp_path):
    family = pico.make(tmp_path)
    family.models[2] = with_other_bias(family.models[0])
    rewrite(family)
    with pytest.raises(InputError, match="only 2 distinct.*tune-2 equals tune-0 in every matrix"):
        pipeline.run(family.paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_twin_among_enough_models_is_solved_once_and_gets_its_adapter(tmp_path):
    family = pico.make(tmp_path, n_models=4)
    family.models[2] = with_other_bias(family.models[0])
    rewrite(family)
    seen = []
    teller = pico.truth_teller(family.base)

    def recover(stacks, **options):
        seen.extend(stack.shape[0] for stack in stacks.values())
        return teller(stacks, **options)

    report = pipeline.run(family.paths, tmp_path / "out", recover_fn=recover)
    assert seen == [3] * 4
    assert any("tune-2 equals tune-0 in every matrix" in text for text in report["warnings"])
    assert len(report["inputs"][2]["ranks"]) == 4
    assert verify(tmp_path / "out")["failures"] == []


def test_masks_and_grid_are_written(tmp_path):
    family = pico.make(tmp_path, n_models=4)
    report = pipeline.run(family.paths, tmp_path / "out", pipeline.Options(masks=True))
    masks = load_file(tmp_path / "out" / "masks.safetensors")
    solved = {t["name"]: t for t in report["tensors"] if t["code"] == "OK"}
    assert set(masks) == set(solved)
    for name, entry in solved.items():
        assert masks[name].shape == tuple(entry["shape"])
        assert masks[name].mean() == pytest.approx(entry["certain_fraction"])
        assert entry["certain_fraction"] == pytest.approx(1 - entry["ambiguous_fraction"])
        assert entry["verdict"] in ("at the floor", "exact") or "amplified" in entry["verdict"]
        assert entry["detection_floor"] > 0
    assert report["base"]["grid"] == "float32"


def test_an_interrupted_run_can_be_run_again(tmp_path):
    family = pico.make(tmp_path)
    stage = tmp_path / "out" / ".jdetune" / "base"
    stage.mkdir(parents=True)
    run(family, tmp_path / "out")
    assert not stage.parent.exists()


def test_only_a_report_of_ours_marks_a_folder_as_ours(tmp_path):
    family = pico.make(tmp_path / "zoo")
    (tmp_path / "home" / ".jdetune").mkdir(parents=True)
    (tmp_path / "home" / "base").mkdir()
    with pytest.raises(OutputError, match="did not write"):
        run(family, tmp_path / "home", overwrite=True)


def test_a_failure_while_placing_gives_the_former_output_back(tmp_path, monkeypatch):
    family = pico.make(tmp_path / "zoo")
    out = tmp_path / "out"
    run(family, out)
    before = (out / "report.json").read_text()
    rename = type(out).rename

    def fail(self, target):
        if self.name == "adapters" and self.parent.name == ".jdetune":
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(type(out), "rename", fail)
    with pytest.raises(OutputError, match="disk gone"):
        run(family, out, overwrite=True)
    assert (out / "report.json").read_text() == before
    assert (out / "base" / "model.safetensors").is_file()
    assert (out / "adapters" / "tune-0").is_dir()


def test_out_is_tried_before_the_work(tmp_path):
    family = pico.make(tmp_path / "zoo")
    (tmp_path / "file").write_text("")

    def recover(*_, **__):
        raise AssertionError("solved although OUT cannot be written")

    with pytest.raises(OutputError, match="cannot be written"):
        pipeline.run(family.paths, tmp_path / "file" / "out", recover_fn=recover)


def test_failed_tensors_have_no_ranks(tmp_path):
    family = pico.make(tmp_path)
    bad = "encoder.layer.0.value.weight"
    report = run(family, tmp_path / "out", {bad: Status.NOT_LOW_RANK})
    assert {t["name"] for t in report["tensors"] if t["code"] and t["ranks"] is None} == {bad}


def test_the_outlier_keeps_its_own_copy(tmp_path):
    family = pico.make(tmp_path)
    family.models[1] = with_other_bias(family.models[1], 2.0)
    family.models[2]["classifier.bias"] = np.ones(5, np.float32)
    rewrite(family)
    report = run(family, tmp_path / "out")
    saved = [read_adapter(tmp_path / "out" / "adapters" / f"tune-{i}").saved for i in range(3)]
    assert [set(s) for s in saved] == [set(), {"encoder.norm.weight", "encoder.norm.bias"}, set()]
    np.testing.assert_array_equal(saved[1]["encoder.norm.bias"], np.full(32, 2.0))
    entry = next(t for t in report["tensors"] if t["name"] == "classifier.bias")
    assert "leaves it out" in entry["reason"]
