import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import models
from jdetune.errors import InputError
from jdetune.models.layers import activation
from tests.models import tiny

torch = tiny.torch
pytestmark = pytest.mark.interop

IDS, MASK = tiny.IDS, tiny.MASK


def test_hidden_states_and_logits_equal_transformers():
    theirs = tiny.theirs("bert", "ForSequenceClassification", num_labels=3)
    module, params = tiny.ours(theirs)
    assert module.config.labels == 3
    segments = np.array([[0, 0, 0, 1, 1, 1, 1]] * 3, np.int32)
    run = lambda ids, mask: tiny.run(module, params, *map(jnp.asarray, (ids, mask, segments)))  # noqa: E731
    out = run(IDS, MASK)
    wanted = theirs(
        torch.tensor(IDS).long(),
        torch.tensor(MASK),
        torch.tensor(segments).long(),
        output_hidden_states=True,
    )
    tiny.close(out.logits, wanted.logits)
    hidden = wanted.hidden_states[-1]
    tiny.close(np.asarray(out.hidden)[MASK > 0], hidden[torch.tensor(MASK) > 0])
    other = run(np.where(MASK, IDS, 5), MASK).hidden  # padding is not seen
    np.testing.assert_array_equal(np.asarray(out.hidden)[MASK > 0], np.asarray(other)[MASK > 0])
    blind = run(IDS, np.ones_like(MASK)).hidden
    assert np.abs(np.asarray(blind - out.hidden))[1, 0].max() > 0.01


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
def test_activations_are_those_of_transformers(name):
    x = np.linspace(-8, 8, 1001, dtype=np.float32)
    wanted = tiny.transformers.activations.ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(activation(name)(jnp.asarray(x)), wanted, rtol=1e-5, atol=1e-6)


def test_pooling_is_that_of_sentence_transformers():
    hidden = np.random.default_rng(0).standard_normal((3, 7, 4)).astype(np.float32)
    pooled = models.normalise(models.mean_pool(jnp.asarray(hidden), jnp.asarray(MASK)))
    for row, mask in enumerate(MASK):
        mean = hidden[row, mask > 0].mean(0)
        np.testing.assert_allclose(pooled[row], mean / np.linalg.norm(mean), rtol=1e-6)
    empty = models.mean_pool(jnp.asarray(hidden), jnp.zeros((3, 7)))
    assert not np.any(models.normalise(empty))


def test_what_cannot_be_run_is_refused():
    config = tiny.theirs("bert").config.to_dict()
    for change in ({"is_decoder": True}, {"position_embedding_type": "relative_key"}):
        with pytest.raises(InputError, match="absolute positions"):
            models.build({**config, **change})
    module = models.build({**config, "hidden_act": "mish"})
    with pytest.raises(InputError, match="hidden_act 'mish' is not known"):
        models.layout(module)
    with pytest.raises(InputError, match="model_type 'gpt2' cannot be run"):
        models.build({"model_type": "gpt2"})
