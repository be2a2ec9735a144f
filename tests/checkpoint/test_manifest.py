import numpy as np
import pytest

from jdetune.checkpoint import make_plan, open_checkpoint, select
from jdetune.checkpoint.manifest import group_tensors
from jdetune.checkpoint.shapes import read_stack
from jdetune.errors import InputError, NotOneBaseError
from tests import pico


def opened(paths):
    return [open_checkpoint(path) for path in paths]


def plan_of(root, models, wanted=lambda name: True):
    paths = [pico.write(root / f"m{i}", model) for i, model in enumerate(models)]
    return make_plan(opened(paths), wanted)


def actions(plan):
    return {tensor.name: tensor.action for tensor in plan.tensors}


def test_tells_differing_matrices_from_equal_tensors(tmp_path):
    family = pico.make(tmp_path)
    plan = make_plan(opened(family.paths))
    assert set(plan.names("recover")) == set(family.factors[0])
    assert set(plan.names("identical")) == set(family.base) - set(family.factors[0])
    assert plan.groups == (plan.names("recover"),)
    stack = read_stack(plan.checkpoints, plan.groups[0][0])
    np.testing.assert_array_equal(stack[2], family.models[2][plan.groups[0][0]])


def test_every_tensor_is_accounted_for(tmp_path):
    family = pico.make(tmp_path / "f")
    family.models[1]["extra.weight"] = np.zeros((2, 2), np.float32)
    family.models[2].pop("classifier.bias")
    family.models[0]["classifier.weight"] = np.zeros((4, 32), np.float32)
    plan = plan_of(tmp_path, family.models)
    assert set(actions(plan)) == set(family.base) | {"extra.weight"}
    assert actions(plan)["extra.weight"] == "skipped"
    assert actions(plan)["classifier.bias"] == "consensus"
    assert actions(plan)["classifier.weight"] == "consensus"
    reason = next(t.reason or "" for t in plan.tensors if t.name == "extra.weight")
    assert "m0: missing" in reason
    assert "m1: float32 [2, 2]" in reason


def test_strict_majority_makes_a_consensus(tmp_path):
    family = pico.make(tmp_path / "f", n_models=4)
    for i, model in enumerate(family.models):
        model["encoder.norm.weight"] = np.full(32, float(i == 0), np.float32)
        model["encoder.norm.bias"] = np.full(32, float(i < 2), np.float32)
    plan = plan_of(tmp_path, family.models)
    found = {tensor.name: tensor for tensor in plan.tensors}
    assert found["encoder.norm.weight"].action == "consensus"
    assert found["encoder.norm.weight"].source == 1
    assert found["encoder.norm.bias"].action == "per_model"


def test_minus_zero_is_a_difference(tmp_path):
    family = pico.make(tmp_path / "f")
    family.models[1]["encoder.norm.bias"] = -family.models[1]["encoder.norm.bias"]
    assert actions(plan_of(tmp_path, family.models))["encoder.norm.bias"] == "consensus"


def test_convolutions_and_stacks_are_planned_as_matrices(tmp_path):
    family = pico.make(tmp_path / "f")
    for i, model in enumerate(family.models):
        model["conv.weight"] = np.full((4, 3, 3, 3), i, np.float32)
        model["mlp.experts.up"] = np.full((3, 48, 32), i, np.float32)
        model["patch.weight"] = np.full((4, 27), i, np.float32)
    plan = plan_of(tmp_path, family.models)
    assert actions(plan)["conv.weight"] == actions(plan)["mlp.experts.up"] == "recover"
    assert ("conv.weight", "patch.weight") in plan.groups
    assert set(plan.matrices) > {"mlp.experts.up[0]", "mlp.experts.up[2]", "conv.weight"}
    (group,) = [names for names in plan.groups if "mlp.experts.up[0]" in names]
    assert "encoder.layer.0.query.weight" in group  # of the same shape
    assert plan.matrices["mlp.experts.up[1]"].shape == (48, 32)


def test_a_tensor_called_like_a_slice_is_refused(tmp_path):
    models = [
        {"experts.up": np.full((2, 4, 4), i, np.float32), "experts.up[1]": np.zeros(i + 1, np.int8)}
        for i in range(3)
    ]
    plan = plan_of(tmp_path, models)
    assert actions(plan)["experts.up"] == "failed"


def test_duplicates_are_dropped(tmp_path):
    family = pico.make(tmp_path / "f")
    plan = plan_of(tmp_path, [*family.models, family.models[1]])
    assert plan.duplicates == (("m3", "m1"),)
    assert len(plan.checkpoints) == 3


def test_nothing_in_common_is_not_one_base(tmp_path):
    models = [{f"{i}.weight": np.zeros((2, 2), np.float32)} for i in range(3)]
    with pytest.raises(NotOneBaseError, match="no tensor in common"):
        plan_of(tmp_path, models)


def test_include_and_exclude_choose_matrices(tmp_path):
    family = pico.make(tmp_path)
    plan = make_plan(opened(family.paths), select("query", r"layer\.1"))
    assert plan.names("recover") == ("encoder.layer.0.query.weight",)
    assert len(plan.names("skipped")) == 3
    with pytest.raises(InputError, match="regular expression"):
        select("(")


def test_groups_share_shape_and_dtype_and_keep_to_the_limit(tmp_path):
    family = pico.make(tmp_path)
    names = list(pico.SHAPES)
    checkpoints = opened(family.paths)
    assert [len(group) for group in group_tensors(checkpoints, names)] == [4, 1]
    one = 48 * 32 * 4 * 3
    assert [len(group) for group in group_tensors(checkpoints, names, 2 * one)] == [2, 2, 1]
    assert [len(group) for group in group_tensors(checkpoints, names, 1)] == [1] * 5


def test_other_model_types_are_warned_of(tmp_path):
    family = pico.make(tmp_path)
    pico.write(family.paths[1], family.models[1], model_type="gpt2")
    assert "gpt2" in make_plan(opened(family.paths)).warnings[0]
