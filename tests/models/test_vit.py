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


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
@pytest.mark.parametrize("size", [(28, 28), (42, 21), (16, 60)], ids=str)
def test_hidden_states_equal_transformers_at_any_size(kind, size):
    theirs = tiny.theirs(kind)
    module, params = tiny.ours(theirs)
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    x = pixels(*size)
    wanted = theirs(torch.tensor(x), **options).last_hidden_state
    tiny.close(models.run(module, params, jnp.asarray(x)).hidden, wanted)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_classifier_equals_transformers(kind):
    theirs = tiny.theirs(kind, "ForImageClassification", num_labels=3)
    module, params = tiny.ours(theirs)
    x = pixels(28, 28)
    tiny.close(models.run(module, params, jnp.asarray(x)).logits, theirs(torch.tensor(x)).logits)


def test_attention_without_bias():
    theirs = tiny.theirs("dinov2", qkv_bias=False)
    module, params = tiny.ours(theirs)
    x = pixels(28, 28)
    wanted = theirs(torch.tensor(x)).last_hidden_state
    tiny.close(models.run(module, params, jnp.asarray(x)).hidden, wanted)


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
        models.run(module, params, jnp.asarray(pixels(6, 28)))
