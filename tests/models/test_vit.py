import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import models
from jdetune.errors import InputError
from jdetune.models.vit import resize_positions
from tests.models import tiny

torch = tiny.torch
pytestmark = pytest.mark.interop


def pixels(height, width):
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 3, height, width)).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "size", "changes"),
    [
        ("vit", (42, 21), {}),
        ("dinov2", (28, 28), {}),
        pytest.param("dinov2", (16, 60), {"qkv_bias": False}, marks=pytest.mark.slow),
        pytest.param("vit", (28, 28), {"qkv_bias": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_hidden_states_and_logits_equal_transformers(kind, size, changes):
    theirs = tiny.theirs(kind, "ForImageClassification", num_labels=3, **changes)
    module, params = tiny.ours(theirs)
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    x = pixels(*size)
    out = tiny.run(module, params, jnp.asarray(x))
    hidden = getattr(theirs, kind)(torch.tensor(x), **options).last_hidden_state
    tiny.close(out.hidden, hidden)
    tiny.close(out.logits, theirs(torch.tensor(x), **options).logits)


@pytest.mark.parametrize(("rows", "cols"), [(3, 3), (9, 4), (5, 12)])
def test_interpolation_is_pytorchs_bicubic(rows, cols):
    positions = np.random.default_rng(0).standard_normal((1, 26, 6)).astype(np.float32)
    grid = torch.tensor(positions[:, 1:]).reshape(1, 5, 5, 6).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(
        grid, size=(rows, cols), mode="bicubic", align_corners=False
    )
    wanted = wanted.permute(0, 2, 3, 1).reshape(1, rows * cols, 6)
    got = resize_positions(jnp.asarray(positions), rows, cols)
    np.testing.assert_allclose(got[:, 1:], wanted.numpy(), atol=3e-6)
    np.testing.assert_array_equal(got[:, :1], positions[:, :1])


def test_what_cannot_be_run_is_refused():
    config = tiny.theirs("dinov2").config.to_dict()
    with pytest.raises(InputError, match="DINOv2-giant"):
        models.build({**config, "use_swiglu_ffn": True})
    with pytest.raises(InputError, match="only square images"):
        models.build({**config, "image_size": [28, 14]})
    module, params = tiny.ours(tiny.theirs("dinov2"))
    with pytest.raises(ValueError, match="no patch of 7x7"):
        tiny.run(module, params, jnp.asarray(pixels(6, 28)))
