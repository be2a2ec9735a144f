import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import models
from jdetune.errors import InputError
from jdetune.models.config import llama_config
from jdetune.models.rotary import frequencies
from tests.models import tiny

torch = tiny.torch
pytestmark = pytest.mark.interop

IDS = tiny.token_ids((2, 9))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "grouped": {},
    "one key head": {"num_key_value_heads": 1},
    "as many key heads": {"num_key_value_heads": 4},
    "head_dim of its own": {"head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
    "llama3": {"rope_parameters": LLAMA3},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_transformers(changes):
    theirs = tiny.theirs("llama", **changes)
    module, params = tiny.ours(theirs)
    out = models.run(module, params, jnp.asarray(IDS))
    tiny.close(out.logits, theirs(torch.tensor(IDS).long()).logits)


def test_scaled_positions_are_not_the_plain_ones():
    plain = frequencies(llama_config({**tiny.LLAMA, "rope_theta": 500.0}))
    scaled = frequencies(llama_config({**tiny.LLAMA, "rope_parameters": LLAMA3}))
    np.testing.assert_allclose(scaled[0], plain[0])  # short waves stay
    np.testing.assert_allclose(scaled[-1], plain[-1] / 8, rtol=1e-6)


def test_configs_of_both_forms_are_read():
    old = {**tiny.LLAMA, "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {
        **tiny.LLAMA,
        "rope_parameters": {"rope_theta": 7.0, "rope_type": "linear", "factor": 2.0},
    }
    assert llama_config(old) == llama_config(new)
    assert llama_config({**tiny.LLAMA, "rope_scaling": None}).rope_scaling == ()


def test_mistral_is_a_llama_without_its_window():
    theirs = tiny.theirs("mistral")
    module, params = tiny.ours(theirs)
    out = models.run(module, params, jnp.asarray(IDS))
    tiny.close(out.logits, theirs(torch.tensor(IDS).long()).logits)
    with pytest.raises(InputError, match="sliding_window to null"):
        models.build({**theirs.config.to_dict(), "sliding_window": 4})


def test_unknown_scaling_is_refused():
    module = models.build({"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 2.0}})
    with pytest.raises(InputError, match="rope_type 'yarn' is not known"):
        models.layout(module)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(side):
    theirs = tiny.theirs("llama")
    module, params = tiny.ours(theirs)
    mask = np.ones((2, 9), int)
    mask[1, :4] = 0
    mask = mask if side == "left" else mask[:, ::-1].copy()
    out = models.run(module, params, jnp.asarray(IDS), jnp.asarray(mask)).logits
    wanted = theirs(torch.tensor(IDS).long(), torch.tensor(mask)).logits
    tiny.close(np.asarray(out)[mask > 0], wanted[torch.tensor(mask) > 0])
    alone = models.run(module, params, jnp.asarray(IDS[1:, mask[1] > 0])).logits
    tiny.close(np.asarray(out)[1, mask[1] > 0], alone[0])


def test_the_cache_gives_what_the_whole_text_gives():
    module, params = tiny.ours(tiny.theirs("llama"))
    mask = np.ones((2, 9), int)
    mask[1, :3] = 0
    whole = models.run(module, params, jnp.asarray(IDS), jnp.asarray(mask)).logits
    cache = models.empty_cache(module.config, 2, 12)  # longer than the text
    for part in (slice(0, 5), slice(5, 6), slice(6, 9)):
        inputs = jnp.asarray(IDS[:, part]), jnp.asarray(mask[:, part])
        out = models.run(module, params, *inputs, cache=cache)
        cache, wanted = out.cache, np.asarray(whole)[:, part]
        seen = mask[:, part] > 0
        tiny.close(np.asarray(out.logits)[seen], wanted[seen])
    assert int(cache.filled) == 9
    last = models.run(module, params, jnp.asarray(IDS), jnp.asarray(mask), last=True).logits
    tiny.close(last, whole[:, -1:])
