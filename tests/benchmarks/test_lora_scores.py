"""Scores of adapters: counted as NumPy counts them, even at the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import lora_data, lora_scores
from jdetune import models
from tests.models import tiny

pytestmark = pytest.mark.interop

SIZE = 32


@pytest.fixture(scope="module")
def llama():
    return tiny.smallest("llama")[1:]


def adapter(module, seed):
    drawn = models.init_lora(module, jax.random.key(seed), 3, ["q_proj", "v_proj"])
    rng = np.random.default_rng(seed)
    return {
        path: models.Lora(f.a, jnp.asarray(0.3 * rng.standard_normal(f.b.shape), jnp.float32))
        for path, f in drawn.items()
    }


def zeros(lora):
    return jax.tree.map(jnp.zeros_like, lora)


def examples(*lead):
    ids = tiny.token_ids((300, *lead, 7), seed=5)
    mask = np.ones(ids.shape, bool)
    arrays = {"ids": ids, "mask": mask, "answered": mask & (np.arange(7) >= 3)}
    return lora_data.Examples("", "", arrays, np.arange(0, 300, 8))


def test_the_share_of_likeliest_tokens_is_of_answers_only(llama):
    module, params = llama
    own, data = adapter(module, 1), examples()
    ids, mask = data.arrays["ids"], data.arrays["mask"]
    for place in range(3, 7):  # half the texts are what the model itself would answer
        logits = tiny.run(module, params, ids, mask, lora=zeros(own)).logits
        ids[:150, place] = np.asarray(logits)[:150, place - 1].argmax(-1)
    got = lora_scores.likeliest(module, params, own, zeros(own), data, SIZE)
    for lora, score in zip((zeros(own), own), got, strict=True):
        asked = data.check(SIZE)
        logits = np.asarray(tiny.run(module, params, asked["ids"], asked["mask"], lora=lora).logits)
        right = logits[:, :-1].argmax(-1) == asked["ids"][:, 1:]
        assert score == pytest.approx(right[:, 2:].mean())  # four answered tokens follow three
        assert score != pytest.approx(right.mean())
    assert 0.3 < got[0] < 0.8
    assert got[1] < got[0]


def log_chance(module, params, lora, batch):
    """Log-likelihood of each answer in float64."""
    ids = batch["ids"].reshape(-1, 7)
    logits = tiny.run(module, params, ids, batch["mask"].reshape(-1, 7), lora=lora).logits
    logits = np.asarray(logits, np.float64)[:, 2:-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(log_p, ids[:, 3:, None], -1).sum((1, 2)).reshape(-1, 2)


def test_pairs_are_even_at_the_start_and_counted_after(llama):
    module, params = llama
    own, start, data = adapter(module, 1), adapter(module, 2), examples(2)
    assert lora_scores.preferred(module, params, start, start, data, SIZE) == (0.5, 0.5)
    asked = data.check(SIZE)
    change = log_chance(module, params, own, asked) - log_chance(module, params, start, asked)
    wins = (change[:, 0] > change[:, 1]).mean()
    assert lora_scores.preferred(module, params, own, start, data, SIZE) == (0.5, wins)
    # with the answer that gained more put first in every pair
    full = log_chance(module, params, own, data.arrays)
    full -= log_chance(module, params, start, data.arrays)
    order = np.argsort(-full, axis=1)[..., None]
    won = {k: np.take_along_axis(v, order, 1) for k, v in data.arrays.items()}
    every = lora_data.Examples("", "", won, data.held_out)
    assert lora_scores.preferred(module, params, own, start, every, SIZE) == (0.5, 1.0)


def test_classes_that_differ_are_told_apart_and_drawn_labels_are_not():
    _, module, params = tiny.smallest("dinov2")
    lora = models.init_lora(module, jax.random.key(0), 3, ["query", "value"])
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300).astype(np.int32)
    kinds = rng.standard_normal((2, 3, 28, 28))
    pixels = kinds[labels] + 0.1 * rng.standard_normal((300, 3, 28, 28))
    arrays = {"pixels": pixels.astype(np.float32), "label": labels}
    data = lora_data.Examples("", "", arrays, np.arange(0, 300, 8))
    assert lora_scores.nearest_mean(module, params, lora, lora, data, SIZE) == (1.0, 1.0)
    chance = lora_data.Examples("", "", arrays | {"label": rng.permutation(labels)}, data.held_out)
    score, _ = lora_scores.nearest_mean(module, params, lora, lora, chance, SIZE)
    assert 0.2 < score < 0.8
