import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import watch
from jdetune.watch.monitor import Extremes
from tests.watch.test_monitor import some_directions

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(("hits", "trials"), [(0, 50), (50, 50), (3, 100), (480, 1000), (7, 20000)])
def test_intervals_are_scipys(hits, trials):
    low, high = watch.clopper_pearson(hits, trials)
    wanted = stats.binomtest(hits, trials).proportion_ci(method="exact")
    assert low == pytest.approx(wanted.low, abs=1e-9)
    assert high == pytest.approx(wanted.high, abs=1e-9)


def test_nothing_tested_says_nothing():
    assert watch.clopper_pearson(0, 0) == (0.0, 1.0)
    assert np.isnan(watch.measured(0, 0).share)
    with pytest.raises(ValueError, match="hits"):
        watch.clopper_pearson(3, 2)


def exchangeable(samples, seed):
    """Extremes as of random inputs; the last direction is not there."""
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.uniform(-1, 1, (2, samples, 2, 2, 3)), axis=0).astype(np.float32)
    ends[0, :, :, 1, 2], ends[1, :, :, 1, 2] = np.inf, -np.inf
    return Extremes(jnp.asarray(ends[0]), jnp.asarray(ends[1]))


@pytest.mark.parametrize("trim", [0.0, 0.01])
def test_false_positives_obey_the_bound_and_come_near_it(trim):
    """5 directions, 2 roles, margin 0: 20 ends, each left with probability (k + 1) / (n + 1)."""
    directions, n = some_directions(), 500
    hits = trials = 0
    monitor = watch.new_monitor(directions)
    for seed in range(20):
        monitor = watch.fit(directions, exchangeable(n, seed), trim, margin=0.0)
        flagged = watch.flag(monitor, exchangeable(n, 100 + seed))
        hits, trials = hits + int(np.sum(flagged)), trials + n
    k = int(trim * n)
    assert monitor.left_out.tolist() == [k, k]
    bound = watch.bound(monitor)
    assert bound == pytest.approx(min(1, 2 * 5 * 2 * (k + 1) / n))
    exact = 1 - (1 - (k + 1) / (n + 1)) ** 20  # ends of different directions are independent here
    assert hits / trials < bound
    # ranges of one calibration are shared by its n trials: the spread is that of 20 calibrations
    assert hits / trials == pytest.approx(exact, rel=0.25)


def test_without_exchangeability_the_bound_is_broken():
    directions, n = some_directions(), 500
    monitor = watch.fit(directions, exchangeable(n, 0), margin=0.0)
    other = exchangeable(n, 1)
    wider = Extremes(1.2 * other.low, 1.2 * other.high)
    assert np.mean(watch.flag(monitor, wider)) > 5 * watch.bound(monitor)


def test_calibration_follows_the_90_10_rule():
    directions, seen = some_directions(), exchangeable(200, 3)
    found = watch.calibrate(directions, seen, trim=0.02)
    first = watch.fit(directions, seen[:180], trim=0.02)
    assert found.held_out.trials == 20
    assert found.held_out.hits == int(np.sum(watch.flag(first, seen[180:])))
    assert found.online.trials == 199
    whole = watch.fit(directions, seen, trim=0.02)
    np.testing.assert_array_equal(found.monitor.high, whole.high)
    assert int(found.monitor.left_out[0]) == 4
    high = np.sort(np.asarray(seen.high[:, 0, 0, 0]))
    assert float(whole.high[0, 0, 0]) == high[-5]
    low = np.sort(np.asarray(seen.low[:, 0, 0, 0]))
    assert float(whole.low[0, 0, 0]) == low[4]
    with pytest.raises(ValueError, match="trim"):
        watch.calibrate(directions, seen, trim=0.5)


def test_without_trim_fitting_equals_streaming():
    directions, seen = some_directions(), exchangeable(50, 4)
    streamed, _ = watch.observe(watch.new_monitor(directions), seen)
    fitted = watch.fit(directions, seen)
    np.testing.assert_array_equal(streamed.low, fitted.low)
    np.testing.assert_array_equal(streamed.high, fitted.high)
    assert streamed.samples.tolist() == fitted.samples.tolist()
