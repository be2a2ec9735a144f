import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import models, watch
from jdetune.models import Llama, LlamaConfig, generate
from jdetune.watch.steering import project_out

CONFIG = LlamaConfig(
    vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, intermediate_size=24, tie_word_embeddings=True,
)  # fmt: skip
MODULE = Llama(CONFIG)
#: Compiled as a whole: op by op takes longer.
run = partial(jax.jit, static_argnames=("module", "taps", "edit"))(models.run)


@pytest.fixture(scope="module")
def tuned():
    """Merged weights and their directions; weights are large, so that every part matters."""
    rng = np.random.default_rng(0)

    def normal(scale: float, *shape: int) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    params = {
        name: jnp.ones(shape) if len(shape) == 1 else normal(0.2, *shape)
        for name, (_, shape) in models.layout(MODULE).items()
    }
    lora = {
        path: models.Lora(normal(0.3, 2, wide), normal(0.3, out, 2))
        for path, (out, wide) in models.linear_layers(MODULE).items()
    }
    return models.merge_lora(params, lora), watch.directions(lora)


def prompts(rows=4, tokens=6, seed=0):
    return np.random.default_rng(seed).integers(0, 24, (rows, tokens)).astype(np.int32)


def test_the_projection_takes_out_exactly_the_span():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 16)).astype(np.float32)
    vectors = rng.standard_normal((5, 16))
    vectors[3] = vectors[0] + 0.02 * vectors[3]  # nearly one direction
    vectors[4] = vectors[1] - vectors[2]  # in the span of the others
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    out = np.array([[1, 0, 0, 1, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]], bool)
    found = project_out(jnp.asarray(x), jnp.asarray(vectors, jnp.float32), jnp.asarray(out))
    for row in range(3):
        chosen = vectors[out[row]]
        wanted = x[row] - x[row] @ np.linalg.pinv(chosen, rcond=1e-3) @ chosen
        np.testing.assert_allclose(found[row], wanted, atol=2e-5)  # float32, two near directions
    np.testing.assert_array_equal(found[2], x[2])


def test_steering_changes_nothing_inside_the_ranges(tuned):
    params, directions = tuned
    ids = prompts()
    wide = watch.new_monitor(directions)
    ends = {"low": jnp.full_like(wide.low, -2.0), "high": jnp.full_like(wide.low, 2.0)}
    wide = dataclasses.replace(wide, **ends, samples=jnp.full(2, 9, jnp.int32))
    plain = generate(MODULE, params, ids, new_tokens=6)
    found = watch.steer(MODULE, params, wide, ids, new_tokens=6)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    assert not np.any(found.state.out)
    out = run(MODULE, params, jnp.asarray(ids), **watch.steered(wide, 4))
    np.testing.assert_array_equal(out.logits, run(MODULE, params, jnp.asarray(ids)).logits)


def narrow(directions, layer, slot, role=None):
    """A monitor of which one direction is always outside, in one role or both."""
    monitor = watch.new_monitor(directions)
    low, high = jnp.full_like(monitor.low, -2.0), jnp.full_like(monitor.low, 2.0)
    place = (slice(None) if role is None else role, layer, slot)
    return dataclasses.replace(
        monitor, low=low.at[place].set(3.0), high=high, samples=jnp.full(2, 9, jnp.int32)
    )


def test_only_the_flagged_component_is_removed(tuned):
    params, directions = tuned
    ids, monitor = prompts(), narrow(directions, 0, 1)
    taps = ("residual",)
    plain = run(MODULE, params, jnp.asarray(ids), taps=taps).taps["residual"][1]
    out = run(MODULE, params, jnp.asarray(ids), taps=taps, **watch.steered(monitor, 4))
    vector = np.asarray(directions.vectors[0, 1])
    component = (np.asarray(plain) @ vector)[..., None] * vector
    assert np.abs(component).max() > 0.01
    np.testing.assert_allclose(out.taps["residual"][1], plain - component, atol=1e-5)
    wanted = np.zeros((4, *directions.values.shape), bool)
    wanted[:, 0, 1] = True
    np.testing.assert_array_equal(out.state.out, wanted)


def test_it_is_sticky_for_the_sequence_and_for_no_other(tuned):
    """A direction outside in the prompt alone stays out of every later token."""
    params, directions = tuned
    ids = prompts()
    seen = watch.model_extremes(MODULE, params, directions, ids, np.ones(ids.shape, bool))
    high = np.asarray(seen.high[:, 0, 0, 1])
    order = np.argsort(high)
    between = float(high[order[-1]] + high[order[-2]]) / 2
    monitor = narrow(directions, 0, 1)
    high = jnp.asarray(monitor.high).at[0, 0, 1].set(between)
    low = jnp.full_like(monitor.low, -2.0)
    monitor = dataclasses.replace(monitor, low=low, high=high, margin=jnp.float32(0.0))
    found = watch.steer(MODULE, params, monitor, ids, new_tokens=6)
    out = np.asarray(found.state.out)
    assert np.flatnonzero(out.any(axis=(1, 2))).tolist() == [order[-1]]
    vector = directions.vectors[0, 1]

    def always(x, place, state):
        here = (place.kind, place.layer) == ("residual", 1)
        return (x - (x @ vector)[..., None] * vector if here else x), state

    wanted = generate(MODULE, params, ids, new_tokens=6, edit=always).tokens
    plain = generate(MODULE, params, ids, new_tokens=6).tokens
    for row in range(4):
        same = wanted if row == order[-1] else plain
        np.testing.assert_array_equal(found.tokens[row], same[row])


@pytest.mark.slow
def test_roles_have_their_own_ranges(tuned):
    params, directions = tuned
    ids = prompts()
    prompt_only = narrow(directions, 1, 0, role=1)
    out = run(MODULE, params, jnp.asarray(ids), **watch.steered(prompt_only, 4))
    assert not np.any(out.state.out)
    made = watch.steer(MODULE, params, prompt_only, ids, new_tokens=3)
    assert np.all(made.state.out[:, 1, 0])


def test_padding_is_not_tested(tuned):
    params, directions = tuned
    ids = prompts()
    mask = np.ones(ids.shape, bool)
    seen = watch.model_extremes(MODULE, params, directions, ids, mask)
    monitor = watch.pooled(watch.fit(directions, seen, margin=1e-4))
    padded = np.concatenate([prompts(seed=5), ids], axis=1)
    left = np.concatenate([~mask, mask], axis=1)
    out = run(MODULE, params, jnp.asarray(padded), jnp.asarray(left), **watch.steered(monitor, 4))
    assert not np.any(out.state.out)


def test_a_monitor_without_answers_cannot_steer_them(tuned):
    params, directions = tuned
    ids = prompts()
    seen = watch.model_extremes(MODULE, params, directions, ids, np.ones(ids.shape, bool))
    with pytest.raises(ValueError, match="pooled"):
        watch.steer(MODULE, params, watch.fit(directions, seen), ids, new_tokens=3)
