import doctest
import importlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jdetune import models
from jdetune.checkpoint import open_checkpoint
from jdetune.errors import InputError
from tests.models import tiny

torch = tiny.torch
pytestmark = pytest.mark.interop

HEADS = {
    "bert": "ForSequenceClassification",
    "vit": "ForImageClassification",
    "dinov2": "ForImageClassification",
}


@pytest.mark.parametrize("name", ["names", "params", "rotary", "run", "text"])
def test_examples(name):
    module = importlib.import_module(f"jdetune.models.{name}")
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("head", [False, True])
def test_folders_that_transformers_wrote_are_read_and_mapped_back(kind, head, tmp_path):
    if head and kind not in HEADS:
        pytest.skip("always has its head")
    theirs = tiny.theirs(kind, HEADS[kind] if head else None)
    folder = tiny.save(theirs, tmp_path)
    module, params = models.load(folder)
    in_memory, from_memory = tiny.ours(theirs)
    assert in_memory == module
    assert set(params) == set(from_memory) == set(models.layout(module))
    for name in params:
        np.testing.assert_array_equal(params[name], from_memory[name])
    for like in (open_checkpoint(folder).tensors, theirs.state_dict()):
        back = models.to_hf(module, params, like)
        left_out = {n for n in like if n not in back}
        assert all("mask_token" in n or "pooler" in n for n in left_out), left_out
        for name, array in back.items():
            if name in theirs.state_dict():
                np.testing.assert_array_equal(array, theirs.state_dict()[name].numpy())


def test_a_tied_head_is_written_back():
    theirs = tiny.theirs("llama", tie_word_embeddings=True)
    module, params = tiny.ours(theirs)
    assert "lm_head.weight" not in params
    back = models.to_hf(module, params, theirs.state_dict())
    np.testing.assert_array_equal(back["lm_head.weight"], back["model.embed_tokens.weight"])


def test_narrow_weights_are_widened():
    theirs = tiny.theirs("bert")
    module, _ = tiny.ours(theirs)
    narrow = {n: a.astype(ml_dtypes.bfloat16) for n, a in tiny.tensors(theirs).items()}
    params = models.load_params(module, narrow)
    name = "encoder.layer.0.output.dense.weight"
    assert params[name].dtype == jnp.float32
    np.testing.assert_array_equal(params[name], narrow[name].astype(np.float32))


def test_weights_that_do_not_fit_are_refused():
    theirs = tiny.theirs("bert")
    module, params = tiny.ours(theirs)
    found = tiny.tensors(theirs)
    name = "encoder.layer.1.output.dense.weight"
    with pytest.raises(InputError, match=f"missing tensors: {name}; .*place: none"):
        models.load_params(module, {n: a for n, a in found.items() if n != name})
    with pytest.raises(InputError, match="without a place: encoder.layer.9.odd"):
        models.load_params(module, {**found, "encoder.layer.9.odd": found[name]})
    with pytest.raises(InputError, match=rf"{name}: shape \(48, 32\)"):
        models.load_params(module, {**found, name: found[name].T})
    with pytest.raises(InputError, match="Make them with load_params"):
        tiny.run(module, {**params, "bert.x": params[name]}, jnp.int32([[1]]))


def test_new_models_are_drawn_from_a_key():
    module, _ = tiny.smallest("llama")[1:]
    params = models.init_params(module, jax.random.key(0))
    assert {n: a.shape for n, a in params.items()} == {
        n: shape for n, (_, shape) in models.layout(module).items()
    }
    assert np.all(np.asarray(params["model.norm.weight"]) == 1)
    assert np.std(params["lm_head.weight"]) == pytest.approx(0.02, rel=0.1)
    logits = tiny.run(module, params, jnp.int32([[1, 2]])).logits
    assert np.all(np.isfinite(logits))


def test_run_compiles_once_for_new_weights():
    module, params = tiny.smallest("llama")[1:]
    run = jax.jit(lambda weights, ids: tiny.run(module, weights, ids).logits)
    ids = jnp.int32([[1, 2, 3]])
    run(params, ids)
    run(jax.tree.map(lambda x: 2 * x, params), ids)
    assert run._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
