"""The pipeline on tensors of every kind, with a solver that knows the base."""

import json

import ml_dtypes
import numpy as np
import pytest

from jdetune import merging, pipeline
from jdetune.checkpoint import merge_peft, open_checkpoint, read_adapter, read_tensor
from jdetune.checkpoint.shapes import matrices, units
from jdetune.errors import InputError
from jdetune.status import Status
from jdetune.verification import verify
from tests import family_zoo as zoo
from tests import pico

CONV, STACK, QUERY = "stem.conv.weight", "mlp.experts.gate_up_proj", "layer.0.query.weight"
SHAPES = {CONV: (16, 4, 3, 3), STACK: (3, 24, 24), QUERY: (24, 24)}


def family(folder, dtype=np.float32, extra=None, n_models=3):
    """Tuned convolutions, stacks and matrices; ``extra`` gives more tensors of each model."""
    rng = np.random.default_rng(0)
    base = {n: (0.05 * rng.standard_normal(s)).astype(dtype) for n, s in SHAPES.items()}
    paths = []
    for index in range(n_models):
        tensors = {}
        for name, value in base.items():
            view = zoo.some_view(zoo.info(name, *value.shape))
            parts = matrices(value, view)
            ranks = [1 + (index + place) % 2 for place in range(len(parts))]
            merged = [
                merge_peft(part, *pico.pair(rng, part.shape, rank), dtype=np.dtype(dtype))
                for part, rank in zip(parts, ranks, strict=True)
            ]
            tensors[name] = np.stack(merged).reshape(value.shape)
        tensors |= extra(index) if extra else {}
        paths.append(pico.write(folder / f"tune-{index}", tensors))
    return base, paths


def run(folder, base, paths, statuses=None, **options):
    known = {}
    for name, value in base.items():
        info = zoo.info(name, *value.shape)
        known |= dict(zip(units(info), matrices(value, zoo.some_view(info)), strict=True))
    teller = pico.truth_teller(known, statuses)
    given = pipeline.Options(**options)
    return pipeline.run(paths, folder / "out", given, recover_fn=teller), folder / "out"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_bases_come_back_in_their_own_shapes(tmp_path, dtype):
    base, paths = family(tmp_path, dtype)
    report, out = run(tmp_path, base, paths, masks=True)
    assert report["summary"]["exit_code"] == 0
    written = open_checkpoint(out / "base")
    masks = open_checkpoint(out / "masks.safetensors")
    for name, value in base.items():
        np.testing.assert_array_equal(read_tensor(written, name), value)
        assert masks.tensors[name].shape == value.shape
    if dtype == np.float32:
        assert not verify(out, models=paths)["failures"]


def test_a_stack_has_one_entry_with_ranks_of_its_slices(tmp_path):
    base, paths = family(tmp_path)
    report, out = run(tmp_path, base, paths)
    stack = zoo.entry(report, STACK)
    assert stack["ranks"] == [2, 2, 2]
    assert stack["slices"] == {"count": 3, "lowest_ranks": [1, 1, 1], "not_ok": []}
    assert stack["predicted_error"] == -40.0
    assert "3 stacked matrices" in stack["reason"]
    assert [entry["ranks"][STACK] for entry in report["inputs"]] == [2, 2, 2]
    assert len(report["tensors"]) == 3
    updates = read_adapter(out / "adapters/tune-0").updates
    assert {f"{STACK}[{index}]" for index in range(3)} < set(updates)


def test_a_stack_of_which_a_slice_fails_has_no_base(tmp_path):
    base, paths = family(tmp_path)
    lost = {f"{STACK}[1]": Status.NOT_LOW_RANK}
    report, out = run(tmp_path, base, paths, lost)
    stack = zoo.entry(report, STACK)
    assert (stack["status"], stack["code"]) == ("failed", "NOT_LOW_RANK")
    assert stack["slices"]["not_ok"] == [1]
    assert f"{STACK}[1]: " in stack["reason"]
    assert stack["ranks"] is None
    assert report["summary"]["exit_code"] == 5
    assert STACK not in open_checkpoint(out / "base").tensors


def test_groups_of_a_stack_keep_to_the_memory(tmp_path):
    base, paths = family(tmp_path)
    report, _ = run(tmp_path, base, paths, max_memory=24 * 24 * 4 * 3 * 4)
    assert report["summary"]["exit_code"] == 0
    assert zoo.entry(report, STACK)["slices"]["count"] == 3


def others(index):
    """Buffers, masks, scalars and vectors: alike in all, in most, in none."""
    return {
        "position_ids": np.arange(8)[None],
        "steps": np.array(100 + index),
        "scale.weight": np.float32(1.0) * np.ones(()),
        "scale.temperature": np.array(0.5 * (index == 2), np.float32),
        "mask": np.tri(4, dtype=bool) if index else np.ones((4, 4), bool),
        "empty.weight": np.zeros((0, 4), np.float32),
        "empty.bias": np.zeros(0, np.float32),
        "block.norm.weight": np.full(4, 1 + 0.1 * index, np.float32),
        "block.norm.bias": np.zeros(4, np.float32),
        "score.weight": np.full((2, 24), index, np.float32),
    }


def test_vectors_buffers_and_scalars_are_copied_voted_on_or_kept(tmp_path):
    base, paths = family(tmp_path, extra=others)
    report, out = run(tmp_path, base, paths)
    status = zoo.statuses(report)
    assert {n: status[n] for n in others(0)} == {
        "position_ids": "identical",
        "steps": "per_model",
        "scale.weight": "identical",
        "scale.temperature": "consensus",
        "mask": "consensus",
        "empty.weight": "identical",
        "empty.bias": "identical",
        "block.norm.weight": "per_model",
        "block.norm.bias": "identical",
        "score.weight": "per_model",
    }
    written = open_checkpoint(out / "base")
    for name, wanted in others(1).items():
        if status[name] != "per_model":
            found = read_tensor(written, name)
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted)
    assert not {"steps", "block.norm.weight", "score.weight"} & set(written.tensors)
    adapter = read_adapter(out / "adapters/tune-2")
    assert {"block.norm.weight", "block.norm.bias", "score.weight"} <= set(adapter.saved)
    np.testing.assert_array_equal(adapter.saved["score.weight"], others(2)["score.weight"])
    config = json.loads((out / "adapters/tune-2/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["block.norm", "scale", "score"]
    assert "leaves it out" in zoo.entry(report, "steps")["reason"]  # no module: a bare buffer
    failures = verify(out, models=paths)["failures"]
    assert all("steps" in text or "mask" in text for text in failures)


def test_a_small_head_that_fails_is_each_models_own(tmp_path):
    name = "classifier.weight"
    rng = np.random.default_rng(1)
    base, paths = family(
        tmp_path, extra=lambda index: {name: rng.standard_normal((5, 24)).astype(np.float32)}
    )
    base[name] = np.zeros((5, 24), np.float32)
    report, out = run(tmp_path, base, paths, {name: Status.RANK_TOO_LARGE})
    head = zoo.entry(report, name)
    assert (head["status"], head["code"]) == ("per_model", "RANK_TOO_LARGE")
    assert "keeps its own copy" in head["reason"]
    assert name in read_adapter(out / "adapters/tune-1").saved
    assert name not in open_checkpoint(out / "base").tensors
    assert report["summary"]["exit_code"] == 5
    assert not verify(out, models=paths)["failures"]


@pytest.mark.slow
def test_the_real_solver_on_convolutions_and_stacks(tmp_path):
    shapes = {CONV: (48, 8, 2, 2), STACK: (2, 48, 32)}
    rng = np.random.default_rng(0)
    base = {n: (0.05 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}
    paths = []
    for index in range(4):
        tensors = {}
        for name, value in base.items():
            parts = matrices(value, zoo.some_view(zoo.info(name, *value.shape)))
            merged = [merge_peft(part, *pico.pair(rng, part.shape, 2)) for part in parts]
            tensors[name] = np.stack(merged).reshape(value.shape)
        paths.append(pico.write(tmp_path / f"tune-{index}", tensors))
    report = pipeline.run(paths, tmp_path / "out")
    assert report["summary"]["exit_code"] == 0
    assert zoo.entry(report, STACK)["ranks"] == zoo.entry(report, CONV)["ranks"] == [2, 2, 2, 2]
    written = open_checkpoint(tmp_path / "out" / "base")
    for name, value in base.items():
        error = read_tensor(written, name).astype(np.float64) - value
        predicted = zoo.entry(report, name)["predicted_error"]
        assert abs(np.log10(np.mean(error**2)) - predicted) < 1  # small matrices scatter
    assert not verify(tmp_path / "out", models=paths)["failures"]


def test_merge_gives_a_convolution_back_in_its_shape(tmp_path):
    base, paths = family(tmp_path)
    _, out = run(tmp_path, base, paths, exclude="experts")
    report = merging.run(out / "base", out / "adapters/tune-1", tmp_path / "merged")
    entry = zoo.entry(report, CONV)
    assert (entry["status"], entry["shape"]) == ("merged", list(SHAPES[CONV]))
    merged = read_tensor(open_checkpoint(tmp_path / "merged/merged"), CONV)
    wanted = read_tensor(open_checkpoint(paths[1]), CONV)
    np.testing.assert_allclose(merged, wanted, rtol=0, atol=1e-7)


def test_merge_refuses_stacks_with_the_remedy(tmp_path):
    base, paths = family(tmp_path)
    _, out = run(tmp_path, base, paths)
    with pytest.raises(InputError, match="target_parameters"):
        merging.run(out / "base", out / "adapters/tune-1", tmp_path / "merged")
