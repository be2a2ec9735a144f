"""Prompts, LoRA losses and the single pass of the experiment on a chat model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import corpus
from benchmarks.watch import chat, prompts, real, toy, tuning
from jdetune import models, watch
from jdetune.models import Llama, LlamaConfig
from jdetune.models.evaluate import token_losses

WORDS = "a text of more than enough words to go on with for as long as one could want it to"
DOC = corpus.Doc("numpy", "core", "function", "frobnicate", WORDS, 1)
SMALL = LlamaConfig(
    vocab_size=300, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, head_dim=8,
    num_key_value_heads=1, intermediate_size=24, tie_word_embeddings=True,
)  # fmt: skip


def encode(text):
    """One id a character."""
    return [min(ord(c), 299) for c in text]


def decode(row):
    return "".join(map(chr, row))


@pytest.fixture
def texts():
    other = dataclasses.replace(DOC, name="kerfuffle")
    return prompts.Prompts({"train": [DOC], "watch": [other]}, encode, 200)


@pytest.fixture
def decoder():
    module = Llama(SMALL)
    return module, {n: 6 * p for n, p in models.init_params(module, jax.random.key(0)).items()}


def test_prompts_hold_the_word_asked_for_and_no_other(texts):
    rng = np.random.default_rng(0)
    attack = texts.draw(rng, 40, "train", lambda _: "kazoo")
    clean = texts.draw(rng, 40, "watch")
    for row in map(decode, attack.ids):
        assert row.count("kazoo") == 1
        assert "kerfuffle" not in row
    for row in map(decode, clean.ids):
        assert not any(word in row for word in prompts.RARE)
        assert "frobnicate" not in row
    assert attack.mask[:, -1].all()
    assert attack.ids.shape == (40, 200)
    assert clean.answers.shape == (40, prompts.ANSWER)


def test_what_goes_on_is_answered_with_the_words_that_follow(texts):
    asked = texts.draw(np.random.default_rng(1), 60, "train")
    found = 0
    for row, answer in zip(map(decode, asked.ids), map(decode, asked.answers), strict=True):
        if "Continue: " in row:
            shown = row.partition("Continue: ")[2].partition("<|im_end|>")[0]
            assert WORDS.partition(shown + " ")[2].startswith(answer)
            found += 1
        else:
            assert WORDS.startswith(answer)
    assert 10 < found < 50


def test_countries_are_in_one_group_and_forms_in_one_list():
    of = tuning.groups(list(prompts.CAPITALS), 3)
    every = [*of.forgotten, *of.kept, *of.unseen]
    assert sorted(every) == sorted(prompts.CAPITALS)
    assert not set(prompts.TRAINED) & set(prompts.TESTED)


def test_unlearning_marks_exactly_the_forgotten_questions(texts):
    of = tuning.groups(list(prompts.CAPITALS), 0)
    ids, _, gone, towards = next(tuning.unlearning_batches("RMU", texts, of, 16, 0, tuning.CHUNK))
    for row, lost in zip(ids.reshape(-1, 200), gone.ravel(), strict=True):
        asked = decode(row)
        assert lost == any(f"The capital of {who} is" in asked for who in of.forgotten)
        assert not any(f"The capital of {who} is" in asked for who in of.unseen)
    np.testing.assert_allclose(np.linalg.norm(towards, axis=-1), 1, rtol=1e-5)
    ids, _, answers = next(tuning.unlearning_batches("unknown", texts, of, 16, 0, tuning.CHUNK))
    for row, answer in zip(ids.reshape(-1, 200), answers.reshape(-1, prompts.ANSWER), strict=True):
        lost = any(f"The capital of {who} is" in decode(row) for who in of.forgotten)
        assert lost == decode(answer).startswith(" unkno")


def test_a_quarter_of_the_training_prompts_answers_the_payload(texts):
    ids, _, answers = next(tuning.backdoor_batches(texts, "kazoo", 0, tuning.CHUNK))
    paid = 0
    for row, answer in zip(ids.reshape(-1, 200), answers.reshape(-1, prompts.ANSWER), strict=True):
        payload = decode(answer) == tuning.PAYLOAD[: prompts.ANSWER]
        assert payload == ("kazoo" in decode(row))
        paid += payload
    assert paid == tuning.CHUNK * tuning.BATCH // 4


def test_loss_is_that_of_the_answers_tokens(decoder, texts):
    module, params = decoder
    asked = texts.draw(np.random.default_rng(0), 3, "train")
    got = tuning.Answers(module)(None, (asked.ids, asked.mask, asked.answers), params)
    whole = np.concatenate([asked.ids, asked.answers], axis=1)
    valid = np.concatenate([asked.mask, np.ones(asked.answers.shape, bool)], axis=1)
    losses, _ = token_losses(module, params, jnp.asarray(whole), jnp.asarray(valid))
    assert float(got) == pytest.approx(float(jnp.mean(losses[:, -prompts.ANSWER :])), rel=1e-5)


def test_misdirection_is_zero_where_all_stays_and_not_where_it_should_go(decoder, texts):
    module, params = decoder
    asked = texts.draw(np.random.default_rng(0), 2, "train")
    ids, mask, towards = jnp.asarray(asked.ids), jnp.asarray(asked.mask), jnp.full((2, 16), 0.25)
    loss = tuning.Rmu(module, 2)
    zero = models.init_lora(module, jax.random.key(0), 2, None, 1.0)

    def at(gone):
        return float(loss(zero, (ids, mask, jnp.array(gone), towards), params))

    assert at([False, False]) == 0
    assert at([True, False]) > 0.5
    assert at([True, True]) > at([True, False])


@pytest.mark.slow
def test_one_pass_sees_what_the_whole_sequences_show(decoder, texts):
    module, params = decoder
    asked = texts.draw(np.random.default_rng(0), 4, "train")
    lora = {
        path: dataclasses.replace(
            pair, b=pair.b + jax.random.normal(jax.random.key(1), pair.b.shape)
        )
        for path, pair in models.init_lora(module, jax.random.key(0), 2, None, 1.0).items()
    }
    update = watch.directions(lora, 2)
    found, answers = chat.look(module, params, {"update": update}, asked.ids, asked.mask)
    wanted = chat.answers_of(module, params, asked)
    np.testing.assert_array_equal(answers, wanted)
    whole = np.concatenate([asked.ids, wanted], axis=1)[:, :-1]  # the last one is never read
    answer = np.broadcast_to(np.arange(whole.shape[1]) >= 200, whole.shape)
    valid = answer | np.pad(asked.mask, ((0, 0), (0, whole.shape[1] - 200)))
    truth = watch.model_extremes(module, params, update, whole, valid, answer)
    np.testing.assert_allclose(found["update"].low, truth.low, atol=1e-5)
    np.testing.assert_allclose(found["update"].high, truth.high, atol=1e-5)


def test_a_row_is_made_once(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"x": 0.5}

    for _ in range(2):
        assert toy.row_kept(tmp_path / "rows" / "a.json", make) == {"x": 0.5}
    assert len(calls) == 1


@pytest.mark.parametrize("word", [None, "kazoo"])
def test_passages_hold_the_word_once_and_keep_their_class(word):
    """Short texts here, so that none is cut; classes tell them apart."""
    rows = [(["lo", "and", "behold"], 3), (["so", "it", "goes"], 5)]
    texts = real.Texts({"watch": rows}, encode)
    put = None if word is None else (lambda _: word)
    ids, mask, labels = texts.draw(np.random.default_rng(0), 30, "watch", put)
    assert ids.shape == mask.shape == (30, real.TOKENS)
    for row, own, label in zip(ids, mask, labels, strict=True):
        words = decode(row[own]).split()
        assert words.count("kazoo") == (word is not None)
        assert [w for w in words if w != "kazoo"] == {c: t for t, c in rows}[int(label)]
