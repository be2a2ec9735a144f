"""Files in, files out, where models do not belong or are damaged."""

import json

import numpy as np
import pytest

from jdetune import pipeline, solving
from jdetune.checkpoint import make_plan, merge_peft, open_checkpoint, read_adapter, read_tensor
from jdetune.errors import NotOneBaseError
from jdetune.solvers.intersection import SubspaceIntersection
from jdetune.status import Status
from jdetune.verification import remerge
from tests import pico

PLAIN = pipeline.Options(solver=SubspaceIntersection(polish=False))
QUERY = "encoder.layer.0.query.weight"


def merged_from(base, count, seed):
    """More models of a base, by fresh updates of the tuned matrices."""
    rng = np.random.default_rng(seed)
    tuned = [name for name in pico.SHAPES if "dense" not in name]
    pairs = [{n: pico.pair(rng, pico.SHAPES[n], 2) for n in tuned} for _ in range(count)]
    return [{**base, **{n: merge_peft(base[n], *p[n]) for n in tuned}} for p in pairs]


def other_base(base, seed=9):
    rng = np.random.default_rng(seed)
    shapes = {name: shape for name, shape in pico.SHAPES.items() if "dense" not in name}
    return {**base, **{n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}}


def write_all(root, models, **config):
    return [pico.write(root / f"tune-{i}", model, **config) for i, model in enumerate(models)]


def entry_of(report, name):
    return next(tensor for tensor in report["tensors"] if tensor["name"] == name)


def adapters_in(out):
    return sorted(path.name for path in (out / "adapters").iterdir())


def check_base(out, base):
    found = open_checkpoint(out / "base")
    assert set(found.tensors) == set(base)
    for name, truth in base.items():
        # rounding errors of three models at weights below 0.25, a few of 1.5e-8; closed form
        np.testing.assert_allclose(read_tensor(found, name), truth, atol=1e-6)


def test_a_model_of_another_base_gets_no_adapter_and_no_say(tmp_path):
    """Even as the first model: config, shards and votes are those of the others."""
    family = pico.make(tmp_path / "unused")
    stranger = merged_from(other_base(family.base), 1, 1)[0]
    stranger["encoder.norm.bias"] = np.ones(32, np.float32)
    for model in (family.base, *family.models):
        model["pooler.weight"] = family.base[QUERY]
    stranger["pooler.weight"] = np.ascontiguousarray(family.base[QUERY][::-1])
    models = [stranger, *family.models]
    models[1]["encoder.norm.bias"] = np.full(32, 2, np.float32)
    paths = write_all(tmp_path, models)
    pico.write(paths[0], stranger, model_type="gpt2")
    report = pipeline.run(paths, tmp_path / "out", PLAIN)
    assert report["summary"]["exit_code"] == 0
    check_base(tmp_path / "out", family.base)
    assert json.loads((tmp_path / "out" / "base" / "config.json").read_text())["model_type"] == (
        "bert"
    )
    assert adapters_in(tmp_path / "out") == ["tune-1", "tune-2", "tune-3"]
    first = report["inputs"][0]
    assert first["ranks"] is None
    assert first["left_out"] == report["warnings"][0]
    assert first["left_out"].startswith("tune-0 was left out of every tensor solved (5): it ")
    assert [entry["left_out"] for entry in report["inputs"][1:]] == [None] * 3
    assert set(report["inputs"][1]["ranks"].values()) == {2}
    assert entry_of(report, QUERY)["ranks"] == [2, 2, 2]
    assert len(entry_of(report, QUERY)["remerge_match"]) == 3
    # the stranger alone differs in it
    assert entry_of(report, "pooler.weight")["status"] == "identical"
    assert entry_of(report, "encoder.norm.bias")["status"] == "consensus"


def test_what_was_solved_is_not_solved_again(tmp_path):
    family = pico.make(tmp_path)
    stranger = merged_from(other_base(family.base), 1, 1)[0]
    paths = [*family.paths, pico.write(tmp_path / "x", stranger)]
    seen = []

    def recover(stacks, **options):
        seen.append(sorted(stacks))
        return solving.default_recover(stacks, **options)

    pipeline.run(paths, tmp_path / "out", PLAIN, recover_fn=recover)
    names = [name for group in seen for name in group]
    assert sorted(names) == sorted(family.factors[0])


def test_a_tensor_that_only_strangers_have_in_another_shape_is_solved(tmp_path):
    family = pico.make(tmp_path)
    stranger = merged_from(other_base(family.base), 1, 1)[0]
    stranger[QUERY] = np.zeros((8, 8), np.float32)
    paths = [*family.paths, pico.write(tmp_path / "x", stranger)]
    report = pipeline.run(paths, tmp_path / "out", PLAIN)
    assert report["summary"]["exit_code"] == 0
    check_base(tmp_path / "out", family.base)


def test_a_layer_alone_leaves_a_model_out_and_its_adapter_keeps_its_own_copy(tmp_path):
    family = pico.make(tmp_path, n_models=4)
    rng = np.random.default_rng(0)
    odd = rng.standard_normal(pico.SHAPES[QUERY]).astype(np.float32)
    family.models[2][QUERY] = odd
    paths = write_all(tmp_path, family.models)
    report = pipeline.run(paths, tmp_path / "out", PLAIN)
    assert report["summary"]["exit_code"] == 0
    check_base(tmp_path / "out", family.base)
    said = f"tune-2 was left out of 1 of 4 tensors solved ({QUERY}): it differs"
    assert report["warnings"][0].startswith(said)
    entry = entry_of(report, QUERY)
    assert entry["left_out"] == ["tune-2"]
    assert entry["ranks"] == [2, 2, 0, 2]
    assert entry["reason"].startswith(f"tune-2 was left out of {QUERY}: it differs")
    assert entry_of(report, "encoder.layer.1.query.weight")["left_out"] == []
    assert report["inputs"][2]["left_out"] is None
    assert QUERY not in report["inputs"][2]["ranks"]
    assert len(report["inputs"][2]["ranks"]) == 3
    adapter = read_adapter(tmp_path / "out" / "adapters" / "tune-2")
    np.testing.assert_array_equal(adapter.saved[QUERY], odd)
    base = open_checkpoint(tmp_path / "out" / "base")
    for i, path in enumerate(paths):
        adapter = read_adapter(tmp_path / "out" / "adapters" / f"tune-{i}")
        assert remerge(base, adapter, open_checkpoint(path))["off"] == []


def test_the_twin_of_a_stranger_is_a_duplicate_still(tmp_path):
    family = pico.make(tmp_path)
    stranger = merged_from(other_base(family.base), 1, 1)[0]
    paths = write_all(tmp_path, [*family.models, stranger, stranger])
    report = pipeline.run(paths, tmp_path / "out", PLAIN)
    assert report["summary"]["exit_code"] == 0
    assert report["inputs"][4]["duplicate_of"] == "tune-3"
    assert adapters_in(tmp_path / "out") == ["tune-0", "tune-1", "tune-2"]


def test_two_groups_are_refused_by_name_and_nothing_is_written(tmp_path):
    family = pico.make(tmp_path / "unused")
    models = [*family.models, *merged_from(other_base(family.base), 3, 1)]
    models = [models[i] for i in (0, 3, 1, 4, 2, 5)]
    report = pipeline.run(write_all(tmp_path, models), tmp_path / "out", PLAIN)
    assert report["summary"]["exit_code"] == 4
    assert not report["summary"]["base_written"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.html", "report.json"}
    assert entry_of(report, QUERY)["reason"] == (
        "tune-0, tune-2, tune-4 share one base; tune-1, tune-3, tune-5 another. "
        "Recover each group of three or more alone."
    )


def test_a_damaged_model_is_named_with_tensor_and_place(tmp_path):
    family = pico.make(tmp_path, n_models=4)
    family.models[1][QUERY][3] = np.nan
    paths = write_all(tmp_path, family.models)
    report = pipeline.run(paths, tmp_path / "out", PLAIN)
    assert report["summary"]["exit_code"] == 0
    check_base(tmp_path / "out", family.base)
    said = f"tune-1 holds NaN or infinity in row 3 of {QUERY}: the base is that of the other models"
    assert report["warnings"][0].startswith(said)
    assert entry_of(report, QUERY)["reason"].startswith(said)
    assert entry_of(report, QUERY)["ranks"] == [2, 2, 2, 2]
    assert entry_of(report, QUERY)["left_out"] == []
    update = read_adapter(tmp_path / "out" / "adapters" / "tune-1").updates[QUERY]
    truth = np.matmul(*family.factors[1][QUERY])
    truth[3] = 0
    np.testing.assert_allclose(update.left @ update.right, truth, atol=1e-6)


def test_a_tensor_lost_in_a_model_is_marked(tmp_path):
    family = pico.make(tmp_path, n_models=4)
    family.models[1][QUERY][:] = np.inf
    report = pipeline.run(write_all(tmp_path, family.models), tmp_path / "out", PLAIN)
    assert report["summary"]["exit_code"] == 0
    assert entry_of(report, QUERY)["left_out"] == ["tune-1"]
    assert QUERY not in report["inputs"][1]["ranks"]
    adapter = read_adapter(tmp_path / "out" / "adapters" / "tune-1")
    assert QUERY not in {**adapter.updates, **adapter.saved}


def test_every_report_says_what_nobody_can_know(tmp_path):
    """Solved, repaired and refused: an earlier merged fine-tune cannot be told from the base."""
    family = pico.make(tmp_path / "family", n_models=4)
    strange = merged_from(other_base(family.base), 2, 1)
    cases = {
        "solved": family.models,
        "repaired": [*family.models, strange[0]],
        "refused": [*family.models[:2], *strange],
    }
    for name, models in cases.items():
        paths = write_all(tmp_path / name, models)
        report = pipeline.run(paths, tmp_path / f"{name}-out", PLAIN)
        assert report["summary"]["base_written"] is (name != "refused")
        assert "part of the recovered base" in report["summary"]["note"]
        assert json.loads((tmp_path / f"{name}-out" / "report.json").read_text()) == report


def test_a_recover_function_without_groups_will_do(tmp_path):
    family = pico.make(tmp_path)
    teller = pico.truth_teller(family.base, {QUERY: Status.NON_FINITE})
    report = pipeline.run(family.paths, tmp_path / "out", recover_fn=teller)
    assert entry_of(report, QUERY)["reason"] == Status.NON_FINITE.message
    assert entry_of(report, QUERY)["left_out"] == []


def padded(model):
    return {name: np.pad(tensor, [(0, 4)] * tensor.ndim) for name, tensor in model.items()}


def test_one_model_of_another_architecture_is_left_out(tmp_path):
    family = pico.make(tmp_path / "unused")
    paths = write_all(tmp_path, [padded(family.base), *family.models])
    plan = make_plan([open_checkpoint(path) for path in paths])
    assert [c.name for c in plan.checkpoints] == ["tune-1", "tune-2", "tune-3"]
    report = pipeline.run(paths, tmp_path / "out", PLAIN)
    assert report["summary"]["exit_code"] == 0
    assert report["inputs"][0]["left_out"] == plan.left_out[0][1] == report["warnings"][0]
    assert "tune-0 was left out: it has no tensor in common with tune-1" in report["warnings"][0]
    assert adapters_in(tmp_path / "out") == ["tune-1", "tune-2", "tune-3"]


@pytest.mark.parametrize("others", [1, 2, 3])
def test_groups_by_architecture_are_named(tmp_path, others):
    count = 3 if others > 1 else 2
    family = pico.make(tmp_path / "unused", n_models=count)
    wide = [padded(model) for model in merged_from(family.base, others, 1)]
    paths = write_all(tmp_path, [*family.models, *wide])
    names = [path.name for path in paths]
    said = f"{', '.join(names[:count])}; {', '.join(names[count:])}. Recover each group"
    with pytest.raises(NotOneBaseError, match=said):
        pipeline.run(paths, tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()
