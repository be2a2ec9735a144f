import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import models
from tests.models import tiny

torch = tiny.torch
pytestmark = pytest.mark.interop

IDS, MASK, PIXELS = tiny.IDS, tiny.MASK[:, ::-1].copy(), tiny.PIXELS
#: With all of them one program serves several tests.
TAPS = ("residual", "attention", "mlp", "sum")
#: Modules of transformers whose outputs "attention" and "mlp" are.
WRITERS = {
    "bert": ("attention.output.dense", "output.dense"),
    "vit": ("attention.o_proj", "mlp.fc2"),
    "dinov2": ("attention.o_proj", "mlp.fc2"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
}


def inputs(kind):
    return PIXELS if kind in ("vit", "dinov2") else IDS


def recorded(theirs, kind):
    """What transformers' own modules put out, [layer, batch, token, width] by kind."""
    found = {"attention": [], "mlp": []}
    handles = []
    for name, part in theirs.named_modules():
        for tap, suffix in zip(found, WRITERS[kind], strict=True):
            plain = name.endswith(suffix) and not (
                tap == "mlp" and kind == "bert" and name.endswith("attention.output.dense")
            )
            if plain:
                hook = lambda _m, _i, out, tap=tap: found[tap].append(out.detach().numpy())  # noqa: E731
                handles.append(part.register_forward_hook(hook))
    x = torch.tensor(inputs(kind))
    out = theirs(x if x.is_floating_point() else x.long(), output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return {tap: np.stack(values) for tap, values in found.items()}, out.hidden_states


@pytest.mark.parametrize("kind", WRITERS)
def test_taps_equal_what_transformers_hooks_see(kind):
    theirs = tiny.theirs(kind)
    module, params = tiny.ours(theirs)
    out = tiny.run(module, params, jnp.asarray(inputs(kind)), taps=TAPS)
    wanted, hidden = recorded(theirs, kind)
    assert wanted["mlp"].shape[0] == 2
    tiny.close(out.taps["attention"], wanted["attention"])
    tiny.close(out.taps["mlp"], wanted["mlp"])
    assert len(hidden) == len(out.taps["residual"]) == 3
    for layer, states in enumerate(hidden[:-1]):
        tiny.close(out.taps["residual"][layer], states)
    if kind != "llama":
        tiny.close(out.taps["residual"][-1], hidden[-1])
    else:
        tiny.close(out.hidden, hidden[-1])  # transformers gives the normed one


def test_berts_sum_is_what_the_last_norm_is_given():
    module, params = tiny.ours(tiny.theirs("bert"))
    out = tiny.run(module, params, jnp.asarray(IDS), taps=TAPS)
    total = np.asarray(out.taps["sum"])
    centred = total - total.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    for layer in range(2):
        scale, shift = (
            params[f"encoder.layer.{layer}.output.LayerNorm.{part}"] for part in ("weight", "bias")
        )
        tiny.close(normed[layer] * scale + shift, out.taps["residual"][layer + 1])


def test_without_taps_nothing_is_kept():
    module, params = tiny.ours(tiny.theirs("llama"))
    assert tiny.run(module, params, jnp.asarray(IDS)).taps == {}
    with pytest.raises(ValueError, match="taps are of"):
        tiny.run(module, params, jnp.asarray(IDS), taps=("logits",))


def project(x, place, direction):
    """Takes one direction out of the residual stream after the first block."""
    if (place.kind, place.layer) != ("residual", 1):
        return x, direction
    return x - jnp.sum(x * direction, axis=-1, keepdims=True) * direction, direction


def test_an_edit_does_what_transformers_hook_does():
    theirs, module, params = tiny.smallest("llama")
    direction = np.random.default_rng(1).standard_normal(32).astype(np.float32)
    direction /= np.linalg.norm(direction)
    unit = torch.tensor(direction)

    def hook(_module, _inputs, out):
        return out - (out @ unit)[..., None] * unit

    handle = theirs.model.layers[0].register_forward_hook(hook)
    wanted = theirs(torch.tensor(IDS).long()).logits
    tokens = theirs.generate(
        torch.tensor(IDS).long(), max_new_tokens=8, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[:, 7:]  # fmt: skip
    handle.remove()
    options = {"edit": project, "state": jnp.asarray(direction)}
    out = tiny.run(module, params, jnp.asarray(IDS), taps=("residual",), **options)
    tiny.close(out.logits, wanted)
    left = np.asarray(out.taps["residual"][1]) @ direction
    assert np.abs(left).max() < 1e-5  # float32 rounding of values of size ten
    plain = theirs(torch.tensor(IDS).long()).logits
    assert (plain - wanted).abs().max() > 0.01
    steered = models.generate(module, params, IDS, new_tokens=8, **options)
    np.testing.assert_array_equal(steered.tokens, tokens.numpy())
    free = theirs.generate(torch.tensor(IDS).long(), max_new_tokens=8, do_sample=False)
    assert np.any(free[:, 7:].numpy() != tokens.numpy()[:, : free.shape[1] - 7])


def count(x, place, seen):
    """Counts valid tokens that pass the end of the first block, prompt and answer apart."""
    if (place.kind, place.layer) == ("residual", 1):
        part = "answer" if place.answer else "prompt"
        seen = {**seen, part: seen[part] + jnp.sum(place.valid, axis=1, dtype=jnp.int32)}
    return x, seen


def test_state_goes_through_layers_and_steps():
    theirs, module, params = tiny.smallest("llama")
    zero = jnp.zeros(3, jnp.int32)
    state = {"prompt": zero, "answer": zero}
    made = models.generate(module, params, IDS, MASK, new_tokens=5, edit=count, state=state)
    assert made.state["prompt"].tolist() == MASK.sum(1).tolist()
    assert made.state["answer"].tolist() == [4] * 3  # the last token is never read
    wanted = theirs.generate(
        torch.tensor(IDS).long(), attention_mask=torch.tensor(MASK), max_new_tokens=5,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )[:, 7:]  # fmt: skip
    np.testing.assert_array_equal(made.tokens, wanted.numpy())


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["llama", pytest.param("bert", marks=SLOW), pytest.param("dinov2", marks=SLOW)]
)
def test_remat_changes_nothing_but_the_memory(kind):
    _, module, params = tiny.smallest(kind)
    again = dataclasses.replace(module, remat=True, parent=None)
    x = jnp.asarray(inputs(kind))

    def loss(weights, m):
        options = {"taps": ("mlp",), "edit": lambda v, _p, s: (v, s + 1), "state": 0}
        out = models.run(m, weights, x, **options)
        return jnp.sum(jnp.square(out.hidden[:, -1])) + jnp.mean(out.taps["mlp"])

    plain, kept = (jax.jit(jax.grad(loss), static_argnums=1)(params, m) for m in (module, again))
    assert "remat" in str(jax.make_jaxpr(loss, static_argnums=1)(params, again))
    for name in plain:
        np.testing.assert_allclose(plain[name], kept[name], rtol=1e-4, atol=1e-4)
    assert models.layout(again) == models.layout(module)
