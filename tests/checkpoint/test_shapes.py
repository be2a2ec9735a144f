"""Tensors taken as matrices, and back."""

import numpy as np
import pytest

from jdetune.checkpoint import load_stack, open_checkpoint, save_base
from jdetune.checkpoint.shapes import locate, matrices, read_matrix, read_stack, units, view_of
from jdetune.status import Status
from tests import family_zoo as zoo
from tests import pico


@pytest.mark.parametrize(
    ("name", "shape", "kind", "row", "col", "slices"),
    [
        ("q.weight", (6, 4), "matrix", 6, 4, None),
        ("stem.weight", (8, 4, 3, 3), "conv", 8, 36, None),
        ("patches.weight", (8, 3, 2, 4, 4), "conv", 8, 96, None),
        ("stem.weight", (8, 4, 3), "conv", 8, 12, None),
        ("mixer.conv1d.weight", (8, 1, 4), "conv", 8, 4, None),
        ("mlp.experts.gate_up_proj", (4, 6, 5), "stack", 6, 5, 4),
        ("block_sparse_moe.input_linear.weight", (4, 6, 8), "stack", 6, 8, 4),
        ("position_embeddings", (1, 17, 32), "stack", 17, 32, 1),
        ("layers.experts.up", (2, 3, 6, 8), "stack", 6, 8, 6),
        ("stem.weight", (8, 4, 17), "stack", 4, 17, 8),
    ],
)
def test_every_shape_has_its_matrices(name, shape, kind, row, col, slices):
    view = view_of(zoo.info(name, *shape))
    assert view is not None
    assert (view.kind, view.row, view.col, view.slices) == (kind, row, col, slices)
    assert len(units(zoo.info(name, *shape))) == (slices or 1)
    assert (view.reason is not None) is (len(shape) == 3 or kind == "stack")


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4,), "float32"), ((), "float32"), ((4, 4), "int64"), ((0, 4), "float32")]
)
def test_what_is_no_float_matrix_has_none(shape, dtype):
    assert view_of(zoo.info("x", *shape, dtype=dtype)) is None


def test_a_name_that_looks_like_a_slice_is_itself():
    assert locate({"up[1]": 0}, "up[1]") == ("up[1]", None)
    assert locate({"up": 0}, "up[1]") == ("up", 1)
    assert locate({}, "up[1]") == ("up[1]", None)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 3, 6, 5)])
def test_slices_are_read_alone(tmp_path, shape, dtype):
    import ml_dtypes

    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    stack = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    conv = np.arange(8 * 4 * 9, dtype=np.float32).reshape(8, 4, 3, 3)
    model = open_checkpoint(pico.write(tmp_path / "m", {"experts.up": stack, "conv.weight": conv}))
    for index, matrix in enumerate(stack.reshape(-1, 6, 5)):
        np.testing.assert_array_equal(read_matrix(model, f"experts.up[{index}]"), matrix)
    np.testing.assert_array_equal(read_matrix(model, "conv.weight"), conv.reshape(8, 36))
    assert read_stack([model, model], "experts.up[1]").shape == (2, 6, 5)


def test_python_calls_take_stacks_apart_and_put_them_together(tmp_path):
    rng = np.random.default_rng(0)
    base = {
        "experts.up": rng.standard_normal((2, 6, 5)).astype(np.float32),
        "conv.weight": rng.standard_normal((8, 4, 3)).astype(np.float32),
    }
    paths = []
    for index in range(3):
        tensors = {name: value + np.float32(index) for name, value in base.items()}
        paths.append(pico.write(tmp_path / str(index), tensors))
    stacks = load_stack(paths)
    assert {n: s.shape for n, s in stacks.items()} == {
        "conv.weight": (3, 8, 12),
        "experts.up[0]": (3, 6, 5),
        "experts.up[1]": (3, 6, 5),
    }
    parts = {}
    for name in base:
        info = open_checkpoint(paths[0]).tensors[name]
        parts |= dict(zip(units(info), matrices(base[name], zoo.some_view(info)), strict=True))
    found = {name: pico.known(stack, parts[name]) for name, stack in stacks.items()}
    save_base(found, paths[0], tmp_path / "base")
    written = open_checkpoint(tmp_path / "base")
    for name, value in base.items():
        again = np.concatenate([read_matrix(written, u) for u in units(written.tensors[name])])
        np.testing.assert_array_equal(again.reshape(value.shape), value)
        assert written.tensors[name].shape == value.shape
    lost = {
        **found,
        "experts.up[1]": pico.known(
            stacks["experts.up[1]"], parts["experts.up[1]"], Status.NOT_LOW_RANK
        ),
    }
    save_base(lost, paths[0], tmp_path / "less")
    assert set(open_checkpoint(tmp_path / "less").tensors) == {"conv.weight"}
