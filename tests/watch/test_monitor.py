import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import watch
from jdetune.watch.monitor import Extremes, cosines

RNG = np.random.default_rng(0)
WIDTH, LAYERS, SLOTS = 16, 2, 3


def some_directions(seed=0):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((LAYERS, SLOTS, WIDTH))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    values = np.ones((LAYERS, SLOTS))
    vectors[1, 2], values[1, 2] = 0, 0
    return watch.Directions(
        jnp.asarray(vectors, jnp.float32),
        jnp.asarray(values, jnp.float32),
        (("residual", 1), ("residual", 2)),
        (("attention", 0), ("attention", 1), ("mlp", 0)),
    )


def batch(samples=20, tokens=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, tokens, LAYERS, WIDTH)).astype(np.float32)
    valid = np.arange(tokens) < rng.integers(2, tokens + 1, samples)[:, None]
    answer = np.arange(tokens)[None] >= 2
    return x, valid, np.broadcast_to(answer, valid.shape)


def by_hand(directions, x, valid, answer):
    """Loops of NumPy in float64."""
    vectors = np.asarray(directions.vectors, np.float64)
    cos = np.einsum("btlw,lsw->btls", x, vectors) / np.linalg.norm(x, axis=-1)[..., None]
    low = np.full((len(x), 2, LAYERS, SLOTS), np.inf)
    high = -low
    for sample, token in np.argwhere(valid):
        role = int(answer[sample, token])
        for layer, slot in np.argwhere(np.asarray(directions.valid)):
            c = cos[sample, token, layer, slot]
            low[sample, role, layer, slot] = min(low[sample, role, layer, slot], c)
            high[sample, role, layer, slot] = max(high[sample, role, layer, slot], c)
    return low, high


def test_extremes_equal_loops_and_leave_padding_out():
    directions, (x, valid, answer) = some_directions(), batch()
    x[~valid] = 1e6 * np.asarray(directions.vectors[:, 0])  # as far out as can be
    found = watch.extremes(directions, x, valid, answer)
    low, high = by_hand(directions, x, valid, answer)
    np.testing.assert_allclose(found.low, low, atol=1e-5)
    np.testing.assert_allclose(found.high, high, atol=1e-5)
    assert np.all(np.isinf(found.low[:, :, 1, 2]))
    alone = watch.extremes(directions, x, valid)
    assert np.all(np.isinf(np.asarray(alone.low[:, 1])))


def test_streaming_equals_one_input_after_another():
    directions, (x, valid, answer) = some_directions(), batch(40)
    seen = watch.extremes(directions, x, valid, answer)
    monitor, flagged = watch.observe(watch.new_monitor(directions), seen)
    low, high = by_hand(directions, x, valid, answer)
    least, most = np.full(low.shape[1:], np.inf), np.full(low.shape[1:], -np.inf)
    wanted = []
    for a, b in zip(low, high, strict=True):
        there = (b >= a) & (most >= least)
        wanted.append(bool(np.any(there & ((b > most + 0.01) | (a < least - 0.01)))))
        least, most = np.minimum(least, a), np.maximum(most, b)
    assert flagged.tolist() == wanted
    assert sum(wanted) > 3
    np.testing.assert_allclose(monitor.high, most, atol=1e-5)
    np.testing.assert_allclose(monitor.low, least, atol=1e-5)
    assert int(monitor.alarms) == sum(wanted)
    assert int(monitor.tested) == 39
    first, one = watch.observe(watch.new_monitor(directions), seen[:15])
    second, two = watch.observe(first, seen[15:])
    np.testing.assert_array_equal(second.high, monitor.high)
    assert [*one.tolist(), *two.tolist()] == wanted
    assert int(second.alarms) == int(monitor.alarms)
    assert second.samples.tolist() == [40, int(np.sum(np.any(valid & answer, axis=1)))]


def planted(x, directions, strength, layer=0, slot=1):
    x = x.copy()
    length = np.linalg.norm(x[:, 1, layer], axis=-1, keepdims=True)
    x[:, 1, layer] += strength * length * np.asarray(directions.vectors[layer, slot])
    return x


def test_a_planted_direction_is_found():
    directions, (x, valid, answer) = some_directions(), batch(400)
    monitor = watch.fit(directions, watch.extremes(directions, x, valid, answer))
    new, valid, answer = batch(50, seed=1)
    clean = watch.flag(monitor, watch.extremes(directions, new, valid, answer))
    there = planted(new, directions, 3.0)
    found = watch.flag(monitor, watch.extremes(directions, there, valid, answer))
    assert np.mean(found) > 0.95
    assert np.mean(clean) < 0.2  # the bound is 2 * 5 * 2 / 400 for both roles together
    fired = watch.firings(monitor, there, valid, answer)
    first = {f.sample: f for f in reversed(fired)}
    hits = [f for f in first.values() if (f.layer, f.slot, f.token, f.role) == (0, 1, 1, "user")]
    assert len(hits) > 45
    assert hits[0].direction == "attention 0 #1"
    assert {f.sample for f in fired} == set(np.flatnonzero(found).tolist())


def test_both_ends_are_watched_and_the_margin_counts():
    directions, (x, valid, answer) = some_directions(), batch()
    seen = watch.extremes(directions, x, valid, answer)
    monitor = watch.fit(directions, seen)
    top = float(monitor.high[0, 0, 1])
    for shift, flagged in ((0.009, False), (0.011, True)):
        high = jnp.full_like(monitor.high, -jnp.inf).at[0, 0, 1].set(top + shift)
        one = Extremes(jnp.where(high > -jnp.inf, high, jnp.inf)[None], high[None])
        assert bool(watch.flag(monitor, one)[0]) is flagged
        mirrored = dataclasses.replace(monitor, low=-monitor.high, high=-monitor.low)
        other = Extremes(-one.high, -one.low)
        assert bool(watch.flag(mirrored, other)[0]) is flagged


def test_a_role_that_was_never_seen_is_outside():
    directions, (x, valid, _) = some_directions(), batch()
    monitor = watch.fit(directions, watch.extremes(directions, x, valid))
    assert monitor.samples.tolist() == [20, 0]
    assert np.all(watch.flag(monitor, watch.extremes(directions, x, valid, valid)))
    both = watch.pooled(monitor)
    assert not np.any(watch.flag(both, watch.extremes(directions, x, valid, valid)))


def test_cosines_are_of_the_raw_activations():
    directions, (x, _, _) = some_directions(), batch(2)
    x[0, 0, 0] = 5 * np.asarray(directions.vectors[0, 2])
    x[0, 1, 0] = -x[0, 0, 0]
    found = cosines(directions, x)
    np.testing.assert_allclose(found[0, :2, 0, 2], [1, -1], atol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    directions, (x, valid, _) = some_directions(), batch(2)
    with pytest.raises(Exception, match=r"[Ll]ayer|shape|type"):
        watch.extremes(directions, x[:, :, :1], valid)
    with pytest.raises(ValueError, match="margin"):
        watch.new_monitor(directions, -1.0)


def test_save_and_load(tmp_path):
    directions, (x, valid, answer) = some_directions(), batch(40)
    monitor = watch.calibrate(directions, watch.extremes(directions, x, valid, answer)).monitor
    path = tmp_path / "monitor.safetensors"
    watch.save_monitor(path, monitor)
    again = watch.load_monitor(path)
    assert again.directions.places == directions.places
    assert again.directions.slots == directions.slots
    for field in ("low", "high", "samples", "left_out", "tested", "alarms", "margin"):
        np.testing.assert_array_equal(getattr(again, field), getattr(monitor, field))
    np.testing.assert_array_equal(again.directions.vectors, directions.vectors)
    seen = watch.extremes(again.directions, *batch(9, seed=2))
    np.testing.assert_array_equal(watch.flag(again, seen), watch.flag(monitor, seen))


def test_other_files_are_no_monitor(tmp_path):
    from jdetune.checkpoint import save_safetensors
    from jdetune.errors import InputError

    save_safetensors(tmp_path / "a.safetensors", {"low": np.zeros(3, np.float32)})
    with pytest.raises(InputError, match="is no monitor"):
        watch.load_monitor(tmp_path / "a.safetensors")
    path = tmp_path / "b.safetensors"
    about = {"format": "jdetune.monitor/1", "jdetune": '{"places": [], "slots": []}'}
    save_safetensors(path, {"low": np.zeros(3, np.float32)}, about)
    with pytest.raises(InputError, match="lacks vectors"):
        watch.load_monitor(path)
