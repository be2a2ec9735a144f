"""Fine-tunes side by side, and DP-SGD's step."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdetune.leak import diffusion, learning, tuning
from jdetune.leak.denoiser import estimate, init_lora, targets, vectors
from jdetune.leak.updates import merged, products
from tests.leak.tiny import PARAMS, PUBLIC, RECIPE, SIZE, pictures, private


def test_a_new_adapter_changes_nothing_and_an_old_one_acts_as_merged_weights():
    lora = init_lora(jax.random.key(1), targets(SIZE), 2, scaling=0.5)
    noisy, time = jnp.asarray(pictures(4)), jnp.linspace(0.1, 0.9, 4)
    context = vectors(PARAMS, jnp.zeros((4, 2), jnp.int32))
    plain = estimate(SIZE, PARAMS, None, noisy, time, context)
    np.testing.assert_array_equal(estimate(SIZE, PARAMS, lora, noisy, time, context), plain)
    keys = iter(jax.random.split(jax.random.key(2), 8))
    lora = {
        path: dataclasses.replace(p, b=jax.random.normal(next(keys), p.b.shape))
        for path, p in lora.items()
    }
    adapted = estimate(SIZE, PARAMS, lora, noisy, time, context)
    again = estimate(SIZE, merged(PARAMS, lora), None, noisy, time, context)
    assert float(jnp.abs(adapted - plain).max()) > 0.01
    np.testing.assert_allclose(adapted, again, atol=2e-5)  # sums in another order


def test_tunes_side_by_side_are_the_same_as_one_after_another():
    own = private(3)
    key = jax.random.key(5)
    together = tuning.fine_tune(RECIPE, SIZE, PARAMS, PUBLIC, own, key, at_once=3)
    apart = tuning.fine_tune(RECIPE, SIZE, PARAMS, PUBLIC, own, key, at_once=2)
    found, again = np.asarray(products(together)), np.asarray(products(apart))
    assert np.linalg.norm(found) > 0.01
    # Adam divides by small second moments: rounding differs between batch sizes
    np.testing.assert_allclose(found, again, atol=1e-3 * np.abs(found).max())
    assert np.linalg.norm(found[0] - found[1]) > 0.1 * np.linalg.norm(found[0])


def test_factors_that_are_kept_on_the_way_are_those_of_a_shorter_run():
    own, key = private(2), jax.random.key(6)
    tune = partial(tuning.fine_tune, RECIPE, SIZE, PARAMS, PUBLIC, own, key, at_once=2)
    kept, once = tune(keep=(1, 3)), tune(keep=(1,))
    for number, other in ((0, jax.tree.map(lambda x: x[0], once)), (1, tune())):
        found = products(jax.tree.map(lambda x: x[number], kept))  # noqa: B023
        np.testing.assert_array_equal(found, products(other))


def test_pictures_past_the_count_are_not_used():
    own, key = private(2), jax.random.key(7)
    own = dataclasses.replace(own, counts=jnp.array([1, 2], jnp.int32))
    noise = jnp.asarray(own.pictures).at[0, 1:].set(0.5).at[1, 2:].set(-0.5)
    other = dataclasses.replace(own, pictures=noise)
    found = [
        tuning.fine_tune(RECIPE, SIZE, PARAMS, PUBLIC, o, key, at_once=2) for o in (own, other)
    ]
    np.testing.assert_array_equal(products(found[0]), products(found[1]))


def test_dp_sgd_limits_what_one_picture_does_and_adds_the_noise_that_it_says():
    """The aggregate itself, as the recipe composes it: Adam's first moment is a tenth of it."""
    recipe = dataclasses.replace(RECIPE, noise=0.0, clip=0.001)  # far below the gradient
    own = jax.tree.map(lambda x: x[0], private(1, places=1))
    lora, state = tuning.begin(recipe, SIZE, jax.random.key(1))
    factors: Any = dict(lora)

    def aggregate(recipe, state):
        _, after = tuning.tune_step(
            recipe, SIZE, PARAMS, PUBLIC, own, lora, state, jax.random.key(2)
        )
        moments = [x for x in jax.tree.leaves(after) if getattr(x, "ndim", 0) == 1 and x.size > 9]
        return np.asarray(moments[0]) / 0.1  # optax.adam: mu = (1 - b1) g after one step

    clipped = aggregate(recipe, state)
    assert np.linalg.norm(clipped) == pytest.approx(0.001, rel=1e-3)
    loud = dataclasses.replace(recipe, noise=50.0)
    spread = (aggregate(loud, loud.optimizer(jax.random.key(3)).init(factors)) - clipped).std()
    assert spread == pytest.approx(50 * 0.001, rel=0.2)  # of a few dozen numbers


def test_dp_sgd_refuses_sets_of_several_sizes():
    own = dataclasses.replace(private(2), counts=jnp.array([1, 3], jnp.int32))
    recipe = dataclasses.replace(RECIPE, noise=1.0)
    with pytest.raises(ValueError, match="counts must all be the same"):
        tuning.fine_tune(recipe, SIZE, PARAMS, PUBLIC, own, jax.random.key(0))


def test_noise_is_what_the_picture_leaves():
    clean, noise = jnp.asarray(pictures(5, 3)), jnp.asarray(pictures(5, 4))
    time = jnp.linspace(0.05, 0.95, 5)
    angle = (0.5 * jnp.pi * time)[:, None, None]
    noisy = jnp.cos(angle) * clean + jnp.sin(angle) * noise
    np.testing.assert_allclose(diffusion.noise_of(noisy, time, clean), noise, atol=1e-5)


def test_sampling_with_a_true_estimate_ends_at_the_picture(monkeypatch):
    clean = jnp.asarray(pictures(2, 8))
    monkeypatch.setattr(diffusion, "estimate", lambda *_: clean)
    context = jnp.zeros((2, 2, 8))
    found = diffusion.sample.__wrapped__(  # pyright: ignore[reportAttributeAccessIssue]
        SIZE, PARAMS, None, jax.random.key(0), context, 6
    )
    # the last time is 0.02, where a share of sin(0.031) of the noise is left
    np.testing.assert_allclose(found, clean, atol=0.15)


def test_training_lowers_the_loss():
    training = tuning.Training(steps=60, batch=16, rare=(6, 8))
    key = jax.random.key(0)
    params = tuning.pretrain(training, SIZE, PUBLIC, key)
    words = vectors(PARAMS, PUBLIC.words)
    before = diffusion.noise_loss(SIZE, PARAMS, None, key, PUBLIC.pictures, words)
    words = vectors(params, PUBLIC.words)
    after = diffusion.noise_loss(SIZE, params, None, key, PUBLIC.pictures, words)
    assert float(jnp.mean(after)) < 0.9 * float(jnp.mean(before))


def test_one_context_a_picture_may_be_given():
    lora = tuning.fine_tune(RECIPE, SIZE, PARAMS, PUBLIC, private(2), jax.random.key(8), at_once=2)
    context = vectors(PARAMS, jnp.array([[1, 2], [3, 4]], jnp.int32))
    key = jax.random.key(9)
    once = learning.draw(SIZE, PARAMS, lora, context, 3, key)
    each = jnp.broadcast_to(context[:, None], (2, 3, *context.shape[1:]))
    np.testing.assert_allclose(learning.draw(SIZE, PARAMS, lora, each, 3, key), once, atol=1e-5)
