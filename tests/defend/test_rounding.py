"""Residuals taken for rounding: what an attacker recovers above them."""

import numpy as np

import jdetune
from jdetune import defend, synth
from tests.defend import small

FAMILY = synth.family(3, 64, 48, 4)


def test_every_element_is_rounded_by_the_same_step():
    found = defend.coarse(FAMILY.merged, 1e-6)
    whole = found.stack.astype(np.float64)
    np.testing.assert_array_equal(whole, np.round(whole))
    np.testing.assert_array_equal(np.spacing(found.stack), 1.0)
    back = np.stack([found.base(model) for model in found.stack])
    assert np.abs(back - FAMILY.merged).max() < 0.51 * found.step


def test_a_step_is_never_too_small_for_what_the_models_differ_by():
    found = defend.coarse(FAMILY.merged, 0.0)
    np.testing.assert_array_equal(np.spacing(found.stack), 1.0)


def test_small_noise_is_refused_and_its_size_found():
    noisy = defend.dense_noise(FAMILY.merged, 1e-5, seed=0)
    assert int(jdetune.recover(noisy).status) == jdetune.Status.NOT_LOW_RANK
    rms = defend.residual_rms(noisy)
    assert 1e-5 < rms < 1.5e-5


def test_rounding_errors_are_as_large_as_the_most_stretched_direction_makes_them():
    base = small.weights(small.BERT)
    name = "encoder.layer.0.attention.self.value.weight"
    plain = defend.rounding_rms(base, (), [name])[name]
    ulp = np.sqrt(np.mean(np.square(np.spacing(np.abs(base[name])))) / 12)
    assert 0.8 * ulp < plain < 1.5 * ulp
    place = next(p for p in defend.places(small.BERT) if p.axes[0].name == name)
    blocks = np.broadcast_to(np.diag(np.r_[16.0, np.ones(place.side - 1)]), (8, 12, 12))
    moved = defend.rounding_rms(base, [defend.Change(place, blocks=blocks)], [name])[name]
    assert 4 * plain < moved < 16 * plain


def test_common_directions_are_told_from_noise_of_a_known_size():
    merged = defend.common_direction(FAMILY.merged, rms=1e-3, seed=0)
    noisy = defend.dense_noise(merged, 1e-5, seed=1).astype(np.float64)
    assert defend.without_common(noisy).directions.shape[1] > 1  # all noise is above float64's
    assert defend.without_common(noisy, rms=1e-5).directions.shape == (64, 1)
