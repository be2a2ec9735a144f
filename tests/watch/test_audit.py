import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import watch
from jdetune.watch import audit
from tests.watch.test_monitor import batch, some_directions


def test_leaders_are_the_extremes_of_all_batches():
    directions = some_directions()
    x, valid, answer = batch(60)
    seen = watch.extremes(directions, x, valid, answer)
    leaders = watch.no_leaders(directions, 4)
    for part in (slice(0, 20), slice(20, 40), slice(40, 60)):
        leaders = watch.lead(leaders, seen[part])
    low, high = np.asarray(seen.low).min(1), np.asarray(seen.high).max(1)
    for layer, slot in [(0, 0), (0, 2), (1, 1)]:
        top = np.argsort(-high[:, layer, slot], kind="stable")[:4]
        assert leaders.samples[1, layer, slot].tolist() == top.tolist()
        bottom = np.argsort(low[:, layer, slot], kind="stable")[:4]
        assert leaders.samples[0, layer, slot].tolist() == bottom.tolist()
        np.testing.assert_allclose(-leaders.scores[0, layer, slot], low[bottom, layer, slot])
    assert leaders.samples[0, 1, 2].tolist() == [-1] * 4
    assert int(leaders.seen) == 60


def test_findings_name_the_topic_that_a_direction_answers_to():
    directions = some_directions()
    x, valid, answer = batch(60)
    topics = ["rivers" if i % 6 == 0 else "stars" for i in range(60)]
    for i in range(0, 60, 6):
        x[i, 0, 0] = 10 * np.asarray(directions.vectors[0, 2])
    seen = watch.extremes(directions, x, valid, answer)
    leaders = watch.lead(watch.no_leaders(directions, 10), seen)
    wanted = np.array([topic == "rivers" for topic in topics])
    found = watch.findings(directions, leaders, wanted, topics)
    assert len(found) == 2 * 5
    best = max(found, key=lambda finding: finding.precision or 0)
    assert (best.layer, best.slot, best.end) == (0, 2, "highest")
    assert (best.topic, best.topic_share, best.precision) == ("rivers", 1.0, 1.0)
    assert best.cosines[0] == pytest.approx(1, abs=1e-5)
    share = watch.precision_at(leaders, wanted, 5)
    assert share[1, 0, 2] == 1.0
    assert np.isnan(share[0, 1, 2])
    assert np.nanmean(np.delete(share.reshape(2, -1), 2, axis=1)) < 0.5
    with pytest.raises(ValueError, match="k is 1 to 10"):
        watch.precision_at(leaders, wanted, 11)


def test_baselines_have_the_shape_of_the_directions():
    directions = some_directions()
    made = watch.random_directions(jax.random.key(0), directions)
    np.testing.assert_array_equal(made.valid, directions.valid)
    np.testing.assert_allclose(np.linalg.norm(made.vectors[0], axis=-1), 1, rtol=1e-6)


def test_pca_finds_the_axes_of_most_and_least_variance():
    directions = some_directions()
    x, valid, _ = batch(200)
    x[..., 3] *= 5
    x[..., 7] *= 0.1
    x[~valid] = 100
    most = watch.pca_directions(jnp.asarray(x), jnp.asarray(valid), directions)
    least = watch.pca_directions(jnp.asarray(x), jnp.asarray(valid), directions, last=True)
    assert most.vectors.shape == directions.vectors.shape
    assert np.all(np.abs(most.vectors[:, 0, 3]) > 0.98)
    assert np.all(np.abs(least.vectors[:, -1, 7]) > 0.98)


def test_mahalanobis_equals_numpy():
    x, valid, _ = batch(200)
    fitted = watch.fit_mahalanobis(jnp.asarray(x), jnp.asarray(valid))
    found = watch.distances(fitted, jnp.asarray(x), jnp.asarray(valid))
    own = x[valid][:, 1].astype(np.float64)
    cov = np.cov(own.T, bias=True)
    cov += 1e-3 * np.trace(cov) / 16 * np.eye(16)
    centred = own - own.mean(0)
    wanted = np.sqrt(np.einsum("ni,ij,nj->n", centred, np.linalg.inv(cov), centred))
    rows = np.nonzero(valid)[0]
    most = [wanted[rows == sample].max() for sample in range(200)]
    np.testing.assert_allclose(found[:, 1], most, rtol=1e-3)


def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 30) + 0.0, rng.integers(0, 5, 20) - 1.0
    pairs = (a[:, None] > b) + (a[:, None] == b) / 2
    assert watch.auroc(a, b) == pytest.approx(pairs.mean())
    assert audit.ENDS == ("lowest", "highest")
