"""Many adapters trained at once are those that PyTorch and PEFT train one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import fit_loras
from jdetune import models
from jdetune.models import evaluate
from tests.models import tiny

torch = tiny.torch
pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's own
]

STEPS, TARGETS = 4, ["q_proj", "v_proj"]
RECIPE = fit_loras.Recipe(STEPS, lr=3e-3, weight_decay=1.0, clip=0.1)  # so that each shows


def by_peft(adapter, batches):
    """Factors and losses after PEFT's training on one adapter's batches."""
    peft = pytest.importorskip("peft")
    theirs = tiny.theirs("llama", num_hidden_layers=1)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(theirs, config).eval()
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, weight in weights.items():
            path = name.removeprefix("base_model.model.").partition(".lora_")[0]
            part = "a" if "lora_A" in name else "b"
            weight.copy_(torch.tensor(np.array(getattr(adapter[path], part))))
    optimizer = torch.optim.AdamW(weights.values(), lr=RECIPE.lr, weight_decay=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    losses = []
    for batch in batches:
        ids = torch.tensor(batch).long()
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), RECIPE.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return weights, losses


def test_many_at_once_are_what_peft_trains_one_by_one():
    _, module, params = tiny.smallest("llama")
    keys = jax.random.split(jax.random.key(0), 2)
    adapters = [models.init_lora(module, key, 3, TARGETS, 2.0) for key in keys]
    ids = tiny.token_ids((STEPS, 2, 3, 7))  # step, adapter, batch, token

    def loss(lora, batch, weights):
        losses, counts = evaluate.token_losses(module, weights, batch, lora=lora)
        return jnp.sum(losses) / jnp.sum(counts, dtype=jnp.float32)

    trained = models.stack_adapters(adapters)
    state, losses = fit_loras.start(RECIPE, trained), []
    for part in (ids[:2], ids[2:]):  # in two chunks, as a run that reports and resumes does it
        trained, state, values = fit_loras.advance(
            RECIPE, loss, trained, state, jnp.asarray(part), params
        )
        losses.append(np.asarray(values))
    for index, adapter in enumerate(adapters):
        weights, wanted = by_peft(adapter, ids[:, index])
        np.testing.assert_allclose(np.concatenate(losses)[:, index], wanted, rtol=1e-4)
        for name, weight in weights.items():
            path = name.removeprefix("base_model.model.").partition(".lora_")[0]
            part = "a" if "lora_A" in name else "b"
            before = np.asarray(getattr(adapter[path], part))
            moved = weight.detach().numpy() - before
            assert np.abs(moved).max() > 1e-3
            # AdamW divides by the gradient's size: where it is near zero, rounding decides
            got = np.asarray(getattr(trained[path], part)[index]) - before
            np.testing.assert_allclose(got, moved, atol=2e-4)
