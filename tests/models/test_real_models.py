"""The real models: outputs of transformers, sentences that mean the same, tokens it generates."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import models
from jdetune.models import evaluate, text
from tests import real
from tests.models import tiny

torch = tiny.torch
pytestmark = pytest.mark.interop

TEXTS = [
    "A cat sleeps on the sofa.",
    "A kitten naps on the couch.",
    "Interest rates rose again in the third quarter, to the surprise of most observers.",
    "ok",
]
PROMPTS = ["Why is the sky blue? Answer in one sentence.", "Name three rivers.", "2 + 2 ="]


def converted(name) -> tuple[Any, Any, Any, Any]:
    """A real model by transformers, its tokenizer, and the same in Flax."""
    real_models = pytest.importorskip("benchmarks.real_models")
    try:
        theirs, tokenizer, _ = real_models.load(name)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    return theirs, tokenizer, *tiny.ours(theirs)


@pytest.fixture(scope="module")
def encoder():
    return text.SentenceEncoder.load(real.minilm_folder())


@pytest.fixture(scope="module")
def smollm2():
    return converted("smollm2")


def test_minilm_equals_transformers(encoder):
    folder = real.minilm_folder()
    theirs = tiny.transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = tiny.transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = theirs(**batch).last_hidden_state
    mask = batch["attention_mask"].numpy()
    out = jax.jit(lambda *x: models.run(encoder.module, encoder.params, *x).hidden)(
        jnp.asarray(batch["input_ids"].numpy().astype(np.int32)), jnp.asarray(mask)
    )
    np.testing.assert_allclose(
        np.asarray(out)[mask > 0], hidden.numpy()[mask > 0], rtol=0, atol=1e-4
    )
    weight = batch["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)
    ours = encoder(TEXTS, size=4)
    np.testing.assert_allclose(ours, pooled.numpy(), rtol=0, atol=1e-5)


def test_minilm_tells_like_sentences_from_unlike(encoder):
    vectors = encoder(TEXTS, size=4)
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]
    same = evaluate.text_log_cosine(encoder, TEXTS[:2], TEXTS[:2])
    like = evaluate.text_log_cosine(encoder, TEXTS[:1], TEXTS[1:2])
    unlike = evaluate.text_log_cosine(encoder, TEXTS[:1], TEXTS[2:3])
    assert same == -16.0 < like < unlike < 0.1
    assert encoder([]).shape == (0, 384)


def test_long_texts_are_cut_as_sentence_transformers_cuts_them(encoder):
    ids = encoder.codec.encode("word " * 2000)
    assert len(ids) == 256  # max_seq_length of sentence_bert_config.json
    assert ids[-1] == encoder.codec.encode("word")[-1]  # the end token stays


def test_a_real_adapter_overlaid_equals_it_merged(encoder):
    folder = real.ADAPTERS / "distinct_tasks_r16" / "00"
    module, params = encoder.module, encoder.params
    lora = models.load_lora(module, folder)
    assert len(lora) == 12
    ids, mask = text.pad_batch([encoder.codec.encode(one) for one in TEXTS])
    over = text.embed(module, params, ids, mask, lora)
    merged = {n: jnp.asarray(w) for n, w in _merged(params, folder).items()}
    together = text.embed(module, merged, ids, mask)
    np.testing.assert_allclose(over, together, rtol=0, atol=1e-5)
    assert np.abs(np.asarray(over - text.embed(module, params, ids, mask))).max() > 0.01


def _merged(params, folder):
    merged = {name: np.asarray(weight) for name, weight in params.items()}
    for name, (left, right) in real.factors(folder.parent.name, int(folder.name)).items():
        merged[name] = merged[name] + left @ right
    return merged


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2):
    theirs, tokenizer, module, params = smollm2
    ids = np.array([tokenizer(TEXTS[2])["input_ids"]], np.int32)
    out = jax.jit(lambda p, x: models.run(module, p, x))(params, jnp.asarray(ids))
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids).long(), output_hidden_states=True)
    # logits are up to 40: 1e-4 of the value beside 1e-4, which is what float32 leaves of PyTorch's
    pairs = [(out.logits, wanted.logits), (out.hidden, wanted.hidden_states[-1])]
    for got, want in pairs:
        np.testing.assert_allclose(np.asarray(got), want.numpy(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(torch.tensor(ids).long()).logits.numpy()
    error, their_error = (
        np.sqrt(np.mean((np.asarray(x, np.float64) - exact) ** 2))
        for x in (out.logits, wanted.logits.numpy())
    )
    assert error < 2 * their_error  # no further from float64 than PyTorch, to a factor


@pytest.mark.slow
def test_smollm2_generates_what_transformers_generates(smollm2):
    theirs, tokenizer, module, params = smollm2
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        wanted = theirs.generate(**batch, max_new_tokens=24, do_sample=False)
    wanted = wanted[:, batch["input_ids"].shape[1] :].numpy()
    end = (tokenizer.eos_token_id,)
    ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
    got = models.generate(module, params, ids, mask, new_tokens=24, end=end, pad=end[0])
    np.testing.assert_array_equal(np.asarray(got.tokens)[:, : wanted.shape[1]], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(56, 56), (98, 70)], ids=str)
def test_dinov2_equals_transformers(size):
    theirs, _, module, params = converted("dinov2")
    x = np.random.default_rng(0).standard_normal((2, 3, *size)).astype(np.float32)
    out = jax.jit(lambda p, v: models.run(module, p, v).hidden)(params, jnp.asarray(x))
    with torch.no_grad():
        wanted = theirs(torch.tensor(x)).last_hidden_state.numpy()
    np.testing.assert_allclose(np.asarray(out), wanted, rtol=1e-4, atol=1e-4)
