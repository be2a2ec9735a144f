"""Losses of the adapters beside NumPy's: preferences, answers, classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import lora_losses
from jdetune import models
from tests.models import tiny

pytestmark = pytest.mark.interop

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def llama():
    return tiny.smallest("llama")[1:]


def adapter(module, seed, size=0.3):
    """Factors whose update is not zero."""
    drawn = models.init_lora(module, jax.random.key(seed), 3, TARGETS)
    rng = np.random.default_rng(seed)
    moved = {
        path: models.Lora(f.a, jnp.asarray(size * rng.standard_normal(f.b.shape), jnp.float32))
        for path, f in drawn.items()
    }
    return {"lora": moved}


def chat(*lead):
    """Questions of three tokens, answers of two to four, padding after."""
    ids = tiny.token_ids((*lead, 7), seed=3)
    lengths = np.random.default_rng(4).integers(5, 8, lead)[..., None]
    mask = np.arange(7) < lengths
    return {"ids": ids, "mask": mask, "answered": mask & (np.arange(7) >= 3)}


def log_chances(module, params, lora, batch):
    """log p of each token after those before it, [..., token - 1], in float64."""
    ids = batch["ids"].reshape(-1, 7)
    logits = tiny.run(module, params, ids, batch["mask"].reshape(-1, 7), lora=lora).logits
    logits = np.asarray(logits, np.float64)[:, :-1]
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return np.take_along_axis(log_p, ids[:, 1:, None], -1)[..., 0].reshape(
        *batch["ids"].shape[:-1], 6
    )


def test_preferences_are_those_of_the_paper(llama):
    module, params = llama
    policy, before = adapter(module, 1), adapter(module, 2)
    batch = chat(4, 2)

    def total(one):
        chances = log_chances(module, params, one["lora"], batch)
        return np.where(batch["answered"][..., 1:], chances, 0).sum(-1)

    p, q = total(policy), total(before)
    better, worse = p[:, 0] - q[:, 0], p[:, 1] - q[:, 1]
    wanted = np.mean(np.log1p(np.exp(-0.1 * (better - worse))))
    stacked = jax.tree.map(lambda x: x[None], (before["lora"], batch))
    given = lora_losses.reference(module, params, *stacked)
    np.testing.assert_allclose(given["reference"][0], q, rtol=1e-4)
    got = jax.jit(lora_losses.preferences, static_argnums=0)(
        module, policy, batch | {"reference": given["reference"][0]}, params
    )
    assert abs(wanted - np.log(2)) > 0.01  # else the reference alone would pass
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_preferences_start_at_log_two(llama):
    module, params = llama
    loras = models.stack_adapters([adapter(module, seed)["lora"] for seed in (1, 2)])
    batch = lora_losses.reference(module, params, loras, chat(2, 4, 2))
    loss = lora_losses.loss_of("dpo", module)
    got = lora_losses.every(loss, {"lora": loras}, batch, params)
    np.testing.assert_allclose(got, np.log(2), rtol=1e-5)


def test_answers_count_and_questions_do_not(llama):
    module, params = llama
    own, batch = adapter(module, 1), chat(4)
    chances = log_chances(module, params, own["lora"], batch)
    wanted = -chances[batch["answered"][:, 1:]].mean()
    whole = -chances[batch["mask"][:, 1:]].mean()
    assert abs(wanted - whole) > 0.01  # the question's tokens would show
    got = jax.jit(lora_losses.answers, static_argnums=0)(module, own, batch, params)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "dinov2"])
def test_classes_are_named_by_the_head(kind):
    _, module, params = tiny.smallest(kind)
    drawn = models.init_lora(module, jax.random.key(0), 3, ["query", "value"])
    heads = jax.tree.map(lambda x: x[0], lora_losses.first_heads(2, 32, 5))
    if kind == "bert":
        batch = {"ids": tiny.IDS, "mask": tiny.MASK, "label": np.array([0, 3, 4], np.int32)}
        hidden = tiny.run(module, params, tiny.IDS, tiny.MASK).hidden
        share = tiny.MASK / tiny.MASK.sum(1, keepdims=True)
        vectors = np.einsum("btw,bt->bw", np.asarray(hidden), share)
    else:
        batch = {"pixels": tiny.PIXELS, "label": np.array([0, 3], np.int32)}
        vectors = np.asarray(tiny.run(module, params, tiny.PIXELS).hidden)[:, 0]
    logits = vectors.astype(np.float64) @ np.asarray(heads["weight"]) + np.asarray(heads["bias"])
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    wanted = -log_p[np.arange(len(log_p)), batch["label"]].mean()
    trained = {"lora": drawn, "head": heads}
    got = jax.jit(lora_losses.classes, static_argnums=0)(module, trained, batch, params)
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_one_module_has_one_loss_function(llama):
    module, _ = llama
    assert lora_losses.loss_of("sft", module) is lora_losses.loss_of("sft", module)
    assert lora_losses.loss_of("sft", module) is not lora_losses.loss_of("dpo", module)
