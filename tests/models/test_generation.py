from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import models
from jdetune.models import generation
from jdetune.models.generation import pick
from tests.models import tiny

torch = tiny.torch
pytestmark = pytest.mark.interop

IDS, MASK = tiny.IDS, tiny.MASK[:, ::-1].copy()


@pytest.fixture(scope="module")
def pair():
    theirs = tiny.theirs("llama", tie_word_embeddings=True, seed=3)
    return (theirs, *tiny.ours(theirs))


def greedy(theirs, ids, mask, new_tokens, end):
    out = theirs.generate(
        torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=list(end) or None,
        pad_token_id=0,
    )
    return out[:, ids.shape[1] :].numpy()


def test_greedy_tokens_equal_transformers(pair):
    theirs, module, params = pair
    wanted = greedy(theirs, IDS, MASK, 12, ())
    assert len(np.unique(wanted)) > 5, "nothing to compare"
    got = models.generate(module, params, IDS, MASK, new_tokens=12)
    np.testing.assert_array_equal(got.tokens, wanted)
    assert got.lengths.tolist() == [12] * 3


def test_texts_end_where_transformers_ends_them(pair):
    theirs, module, params = pair
    free = greedy(theirs, IDS, MASK, 12, ())
    end = (int(free[0, 3]), int(free[1, 7]))
    wanted = greedy(theirs, IDS, MASK, 12, end)
    got = models.generate(module, params, IDS, MASK, new_tokens=12, end=end)
    np.testing.assert_array_equal(np.asarray(got.tokens)[:, : wanted.shape[1]], wanted)
    for row, length in zip(np.asarray(got.tokens), got.lengths.tolist(), strict=True):
        ends = [i + 1 for i, token in enumerate(row) if token in end]
        assert length == (ends[0] if ends else 12)
        assert not row[length:].any()


def test_a_pad_that_also_ends_is_counted_once_and_programs_are_shared(pair):
    theirs, module, params = pair
    end = int(greedy(theirs, IDS, MASK, 4, ())[0, 1])
    program: Any = generation._generate
    before = program._cache_size()
    got = models.generate(module, params, IDS, MASK, new_tokens=4, end=(end,), pad=end)
    assert int(got.lengths[0]) == 2
    assert got.tokens[0, 1:].tolist() == [end] * 3
    for width in (3, 5):  # another end, another width: the same program
        wanted = greedy(theirs, IDS[:, :width], np.ones((3, width), int), 4, ())
        got = models.generate(module, params, IDS[:, :width], new_tokens=4, end=(99,))
        np.testing.assert_array_equal(got.tokens, wanted)
    assert program._cache_size() == before + 1


def test_sampling_is_reproducible():
    _, module, params = tiny.smallest("llama")
    options = {"new_tokens": 6, "sampling": models.Sampling(1.5, top_k=20, top_p=0.9)}
    one, two, other = (
        models.generate(module, params, IDS, MASK, key=jax.random.key(seed), **options).tokens
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, two)
    assert np.any(np.asarray(other) != np.asarray(one))


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (models.Sampling(temperature=0.5), [0.685, 0.247, 0.0616, 0.00685]),
        (models.Sampling(top_k=1), [1, 0, 0, 0]),
        (models.Sampling(top_p=0.79), [0.625, 0.375, 0, 0]),
        (models.Sampling(top_p=0.81), [0.526, 0.316, 0.158, 0]),
        (models.Sampling(top_k=3, top_p=0.84), [0.625, 0.375, 0, 0]),  # .526 + .316 reach .84
    ],
    ids=str,
)
def test_draws_follow_the_probabilities(sampling, kept):
    order = np.array([2, 0, 3, 1])  # not sorted
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]], jnp.float32))[:, order]
    count = 20_000
    drawn = pick(jnp.broadcast_to(logits, (count, 4)), sampling, jax.random.key(0))
    share = np.bincount(np.asarray(drawn), minlength=4) / count
    # five standard deviations of a share, and nothing where nothing is left
    np.testing.assert_allclose(share, np.array(kept)[order], atol=5 * 0.5 / count**0.5)
    assert not share[np.array(kept)[order] == 0].any()


def test_filters_keep_what_transformers_keeps():
    warpers = tiny.transformers.generation.logits_process
    logits = np.random.default_rng(0).standard_normal((4, 40)).astype(np.float32)
    scores = warpers.TopKLogitsWarper(12)(None, torch.tensor(logits))
    scores = warpers.TopPLogitsWarper(0.6)(None, scores)
    kept = np.isfinite(scores.numpy())
    assert 4 < kept.sum() < 48
    drawn = pick(
        jnp.repeat(jnp.asarray(logits), 4000, axis=0),
        models.Sampling(top_k=12, top_p=0.6),
        jax.random.key(0),
    )
    for row, tokens in enumerate(np.asarray(drawn).reshape(4, 4000)):
        assert set(tokens) == set(np.flatnonzero(kept[row]))


def test_malformed_calls_are_refused(pair):
    _, module, params = pair
    with pytest.raises(ValueError, match="padded on the left"):
        models.generate(module, params, IDS, MASK[:, ::-1], new_tokens=2)
    with pytest.raises(ValueError, match="new_tokens"):
        models.generate(module, params, IDS, new_tokens=0)
    with pytest.raises(ValueError, match="needs a key"):
        models.generate(module, params, IDS, new_tokens=2, sampling=models.Sampling())
    with pytest.raises(ValueError, match="temperature"):
        models.Sampling(temperature=0.0)
