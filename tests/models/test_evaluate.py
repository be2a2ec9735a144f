import importlib.machinery
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import metrics, models
from jdetune.errors import InputError
from jdetune.models import evaluate, text
from tests.models import tiny

torch = tiny.torch
pytestmark = pytest.mark.interop

#: A tokenizer of letters.
LETTERS = text.Codec(
    lambda line: [3 + ord(c) % 37 for c in line], lambda ids: " ".join(map(str, ids))
)


def test_perplexity_is_exp_of_transformers_loss():
    theirs, module, params = tiny.smallest("llama")
    sequences = [tiny.token_ids(n, seed=n).tolist() for n in (9, 4, 12, 2, 6)]
    total = count = 0.0
    with torch.no_grad():
        for one in sequences:
            ids = torch.tensor([one])
            total += theirs(ids, labels=ids).loss.item() * (len(one) - 1)
            count += len(one) - 1
    found = evaluate.perplexity(module, params, sequences, size=2)
    assert found == pytest.approx(np.exp(total / count), rel=1e-5)
    assert found == pytest.approx(evaluate.perplexity(module, params, sequences, size=4), rel=1e-5)
    with pytest.raises(ValueError, match="two tokens"):
        evaluate.perplexity(module, params, [[5]])


def test_losses_count_no_padding_on_either_side():
    module, params = tiny.smallest("llama")[1:]
    ids = np.array([[0, 0, 5, 6, 7, 0, 0], [5, 6, 7, 0, 0, 0, 0], [0] * 7], np.int32)
    losses, counts = evaluate._jitted_losses(module, params, jnp.asarray(ids), jnp.asarray(ids > 0))
    assert counts.sum(axis=1).tolist() == [2, 2, 0]
    left, right = (np.asarray(losses)[row][np.asarray(counts)[row]] for row in range(2))
    tiny.close(left, right)


@pytest.mark.parametrize("kind", ["bert", "dinov2", "llama"])
def test_activation_distance_is_the_mean_over_inputs(kind):
    (theirs, module, first), (other, _, second) = (
        tiny.smallest(kind, seed=seed) for seed in (0, 1)
    )
    if kind == "dinov2":
        inputs = [np.random.default_rng(0).standard_normal((6, 3, 28, 28)).astype(np.float32)]
        pooled = [m(torch.tensor(inputs[0])).pooler_output for m in (theirs, other)]
    else:
        inputs = [tiny.token_ids((6, 6)), np.ones((6, 6), int)]
        base = [m.model if kind == "llama" else m for m in (theirs, other)]
        hidden = [m(torch.tensor(inputs[0]).long()).last_hidden_state for m in base]
        pooled = [h[:, -1] if kind == "llama" else h.mean(1) for h in hidden]
    wanted = (pooled[0] - pooled[1]).norm(dim=-1).mean().item()
    found = evaluate.activation_distance(module, first, second, *inputs, size=2)
    assert wanted > 0.1
    assert found == pytest.approx(wanted, rel=1e-5)
    assert evaluate.activation_distance(module, first, first, *inputs, size=2) == 0.0


def test_answers_do_not_depend_on_the_batch():
    module, params = tiny.smallest("llama")[1:]
    prompts = ["abc", "a longer one", "z", "and one more"]
    every = evaluate.answers(module, params, LETTERS, prompts, new_tokens=5)
    assert len(set(every)) > 1
    for prompt, answer in zip(prompts, every, strict=True):
        ids = np.array([LETTERS.encode(prompt)] * 4, np.int32)
        alone = models.generate(module, params, ids, new_tokens=5).tokens[0]
        assert answer == LETTERS.decode(alone.tolist())


def test_models_answer_side_by_side():
    module, base = tiny.smallest("llama")[1:]
    _, tuned = tiny.smallest("llama", seed=1)[1:]
    prompts = ["abc", "what now", "z", "y"]
    weights = {"base": base, "tuned": tuned, "recovered": dict(base)}
    rows = evaluate.side_by_side(module, weights, LETTERS, prompts, new_tokens=5)
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:
        assert row["recovered"] == row["base"] != row["tuned"]


def test_unequal_numbers_of_texts_are_refused():
    with pytest.raises(ValueError, match="2 texts cannot be paired with 1"):
        evaluate.text_log_cosine(lambda _texts: np.zeros((1, 1)), ["a", "b"], ["c"])


def test_lpips_says_what_is_missing(monkeypatch, tmp_path):
    images = np.zeros((1, 3, 64, 64), np.float32)
    with pytest.raises(ValueError, match="net is alex"):
        evaluate.lpips_distance(images, images, "resnet")
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match="pip install lpips"):
        evaluate.lpips_distance(images, images)
    monkeypatch.undo()
    stub = types.ModuleType("lpips")
    stub.__spec__ = importlib.machinery.ModuleSpec("lpips", None)
    monkeypatch.setitem(sys.modules, "lpips", stub)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError, match=r"alexnet-owt-\*.pth"):
        evaluate.lpips_distance(images, images)


def test_batches_are_padded_on_the_side_asked_for():
    ids, mask = text.pad_batch([[1, 2], [3]], left=True, rows=3, bucket=4)
    assert ids.tolist() == [[0, 0, 1, 2], [0, 0, 0, 3], [0, 0, 0, 0]]
    assert mask.tolist() == [[False, False, True, True], [False] * 3 + [True], [False] * 4]
    assert text.pad_batch([[1, 2], [3]], bucket=1)[0].tolist() == [[1, 2], [3, 0]]
    assert text.pad_batch([[1] * 17])[0].shape == (1, 32)


def test_a_missing_tokenizer_is_named(monkeypatch, tmp_path):
    with pytest.raises(InputError, match=r"tokenizer.json: no such file"):
        text.load_codec(tmp_path)
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match="pip install tokenizers"):
        text.load_codec(tmp_path)


def test_log_cosine_of_texts_is_that_of_their_embeddings():
    rng = np.random.default_rng(0)
    vectors = {name: rng.standard_normal(8).astype(np.float32) for name in "abcd"}
    encoder = lambda texts: np.stack([vectors[t] for t in texts])  # noqa: E731
    found = evaluate.text_log_cosine(encoder, ["a", "b"], ["c", "d"])
    cosines = [metrics.cosine(vectors[x], vectors[y]) for x, y in ("ac", "bd")]
    assert found == pytest.approx(np.mean(np.log10(1 - np.array(cosines))), abs=1e-6)
