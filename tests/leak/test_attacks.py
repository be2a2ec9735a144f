"""Attacks see B A and nothing else; regression, encoder, scores, defences, by-products."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdetune.errors import InputError
from jdetune.leak import (
    byproducts,
    captions,
    defences,
    encoder,
    learning,
    recogniser,
    ridge,
    scoring,
    tuning,
)
from jdetune.leak.updates import factored, products
from jdetune.models.layers import Lora
from tests.leak.tiny import PARAMS, PUBLIC, RECIPE, SIZE, pictures, private


def adapters(tunes, rank=2, seed=0, scaling=1.0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        f"layer.{i}.q": Lora(draw(tunes, rank, 8), draw(tunes, 8, rank), scaling) for i in range(3)
    }


def test_refactored_factors_change_neither_products_nor_regression_nor_the_encoders_input():
    lora, wanted = adapters(12), np.random.default_rng(1).standard_normal((12, 5))
    other = defences.refactored(lora, jax.random.key(3))
    apart = max(
        float(jnp.abs(lora[p].a - other[p].a).max()) for p in lora
    )  # the factors themselves do change
    assert apart > 0.5
    before, after = np.asarray(products(lora)), np.asarray(products(other))
    scale = np.abs(before).max()
    # Q is up to a few hundred in condition: float32 products keep three digits at the least
    np.testing.assert_allclose(after, before, atol=1e-3 * scale)
    fitted = ridge.fit(before, wanted)
    np.testing.assert_allclose(
        ridge.predict(fitted, after), ridge.predict(fitted, before), atol=1e-2
    )
    for reads, gauge_free in (("product", True), ("factors", False)):
        reader = encoder.Reader(4, 1, 2, reads, samples=False)  # pyright: ignore[reportArgumentType]
        pick = lambda tree: jax.tree.map(lambda x: x[0], tree)  # noqa: E731
        weights = encoder.init_encoder(reader, SIZE, jax.random.key(0), pick(lora))
        start, key = jax.tree.map(jnp.zeros_like, lora), jax.random.key(1)
        contexts = [
            encoder.contexts_of(reader, SIZE, weights, one, start, jnp.float32(3), key)
            for one in (lora, other)
        ]
        same = bool(jnp.allclose(*contexts, atol=2e-2))
        assert same == gauge_free


def test_ridge_is_the_textbook_formula_and_its_left_out_error_is_the_honest_one():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((14, 1, 3, 2)).astype(np.float32)
    y = rng.standard_normal((14, 2))
    fitted = ridge.fit(x, y)
    f = ridge.features(x).astype(np.float64)
    mean, centre = y.mean(axis=0), f.mean(axis=0)
    gram = np.matmul(f - centre, (f - centre).T)
    dual = np.linalg.solve(gram + fitted.strength * np.eye(14), y - mean)
    unseen = rng.standard_normal((3, 1, 3, 2)).astype(np.float32)
    kernel = np.matmul(ridge.features(unseen) - centre, (f - centre).T)
    np.testing.assert_allclose(
        ridge.predict(fitted, unseen), mean + np.matmul(kernel, dual), rtol=1e-4, atol=1e-5
    )
    errors = []
    for i in range(14):  # centres kept, as the closed form does
        rest = np.delete(np.arange(14), i)
        own = gram[np.ix_(rest, rest)] + fitted.strength * np.eye(13)
        guess = np.matmul(gram[i, rest], np.linalg.solve(own, (y - mean)[rest]))
        errors.append((guess - (y - mean)[i]) ** 2)
    expected = np.mean(errors) / np.mean((y - mean) ** 2)
    assert fitted.left_out == pytest.approx(expected, rel=1e-3)


def test_convolution_is_numpys_for_every_matrix_by_itself():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 2, 9)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 4, 5)).astype(np.float32)
    found = np.asarray(encoder.convolve(jnp.asarray(x), jnp.asarray(kernel)))
    expected = np.zeros((3, 5, 2, 9))
    for m, o, b in np.ndindex(3, 5, 2):
        expected[m, o, b] = sum(
            np.convolve(x[m, c, b], kernel[m, ::-1, c, o], "same") for c in range(4)
        )
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_what_does_not_vary_passes_no_gradient_on():
    """A is as it started after the first step: zero, and eight norms of zero would make NaN."""
    x = jnp.stack([jnp.zeros(6), jnp.arange(6.0)])
    found = encoder.instance_norm(x)
    np.testing.assert_allclose(found[1], (x[1] - 2.5) / np.std(np.arange(6)), rtol=1e-5)
    np.testing.assert_array_equal(found[0], 0)
    slope = jax.grad(lambda x: jnp.sum(encoder.instance_norm(x) ** 3))(x)
    np.testing.assert_array_equal(slope[0], 0)
    assert np.isfinite(np.asarray(slope)).all()


@pytest.mark.parametrize("reads", ["product", "factors"])
def test_the_encoder_can_say_which_adapter_it_reads(reads):
    """Four adapters, a wanted context each: the best constant context leaves their variance."""
    reader = encoder.Reader(channels=2, mixer=1, heads=2, reads=reads, samples=False)
    lora, rng = adapters(4), np.random.default_rng(2)
    start = jax.tree.map(jnp.zeros_like, lora)
    wanted = jnp.asarray(rng.standard_normal((4, 1, SIZE.context, SIZE.width)), jnp.float32)
    constant = float(jnp.mean((wanted - wanted.mean(axis=0)) ** 2))
    key, optimizer = jax.random.key(0), optax.adam(3e-3)
    weights = encoder.init_encoder(reader, SIZE, key, jax.tree.map(lambda x: x[0], lora))

    def loss(weights):
        return jnp.mean(
            (encoder.contexts_of(reader, SIZE, weights, lora, start, 3, key) - wanted) ** 2
        )

    def step(_, carry):
        return tuning.descend(optimizer, jax.grad(loss)(carry[0]), *carry)

    weights, _ = jax.jit(lambda w: jax.lax.fori_loop(0, 150, step, (w, optimizer.init(w))))(weights)
    assert float(loss(weights)) < 0.1 * constant


@pytest.mark.slow
@pytest.mark.parametrize("reads", ["product", "factors"])
def test_the_encoder_learns_and_draws(reads):
    reader = encoder.Reader(channels=4, mixer=1, heads=2, reads=reads)
    lessons = learning.Lessons(rounds=2, side_by_side=3, pictures=2)
    own, key = private(4), jax.random.key(0)
    weights, losses = learning.learn(lessons, reader, RECIPE, SIZE, PARAMS, PUBLIC, own, key)
    lora, _ = tuning.begin(RECIPE, SIZE, key)
    fresh = encoder.init_encoder(reader, SIZE, jax.random.fold_in(key, 0), lora)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), weights, fresh)
    assert max(jax.tree.leaves(moved)) > 1e-4
    assert losses.shape == (2,)
    assert np.isfinite(losses).all()
    victims = tuning.fine_tune(RECIPE, SIZE, PARAMS, PUBLIC, own, key, at_once=2)
    start = jax.tree.map(jnp.zeros_like, victims) if reads == "factors" else None
    drawn = learning.reconstruct(reader, SIZE, PARAMS, weights, victims, 3, key, start, samples=2)
    assert drawn.shape == (4, 2, 8, 8)
    assert np.isfinite(np.asarray(drawn)).all()


def test_an_encoder_of_factors_needs_their_start():
    reader = encoder.Reader(reads="factors")
    with pytest.raises(ValueError, match="give the start"):
        encoder.read(reader, {}, adapters(1), None)


class TestScores:
    network = recogniser.train(
        recogniser.Judge(steps=60, batch=32),
        np.repeat(pictures(5, 3)[:, None], 4, axis=1).repeat(2, -1).repeat(2, -2),
        jax.random.key(0),
    )
    known = pictures(5, 3).repeat(2, -1).repeat(2, -2)
    gallery = recogniser.gallery(network, known[:, None])
    classes = np.array([0, 0, 1, 1, 1])

    def score(self, shown, truth=(0, 1, 2, 3, 4)):
        truth = np.array(truth)
        usual = self.known.mean(axis=0)
        return scoring.score(
            self.network, shown, self.gallery, truth, self.classes, self.known[truth], usual
        )

    def test_the_pictures_themselves_are_found(self):
        found = self.score(self.known)
        assert found.top1.all()
        assert found.in_class.all()
        np.testing.assert_allclose(found.error, 0.0)
        np.testing.assert_allclose(found.class_chance, [1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])

    def test_one_picture_for_all_is_right_once(self):
        found = self.score(np.repeat(self.known[2:3], 5, axis=0))
        assert found.top1.tolist() == [False, False, True, False, False]
        assert found.top5.all()

    def test_the_mean_picture_has_error_one(self):
        found = self.score(np.repeat(self.known.mean(axis=0)[None], 5, axis=0))
        np.testing.assert_allclose(found.error, 1.0, rtol=1e-5)

    def test_nan_is_no_success(self):
        with pytest.raises(ValueError, match="not finite"):
            self.score(np.full_like(self.known, np.nan))


def test_bootstrap_interval_covers_what_the_normal_one_does():
    values = np.random.default_rng(0).random(400) < 0.3
    found = scoring.interval(values)
    half = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.01)
    assert found.high == pytest.approx(values.mean() + half, abs=0.01)


def test_noise_and_truncation_do_what_they_say():
    lora = adapters(200, rank=3)
    noised = defences.noised(lora, 0.5, jax.random.key(0))
    for path, pair in lora.items():
        added = np.asarray(noised[path].a - pair.a).std() / np.asarray(pair.a).std()
        assert added == pytest.approx(0.5, rel=0.05)
    cut, whole = products(defences.truncated(lora, 1)), np.asarray(products(lora))
    values = np.linalg.svd(whole, compute_uv=False)
    left = np.linalg.norm(np.asarray(cut) - whole, axis=(-2, -1))
    np.testing.assert_allclose(left, np.linalg.norm(values[..., 1:], axis=-1), rtol=1e-4)
    again = products(factored({"x": whole[:, 0]}, 3))
    np.testing.assert_allclose(again[:, 0], whole[:, 0], atol=1e-4)


def test_grids_round_to_the_nearest_of_so_many_levels():
    x = np.random.default_rng(0).standard_normal((3, 50))
    scale = np.abs(x).max(axis=1, keepdims=True)
    assert (np.abs(defences.int8(x) - x) <= scale / 254 * (1 + 1e-9)).all()
    rounded = defences.nf4(x)
    flat = np.pad(x.reshape(-1), (0, 42)).reshape(-1, 64)
    levels = defences.NF4 * np.abs(flat).max(axis=1, keepdims=True)
    nearest = np.abs(flat[..., None] - levels[:, None]).min(axis=-1).reshape(-1)[:150]
    np.testing.assert_allclose(np.abs(rounded - x).reshape(-1), nearest, atol=1e-12)
    assert not defences.int8(np.zeros((2, 2))).any()


def test_counts_and_classes_are_read_where_they_are_written():
    rng = np.random.default_rng(0)
    counts = np.tile(np.arange(1, 5), 10)
    whole = rng.standard_normal((40, 2, 6, 6)) * counts[:, None, None, None] ** 2
    known = byproducts.Spectra(byproducts.spectra(whole[:20], 6), counts[:20])
    assert (
        np.abs(byproducts.vote(known, byproducts.spectra(whole[20:], 6)) - counts[20:]).mean() < 0.5
    )
    classes = rng.integers(0, 3, 40)
    marked = rng.standard_normal((40, 2, 6, 6))
    marked[np.arange(40), 0, classes, 0] += 12
    fitted = byproducts.fit_classes(marked[:30], classes[:30], 3)
    assert (byproducts.classify(fitted, marked[30:]) == classes[30:]).mean() > 0.8


def test_captions_describe_alike_pictures_alike():
    shown = pictures(200, 2).repeat(2, -1).repeat(2, -2)
    captioner = captions.fit(shown)
    words = captions.captions(captioner, shown)
    assert words.shape == (200, 8)
    assert (words // 16 == np.arange(8)).all()
    near = captions.captions(captioner, shown + 1e-4)
    assert (near == words).mean() > 0.98


def test_layers_of_several_shapes_are_refused():
    lora = adapters(2) | {"x": Lora(jnp.ones((2, 1, 3)), jnp.ones((2, 4, 1)))}
    with pytest.raises(InputError, match="several shapes"):
        products(lora)
