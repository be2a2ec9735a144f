import ml_dtypes
import numpy as np
import pytest

from jdetune.checkpoint import (
    load_adapter,
    load_stack,
    open_checkpoint,
    read_tensor,
    save_adapters,
    save_base,
)
from jdetune.errors import InputError
from jdetune.status import Status
from tests import pico


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_load_stack_reads_what_differs(tmp_path, dtype):
    family = pico.make(tmp_path, dtype=dtype)
    stack = load_stack(family.paths)
    assert list(stack) == sorted(family.factors[0])
    for name, merged in stack.items():
        assert merged.dtype == dtype
        np.testing.assert_array_equal(merged, np.stack([m[name] for m in family.models]))


def test_include_reads_equal_matrices_too(tmp_path):
    family = pico.make(tmp_path)
    assert set(load_stack(family.paths, "dense|0.query")) == {
        "encoder.layer.0.dense.weight",
        "encoder.layer.0.query.weight",
    }
    with pytest.raises(InputError, match="no matrix matches"):
        load_stack(family.paths, "nothing")
    with pytest.raises(InputError, match="no matrix differs"):
        load_stack([family.paths[0]] * 3)


def test_base_and_adapters_round_trip(tmp_path):
    family = pico.make(tmp_path)
    stack = load_stack(family.paths)
    failed = "encoder.layer.1.value.weight"
    recovery = pico.truth_teller(family.base, {failed: Status.NOT_LOW_RANK})(stack)
    save_base(recovery, family.paths[0], tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    assert set(base.tensors) == set(family.base) - {failed}
    for name in base.tensors:
        np.testing.assert_array_equal(read_tensor(base, name), family.base[name])
    save_adapters(recovery, family.paths[0], tmp_path / "adapters", ["a", "b", "c"])
    found = load_adapter(tmp_path / "adapters" / "b")
    assert set(found) == set(stack) - {failed}
    for name, (left, right) in found.items():
        expected = np.matmul(*family.factors[1][name])
        np.testing.assert_allclose(left @ right, expected, atol=1e-7)  # a few ulp of 0.05


def test_adapter_names_must_fit(tmp_path):
    family = pico.make(tmp_path)
    recovery = pico.truth_teller(family.base)(load_stack(family.paths))
    with pytest.raises(ValueError, match="got 1 names for 3 models"):
        save_adapters(recovery, family.paths[0], tmp_path / "x", ["a"])
    written = save_adapters(recovery, family.paths[0], tmp_path / "x")
    assert [files.path.name for files in written] == ["model-1", "model-2", "model-3"]


@pytest.mark.parametrize("bad", ["../b", "", "/b", ".b", "a", "A"])
def test_unsafe_or_double_adapter_names_are_refused(tmp_path, bad):
    family = pico.make(tmp_path)
    recovery = pico.truth_teller(family.base)(load_stack(family.paths))
    with pytest.raises(ValueError, match="plain folder name|unique"):
        save_adapters(recovery, family.paths[0], tmp_path / "x", ["a", bad, "c"])
    assert not (tmp_path / "x").exists()


def test_adapters_in_another_format(tmp_path):
    from tests import pico_pipeline

    truth, paths = pico_pipeline.family(tmp_path)
    stack = load_stack(paths)
    recovery = pico.truth_teller(truth)(stack)
    files = save_adapters(recovery, paths[0], tmp_path / "out", adapter_format="kohya")
    assert [set(f.targets) for f in files] == [
        {*pico_pipeline.TUNED, f"text_encoder/{pico_pipeline.OUTPUT}"}
    ] * 3
    assert (tmp_path / "out" / "model-2" / "model-2.safetensors").exists()
