import doctest

import ml_dtypes
import numpy as np
import pytest

from jdetune import metrics

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def test_examples():
    assert doctest.testmod(metrics).failed == 0


def test_log_mse_of_known_errors():
    truth = np.zeros((2, 2), np.float32)
    assert metrics.log_mse(truth + np.float32(1e-3), truth) == pytest.approx(-6, abs=1e-6)
    assert metrics.log_mse(truth, truth) == -40.0
    assert metrics.log_mse(truth + np.float32(1e-30), truth) == -40.0
    assert np.isnan(metrics.log_mse(truth * np.float32(np.nan), truth))


def test_log_mse_is_computed_in_float64():
    truth = np.array([1.0], np.float32)
    assert metrics.log_mse(np.nextafter(truth, np.float32(2)), truth) == pytest.approx(
        2 * np.log10(2.0**-23), abs=1e-9
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_fraction_compares_bits(dtype):
    truth = np.array([0.0, 1.0, 2.0, np.nan], dtype)
    assert metrics.exact_fraction(truth, truth) == 1.0
    assert metrics.exact_fraction(-truth, truth) == 0.0
    assert metrics.exact_fraction(np.array([-0.0, 1.0, 2.0, np.nan], dtype), truth) == 0.75
    assert metrics.exact_fraction(truth.T[::2], truth[::2]) == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_ulp_distance_counts_steps_across_zero(dtype):
    grid = [np.array(-0.0, dtype)]
    for _ in range(3):
        grid.append(np.nextafter(grid[-1], np.array(1, dtype)))
    grid = np.stack(grid)
    np.testing.assert_array_equal(metrics.ulp_distance(grid, grid[:1].repeat(4)), [0, 1, 2, 3])
    np.testing.assert_array_equal(metrics.ulp_distance(grid, -grid), [0, 2, 4, 6])


@pytest.mark.parametrize("dtype", DTYPES)
def test_ulp_distance_steps_over_binades(dtype):
    two = np.array([2.0], dtype)
    below = np.nextafter(two, np.array(0, dtype))
    above = np.nextafter(two, np.array(9, dtype))
    assert metrics.ulp_distance(above, below).tolist() == [2]


def test_ulp_histogram_bins_everything():
    steps = np.array([0, 1, 2, 3, 4, 5, 8, 9, 1000])
    truth = np.ones(10, np.float32)
    estimate = truth.copy()
    estimate[:9] = (truth[:9].view(np.int32) + steps.astype(np.int32)).view(np.float32)
    estimate[9] = np.nan
    expected = {"0": 1, "1": 1, "2": 1, "3-4": 2, "5-8": 2, ">8": 3}
    assert metrics.ulp_histogram(estimate, truth) == expected


def test_other_shapes_and_dtypes_are_refused():
    one = np.ones(2, np.float32)
    # TypeError where jaxtyping is on, as in the tests of this project
    with pytest.raises((ValueError, TypeError)):
        metrics.log_mse(one, one[:1])
    with pytest.raises(ValueError, match="dtypes differ"):
        metrics.ulp_distance(one, one.astype(np.float16))
    assert metrics.exact_fraction(one, one.astype(np.float16)) == 0.0


def test_cosine():
    a = np.array([[3.0, 0.0], [0.0, 4.0]], np.float32)
    assert metrics.cosine(a, -2 * a) == pytest.approx(-1)
    assert np.isnan(metrics.cosine(a, 0 * a))
