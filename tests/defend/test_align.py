"""Alignment finds planted changes of coordinates, whatever low rank the models differ by."""

import numpy as np
import pytest

from jdetune import defend
from tests.defend import small


def released(module, spread=1.0, count=2):
    """Fine-tunes, each in its own coordinates, and the same in those of the first."""
    tunes = small.fine_tunes(module, small.weights(module), count)
    pairs = [
        defend.change_coordinates(module, tune, seed, spread=spread)
        for seed, tune in enumerate(tunes)
    ]
    return [one for one, _ in pairs], [defend.moved(tune, pairs[0][1]) for tune in tunes], pairs


def test_planted_orders_are_found():
    releases, _, pairs = released(small.BERT)
    for place in defend.places(small.BERT):
        if place.kind == "order":
            first, second = (
                next(c.order for c in changes if c.place == place) for _, changes in pairs[:2]
            )
            found = defend.match(place, releases[0], releases[1])
            assert first is not None
            assert second is not None
            np.testing.assert_array_equal(second[found], first)


@pytest.mark.parametrize(
    ("name", "spread"),
    [
        ("bert", 1.0),
        ("bert", 3.0),
        pytest.param("llama", 2.0, marks=pytest.mark.slow),
        pytest.param("dinov2", 2.0, marks=pytest.mark.slow),
    ],
)
def test_models_come_back_into_the_first_ones_coordinates(name, spread):
    releases, wanted, _ = released(small.MODULES[name], spread)
    found = defend.align(small.MODULES[name], releases).models
    for key, array in wanted[1].items():
        size = np.abs(array).max()
        # a few roundings to float32: the largest elements' own is up to 6e-8
        assert np.abs(found[1][key] - array).max() < 2e-7 * size, key
        np.testing.assert_array_equal(found[0][key], releases[0][key])


def test_plain_least_squares_would_not_do():
    """Why the fit is reweighted: the updates pull it far from the change that was made."""
    releases, _, pairs = released(small.BERT)
    place = defend.places(small.BERT)[0]
    first, second = (next(c.blocks for c in ch if c.place == place) for _, ch in pairs[:2])
    assert first is not None
    assert second is not None
    wanted = np.matmul(first, np.linalg.inv(second))

    def error(rounds):
        found = defend.fit_blocks(place, releases[0], releases[1], rounds=rounds).blocks
        return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)

    assert error(0) > 1e-3
    assert error(60) < 1e-7


def test_units_that_are_nearly_alike_still_get_one_each():
    base = small.weights(small.BERT)
    place = next(p for p in defend.places(small.BERT) if p.kind == "order")
    rng = np.random.default_rng(0)
    for axis in place.axes:  # unit 1 is nearly unit 0
        rows = np.moveaxis(base[axis.name], axis.axis, 0)
        rows[1] = rows[0]
    noisy = {n: (w + 0.05 * rng.standard_normal(w.shape)).astype(w.dtype) for n, w in base.items()}
    release, changes = defend.change_coordinates(small.BERT, noisy, 1, ("order",))
    order = next(c.order for c in changes if c.place == place)
    found = defend.match(place, base, release)
    assert order is not None
    assert sorted(found) == list(range(place.heads))
    np.testing.assert_array_equal(order[found][2:], np.arange(2, place.heads))


def test_what_was_not_changed_is_left_bit_by_bit():
    tunes = small.fine_tunes(small.LLAMA, small.weights(small.LLAMA), 2)
    found = defend.align(small.LLAMA, tunes)
    assert found.changes[1] == ()
    for name, array in tunes[1].items():
        np.testing.assert_array_equal(found.models[1][name], array)


def test_a_bias_that_no_update_touched_does_not_drown_coarser_matrices():
    releases, _, pairs = released(small.BERT)
    place = defend.places(small.BERT)[0]
    coarse = [
        {n: defend.lower_precision(w, "bfloat16") if w.ndim == 2 else w for n, w in one.items()}
        for one in releases
    ]
    first, second = (next(c.blocks for c in ch if c.place == place) for _, ch in pairs[:2])
    assert first is not None
    assert second is not None
    wanted = np.matmul(first, np.linalg.inv(second))
    found = defend.fit_blocks(place, coarse[0], coarse[1])
    assert found.rounds < 60
    assert np.linalg.norm(found.blocks - wanted) < 0.01 * np.linalg.norm(wanted)
