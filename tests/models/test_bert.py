import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import models
from jdetune.errors import InputError
from tests.models import tiny

torch = tiny.torch
pytestmark = pytest.mark.interop

IDS = tiny.token_ids((3, 7))
MASK = np.array([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])


def test_hidden_states_equal_transformers():
    theirs = tiny.theirs("bert")
    module, params = tiny.ours(theirs)
    kinds = np.array([[0, 0, 0, 1, 1, 1, 1]] * 3, np.int32)
    out = models.run(module, params, jnp.asarray(IDS), None, jnp.asarray(kinds))
    wanted = theirs(input_ids=torch.tensor(IDS).long(), token_type_ids=torch.tensor(kinds).long())
    tiny.close(out.hidden, wanted.last_hidden_state)


def test_padding_is_not_seen():
    theirs = tiny.theirs("bert")
    module, params = tiny.ours(theirs)
    out = models.run(module, params, jnp.asarray(IDS), jnp.asarray(MASK)).hidden
    wanted = theirs(torch.tensor(IDS).long(), torch.tensor(MASK)).last_hidden_state
    tiny.close(np.asarray(out)[MASK > 0], wanted[torch.tensor(MASK) > 0])
    other = models.run(
        module, params, jnp.asarray(np.where(MASK, IDS, 5)), jnp.asarray(MASK)
    ).hidden
    np.testing.assert_array_equal(np.asarray(out)[MASK > 0], np.asarray(other)[MASK > 0])
    blind = models.run(module, params, jnp.asarray(IDS)).hidden
    assert np.abs(np.asarray(blind - out))[1, 0].max() > 0.01


@pytest.mark.parametrize("act", ["gelu_new", "relu", "silu"])
def test_activations_equal_transformers(act):
    theirs = tiny.theirs("bert", hidden_act=act)
    module, params = tiny.ours(theirs)
    out = models.run(module, params, jnp.asarray(IDS)).hidden
    tiny.close(out, theirs(torch.tensor(IDS).long()).last_hidden_state)


def test_classifier_equals_transformers():
    theirs = tiny.theirs("bert", "ForSequenceClassification", num_labels=3)
    module, params = tiny.ours(theirs)
    assert module.config.labels == 3
    out = models.run(module, params, jnp.asarray(IDS), jnp.asarray(MASK))
    tiny.close(out.logits, theirs(torch.tensor(IDS).long(), torch.tensor(MASK)).logits)


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
