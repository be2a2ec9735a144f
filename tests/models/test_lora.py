import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import models
from jdetune.checkpoint import open_checkpoint, write_adapter
from jdetune.errors import InputError
from tests.models import tiny

torch = tiny.torch
pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's own
]

IDS, PIXELS = tiny.IDS, tiny.PIXELS


def inputs(kind):
    return jnp.asarray(PIXELS if kind in ("vit", "dinov2") else IDS)


def adapter(module, seed=0, rank=3, targets=None, scaling=0.5):
    """Factors of which none is zero."""
    found = models.init_lora(module, jax.random.key(seed), rank, targets, scaling)
    keys = jax.random.split(jax.random.key(seed + 100), len(found))
    return {
        path: models.Lora(pair.a, 0.2 * jax.random.normal(key, pair.b.shape), pair.scaling)
        for key, (path, pair) in zip(keys, found.items(), strict=True)
    }


SLOW = pytest.mark.slow


@pytest.mark.parametrize("kind", ["bert", "dinov2", "llama", pytest.param("vit", marks=SLOW)])
def test_overlay_equals_merged_weights(kind):
    _, module, params = tiny.smallest(kind)
    lora = adapter(module)
    assert len(lora) >= 6  # every linear layer
    over = tiny.run(module, params, inputs(kind), lora=lora)
    merged, plain = (
        tiny.run(module, weights, inputs(kind))
        for weights in (models.merge_lora(params, lora), params)
    )
    tiny.close(over.hidden, merged.hidden, 1e-4)
    assert np.abs(np.asarray(plain.hidden - over.hidden)).max() > 0.1
    if kind == "llama":  # the head, too
        assert "lm_head" in lora
        tiny.close(over.logits, merged.logits, 1e-4)


def test_a_tied_head_takes_no_lora():
    module, params = tiny.ours(tiny.theirs("llama", tie_word_embeddings=True))
    assert "lm_head" not in models.linear_layers(module)
    assert "model.embed_tokens" not in models.linear_layers(module)


def test_new_factors_change_nothing_and_are_drawn_as_peft_draws_them():
    module, params = tiny.smallest("llama")[1:]
    lora = models.init_lora(module, jax.random.key(0), 4, ["q_proj", "v_proj"])
    assert sorted(lora) == sorted(
        f"model.layers.{i}.self_attn.{part}_proj" for i in range(1) for part in "qv"
    )
    plain = tiny.run(module, params, inputs("llama")).logits
    np.testing.assert_array_equal(
        tiny.run(module, params, inputs("llama"), lora=lora).logits, plain
    )
    every = np.concatenate([np.ravel(pair.a) for pair in lora.values()])
    assert np.abs(every).max() <= 32**-0.5
    # standard deviation of a uniform one; 512 draws tell it to 2 percent
    assert np.std(every) == pytest.approx((32 * 3) ** -0.5, rel=0.1)


def test_vmap_over_adapters_equals_a_loop():
    module, params = tiny.smallest("llama")[1:]
    adapters = [adapter(module, seed, targets=["q_proj", "down_proj"]) for seed in range(3)]
    stacked = models.stack_adapters(adapters)
    run = lambda lora, ids: tiny.run(module, params, ids, lora=lora).logits  # noqa: E731
    many = jax.jit(jax.vmap(run, in_axes=(0, None)))(stacked, inputs("llama"))
    assert many.shape == (3, 3, 7, 40)
    for one, logits in zip(adapters, many, strict=True):
        tiny.close(logits, run(one, inputs("llama")))


def test_stacking_pads_ranks_and_folds_scalings():
    module, params = tiny.smallest("bert")[1:]
    adapters = [
        adapter(module, 0, 2, ["query"], 0.5),
        adapter(module, 1, 5, ["query"], 2.0),
    ]
    stacked = models.stack_adapters(adapters)
    assert {pair.scaling for pair in stacked.values()} == {1.0}
    assert {pair.a.shape for pair in stacked.values()} == {(2, 5, 32)}
    for row, one in enumerate(adapters):
        alone = jax.tree.map(lambda x, row=row: x[row], stacked)
        out = tiny.run(module, params, inputs("bert"), lora=alone).hidden
        tiny.close(out, tiny.run(module, params, inputs("bert"), lora=one).hidden)
    with pytest.raises(InputError, match="different layers"):
        models.stack_adapters([adapters[0], adapter(module, targets=["key"])])


def test_gradients_flow_to_the_factors_alone():
    module, params = tiny.smallest("llama")[1:]
    lora = models.init_lora(module, jax.random.key(0), 2, ["q_proj", "o_proj"])

    def loss(factors):
        return jnp.mean(jnp.square(tiny.run(module, params, inputs("llama"), lora=factors).logits))

    gradient = jax.grad(loss)(lora)
    assert set(gradient) == set(lora)
    assert all(np.any(pair.b) for pair in gradient.values())
    assert not any(np.any(pair.a) for pair in gradient.values())  # B is zero at first
    step = jax.tree.map(lambda x, g: x - 0.05 * g, lora, gradient)
    assert loss(step) < loss(lora)
    # the derivative by one entry of B, by finite differences
    path = "model.layers.0.self_attn.o_proj"
    nudge = 0.05
    losses = [
        loss({**lora, path: models.Lora(lora[path].a, lora[path].b.at[3, 1].add(h))})
        for h in (nudge, -nudge)
    ]
    slope = float(losses[0] - losses[1]) / (2 * nudge)
    assert float(gradient[path].b[3, 1]) == pytest.approx(slope, rel=0.02, abs=1e-4)


def test_factors_that_do_not_fit_are_refused():
    module, params = tiny.smallest("llama")[1:]
    lora = adapter(module, targets=["q_proj"])
    pair = lora["model.layers.0.self_attn.q_proj"]
    for path, bad, message in [
        ("model.layers.7.self_attn.q_proj", pair, "no linear layer of Llama has this name"),
        ("model.embed_tokens", pair, "no linear layer"),
        ("model.layers.0.self_attn.k_proj", pair, r"do not fit the weight \[16, 32\]"),
    ]:
        with pytest.raises(InputError, match=message):
            tiny.run(module, params, inputs("llama"), lora={path: bad})
    with pytest.raises(InputError, match="no linear layer of Llama is a target"):
        models.linear_layers(module, ["query"])


@pytest.mark.parametrize(
    "kind", ["dinov2", pytest.param("bert", marks=SLOW), pytest.param("vit", marks=SLOW)]
)
def test_adapters_that_peft_trained_are_read(kind, tmp_path):
    peft = pytest.importorskip("peft")
    theirs, module, params = tiny.smallest(kind)
    targets = ["query", "value"] if kind == "bert" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)
    wrapped = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.2 * torch.randn_like(weight))
    wrapped.save_pretrained(tmp_path)
    lora = models.load_lora(module, tmp_path)
    assert {pair.scaling for pair in lora.values()} == {2.0}
    x = torch.tensor(np.asarray(inputs(kind)))
    wanted = wrapped(x if x.is_floating_point() else x.long()).last_hidden_state
    tiny.close(tiny.run(module, params, inputs(kind), lora=lora).hidden, wanted)


def test_adapters_that_jdetune_wrote_are_read(tmp_path):
    theirs = tiny.theirs("llama")
    module, params = tiny.ours(theirs)
    checkpoint = open_checkpoint(tiny.save(theirs, tmp_path / "model"))
    lora = adapter(module, targets=["q_proj", "down_proj"], scaling=1.0)
    factors = {f"{p}.weight": (np.asarray(v.b), np.asarray(v.a)) for p, v in lora.items()}
    write_adapter(tmp_path / "adapter", factors, checkpoint)
    read = models.load_lora(module, tmp_path / "adapter")
    assert set(read) == set(lora)
    for path, pair in lora.items():
        np.testing.assert_array_equal(read[path].a, pair.a)
        np.testing.assert_array_equal(read[path].b, pair.b)
    write_adapter(tmp_path / "head", factors, checkpoint, per_model=("lm_head.weight",))
    with pytest.raises(InputError, match="modules_to_save"):
        models.load_lora(module, tmp_path / "head")
