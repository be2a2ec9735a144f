"""The accountant against closed forms and a numerical integral."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from jdetune.leak import privacy


@pytest.mark.parametrize("mu", [0.1, 1.0, 5.0, 40.0])
def test_delta_of_the_gaussian_mechanism_is_its_definition(mu):
    """sup over events of P(A) - e^eps P'(A), integrated numerically."""
    epsilon = 0.7 * mu**2
    x = np.linspace(-12, mu + 12, 200_001)
    gap = stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x) if mu < 5 else None
    if gap is not None:
        expected = integrate.trapezoid(np.maximum(gap, 0), x)
        assert privacy.gaussian_delta(epsilon, mu) == pytest.approx(expected, rel=1e-5)
    found = privacy.gaussian_epsilon(mu, 1e-5)
    assert privacy.gaussian_delta(found, mu) == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize(("steps", "noise"), [(1, 1.0), (40, 5.0), (1000, 100.0)])
def test_renyi_bounds_the_exact_epsilon_from_above_and_is_near(steps, noise):
    exact = privacy.gaussian_epsilon(math.sqrt(steps) / noise, 1e-5)
    bound = privacy.renyi_epsilon(steps, noise, 1.0, 1e-5)
    assert exact <= bound <= 1.15 * exact  # the conversion costs a few per cent


@pytest.mark.parametrize(("noise", "share"), [(1.0, 0.01), (2.0, 0.3), (0.7, 0.9)])
def test_renyi_of_a_sampled_step_is_the_integral_that_defines_it(noise, share):
    order = 6

    def integrand(x):
        base = stats.norm.pdf(x, 0, noise)
        mixed = (1 - share) * base + share * stats.norm.pdf(x, 1, noise)
        return base * (mixed / base) ** order

    wide = noise * 12 + order
    value, _ = integrate.quad(integrand, -wide, wide, limit=500)
    expected = math.log(value) / (order - 1)
    assert privacy.renyi(order, noise, share) == pytest.approx(expected, rel=1e-5)


def test_a_published_value_of_subsampled_dp_sgd():
    """TensorFlow Privacy's tutorial: MNIST, batch 250 of 60,000, noise 1.3, 15 epochs: 1.18."""
    found = privacy.epsilon(15 * 240, 1.3, 1e-5, share=250 / 60_000)
    assert 0.9 < found <= 1.19  # its older conversion gives 1.18; ours is tighter


def test_epsilon_is_monotone_and_has_no_guarantee_without_noise():
    values = [privacy.epsilon(40, noise) for noise in (0.5, 1.0, 2.0, 8.0, 64.0)]
    assert values == sorted(values, reverse=True)
    assert privacy.epsilon(40, 0.0) == math.inf
    assert privacy.epsilon(40, 8.0, group=4) > privacy.epsilon(40, 8.0)
    assert privacy.epsilon(40, 8.0, group=4) == privacy.epsilon(40, 2.0)


def test_numbers_out_of_range_are_refused():
    for bad in ({"steps": 0}, {"noise": -1.0}, {"delta": 0.0}, {"share": 0.0}, {"group": 0}):
        with pytest.raises(ValueError, match="steps from 1"):
            privacy.epsilon(**({"steps": 10, "noise": 1.0} | bad))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="full batches"):
        privacy.epsilon(10, 1.0, share=0.5, group=2)
