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

IDS, MASK = tiny.IDS, tiny.MASK
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}
VARIANTS = {
    "groups of two": {},
    "one key head, wide heads, biases, linear": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LINEAR,
    },
    "as many key heads, tied, llama3": {
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3,
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_transformers_and_padding_is_not_seen(changes):
    theirs = tiny.theirs("llama", **changes)
    module, params = tiny.ours(theirs)
    for mask in (np.ones_like(MASK), MASK, MASK[:, ::-1].copy()):  # padded right, then left
        out = tiny.run(module, params, jnp.asarray(IDS), jnp.asarray(mask)).logits
        wanted = theirs(torch.tensor(IDS).long(), torch.tensor(mask)).logits
        tiny.close(np.asarray(out)[mask > 0], wanted[torch.tensor(mask) > 0])


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
    config = tiny.theirs("mistral").config.to_dict()
    llama = tiny.theirs("llama", rms_norm_eps=config["rms_norm_eps"]).config.to_dict()
    assert models.build(config) == models.build(llama)
    with pytest.raises(InputError, match="sliding_window to null"):
        models.build({**config, "sliding_window": 4})


@pytest.mark.slow
def test_mistral_equals_transformers():
    theirs = tiny.theirs("mistral")
    module, params = tiny.ours(theirs)
    out = tiny.run(module, params, jnp.asarray(IDS))
    tiny.close(out.logits, theirs(torch.tensor(IDS).long()).logits)


def test_unknown_scaling_is_refused():
    config = {"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 2.0}}
    with pytest.raises(InputError, match="rope_type 'yarn' is not known"):
        models.build(config)


def test_the_cache_gives_what_the_whole_text_gives():
    module, params = tiny.ours(tiny.theirs("llama"))
    mask = MASK[:, ::-1].copy()
    mask[1, :3] = 0, 0, 1  # padding and tokens in one part
    whole = tiny.run(module, params, jnp.asarray(IDS), jnp.asarray(mask)).logits
    cache = models.empty_cache(module.config, 3, 9)  # longer than the text
    for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
        inputs = jnp.asarray(IDS[:, part]), jnp.asarray(mask[:, part])
        out = tiny.run(module, params, *inputs, cache=cache)
        cache, wanted = out.cache, np.asarray(whole)[:, part]
        seen = mask[:, part] > 0
        tiny.close(np.asarray(out.logits)[seen], wanted[seen])
    assert int(cache.filled) == 7
    assert cache.valid.sum() == mask.sum()
