"""The refinement against scipy's least squares, its own algebra, and real adapters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import least_squares

import jdetune
from jdetune import linalg, synth
from jdetune.noise import merge_variance
from jdetune.solvers import likelihood
from jdetune.solvers import tangent as tangents
from jdetune.solvers.likelihood import Refinement
from jdetune.solvers.pairs import Scales, noise_scales
from jdetune.solvers.tangent import Step, Tangent
from tests import real, reference

FLOAT64 = jnp.dtype("float64")


def variance_of(merged, left, right):
    """ulp^2 / 12 and the arithmetic of the merge, in NumPy."""
    walks = []
    for b, a in zip(left, right, strict=True):
        u, s, v = np.linalg.svd(b.astype(np.float64) @ a, full_matrices=False)
        rank = b.shape[1]
        rows, cols = ((u * s)[:, :rank] ** 2).sum(1), (v[:rank] ** 2).sum(0)
        walks.append(rank * (0.72 * ((u * s) @ v) ** 2) + 0.36 * rows[:, None] * cols)
    return (reference.spacing(merged) ** 2 + 2.0**-48 * np.stack(walks)) / 12


def test_equals_scipys_weighted_least_squares():
    """All updates free, the base eliminated: a trust-region solver from the truth."""
    row, col, n, rank = 14, 12, 4, 2
    family = synth.family(n, row, col, rank, seed=3, decay=1.0)
    merged = family.merged.astype(np.float64)
    sigma = reference.sigma(family.merged)
    variance = variance_of(family.merged, family.left, family.right)
    usual = variance.mean((0, 2))[:, None] * variance.mean((0, 1)) / variance.mean()
    fitted = np.maximum(variance, 1e-3 * usual)
    weight = 1 / fitted
    shapes = [(row, rank), (rank, col)] * n
    sizes = [a * b for a, b in shapes]

    def split(x):
        parts = np.split(x, np.cumsum(sizes)[:-1])
        parts = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        return np.stack([b @ a for b, a in zip(parts[::2], parts[1::2], strict=True)])

    def base_of(x, weight=weight):
        return (weight * (merged - split(x))).sum(0) / weight.sum(0)

    def cost(x):
        return ((merged - split(x) - base_of(x)) / np.sqrt(fitted)).ravel()

    pairs = zip(family.left, family.right, strict=True)
    start = np.concatenate([part.ravel() for pair in pairs for part in pair]).astype(np.float64)
    oracle = least_squares(cost, start, xtol=1e-15, ftol=1e-15, gtol=1e-15)
    options = Refinement(tolerance=1e-6, max_steps=400, rounds=4)
    with linalg.scope(FLOAT64):
        scales = noise_scales(jnp.asarray(family.merged), FLOAT64)
        left = jnp.asarray(np.stack(family.left), FLOAT64)
        right = jnp.asarray(np.stack(family.right), FLOAT64)
        run = jax.jit(functools.partial(likelihood.most_likely, options=options))
        found = run(family.merged, left, right, jnp.full(n, rank, jnp.int32), scales)
        base, b, a = (np.asarray(x) for x in (found[1], found[0].left, found[0].right))
    best = base_of(oracle.x, 1 / variance)
    assert np.sqrt(np.mean((best - family.base) ** 2)) > 0.3 * sigma  # an error of its own
    assert np.abs(base - best).max() < 0.02 * sigma
    assert np.abs(b @ a - split(oracle.x)).max() < 0.02 * sigma


def tangent(n=3, row=20, col=15, ranks=(3, 0, 5), seed=0):
    rng = np.random.default_rng(seed)
    rank = max(ranks)
    u, v = np.zeros((n, row, rank)), np.zeros((n, col, rank))
    for i, r in enumerate(ranks):
        u[i, :, :r] = np.linalg.qr(rng.standard_normal((row, r)))[0]
        v[i, :, :r] = np.linalg.qr(rng.standard_normal((col, r)))[0]
    weight = np.exp(rng.normal(0, 1, (n, row, col)))
    active = np.arange(rank) < np.array(ranks)[:, None]
    u, v, active, weight = (jnp.asarray(x) for x in (u, v, active, weight))
    cols, rows = tangents.information(weight, jnp.sum(weight, 0))
    return Tangent(u, v, active, weight, jnp.sum(weight, 0), rows, cols / row)


def test_tangent_map_and_its_adjoint_agree():
    rng = np.random.default_rng(1)
    with linalg.scope(FLOAT64):
        space = tangent()
        raw = Step(jnp.asarray(rng.standard_normal((3, 20, 5))),
                   jnp.asarray(rng.standard_normal((3, 15, 5))))  # fmt: skip
        step = tangents.project(space, raw)
        matrices = jnp.asarray(rng.standard_normal((3, 20, 15)))
        moved = jnp.matmul(*tangents.pair(space.left, space.right, step))
        back = tangents.to_tangent(space, matrices)
        left = float(jnp.sum(moved * matrices))
        right = float(tangents.dot(step, back))
        assert left == pytest.approx(right, rel=1e-12)
        # an isometry: the two parts are orthogonal
        assert float(jnp.sum(moved**2)) == pytest.approx(float(tangents.dot(step, step)))


def test_normal_operator_is_symmetric_and_positive():
    rng = np.random.default_rng(2)
    with linalg.scope(FLOAT64):
        space = tangent()
        steps = [
            tangents.project(space, Step(jnp.asarray(rng.standard_normal((3, 20, 5))),
                                            jnp.asarray(rng.standard_normal((3, 15, 5)))))
            for _ in range(2)
        ]  # fmt: skip
        images = [tangents.normal_operator(space, step) for step in steps]
        cross = [float(tangents.dot(steps[i], images[1 - i])) for i in range(2)]
        assert cross[0] == pytest.approx(cross[1], rel=1e-12)
        assert float(tangents.dot(steps[0], images[0])) > 0


@pytest.mark.parametrize("block", [5, 20])
def test_normal_operator_is_that_of_dense_matrices(block, monkeypatch):
    """Also in blocks of rows, as on CPU for large layers; against dense matrices in NumPy."""
    monkeypatch.setattr(linalg, "row_block", lambda row, width, least=16: block)
    rng = np.random.default_rng(3)
    with linalg.scope(FLOAT64):
        space = tangent()
        raw = Step(jnp.asarray(rng.standard_normal((3, 20, 5))),
                   jnp.asarray(rng.standard_normal((3, 15, 5))))  # fmt: skip
        step = tangents.project(space, raw)
        found = tangents.normal_operator(space, step)
        u, v, w = (np.asarray(part) for part in (space.left, space.right, space.weight))
        p, q = np.asarray(step.p), np.asarray(step.q)
        matrices = p @ v.transpose(0, 2, 1) + u @ q.transpose(0, 2, 1)
        weighted = w * (matrices - (w * matrices).sum(0) / w.sum(0))
        expected = tangents.project(
            space, Step(jnp.asarray(weighted @ v), jnp.asarray(weighted.transpose(0, 2, 1) @ u))
        )
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-12)


def test_stops_at_the_stated_gradient():
    family = synth.family(3, 96, 80, 6)
    with linalg.scope(FLOAT64):
        scales = noise_scales(jnp.asarray(family.merged), FLOAT64)
        start = jnp.asarray(np.stack(family.left), FLOAT64)
        start = start * (1 + 1e-4)  # an error well above the rounding
        found = [
            jax.jit(functools.partial(likelihood.refine, options=Refinement(goal, 200, 6)))(
                family.merged,
                start,
                jnp.asarray(np.stack(family.right), FLOAT64),
                jnp.full(3, 6, jnp.int32),
                scales,
            )[0]
            for goal in (1e-1, 1e-4)
        ]
    assert float(found[0].reached) <= 1e-1
    assert float(found[1].reached) <= 1e-4
    assert 0 < int(found[0].steps) < int(found[1].steps)
    assert int(found[1].rounds) < 6


def test_variance_of_a_real_merge_holds_for_elements_near_zero():
    """Their own spacing is far too small; the float32 arithmetic of the merge is what counts."""
    name, (base, merged) = next(iter(real.merged("distinct_tasks_r16", 1).items()))
    left, right = real.factors("distinct_tasks_r16", 0)[name]
    error = merged[0].astype(np.float64) - base - left.astype(np.float64) @ right
    with linalg.scope(FLOAT64):
        b, a = jnp.asarray(left, FLOAT64)[None], jnp.asarray(right, FLOAT64)[None]
        variance = np.asarray(merge_variance(jnp.asarray(merged), b, a))[0]
    rounding = reference.spacing(merged[0]) ** 2 / 12
    small, large = rounding < 0.1 * variance, rounding > 0.9 * variance
    assert small.sum() > 1000
    assert large.sum() > 10000
    assert 0.2 < np.mean(error[small] ** 2 / variance[small]) < 1.5
    assert np.mean(error[large] ** 2 / variance[large]) == pytest.approx(1.0, abs=0.05)
    assert np.mean(error[small] ** 2 / rounding[small]) > 100


def test_every_product_asks_for_full_precision():
    from tests.test_linalg import products_in

    with linalg.scope(FLOAT64):
        shapes = [(3, 30, 4), (3, 4, 20)]
        factors = [jnp.zeros(shape, FLOAT64) for shape in shapes]
        scales = Scales(jnp.ones(30, FLOAT64), jnp.ones(20, FLOAT64))
        stack = jnp.zeros((3, 30, 20), jnp.float32)
        traced = jax.make_jaxpr(likelihood.most_likely)(
            stack, *factors, jnp.full(3, 4, jnp.int32), scales
        )
    products = list(products_in(traced.jaxpr))
    assert len(products) > 20
    for equation in products:
        assert equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


@pytest.mark.parametrize(
    ("name", "n", "error", "exact"),
    [
        ("distinct_tasks_r16", 3, -19.5, 0.95),
        pytest.param("distinct_tasks_r16", 5, -20.4, 0.97, marks=pytest.mark.slow),
    ],
)
def test_real_adapters_gain_almost_a_decade(name, n, error, exact):
    layers = real.merged(name, n)
    stack = {tensor: merged for tensor, (_, merged) in layers.items()}
    polished = jdetune.recover(stack)
    plain = jdetune.recover(stack, jdetune.SubspaceIntersection(polish=False))
    errors = {
        kind: np.mean([reference.log_mse(found[t].base, layers[t][0]) for t in layers])
        for kind, found in (("polished", polished), ("plain", plain))
    }
    fractions = [reference.bits_equal(polished[t].base, layers[t][0]) for t in layers]
    assert polished.ok
    assert all(ranks.tolist() == [16] * n for ranks in polished.ranks.values())
    assert errors["polished"] <= error
    assert errors["polished"] < errors["plain"] - 0.8
    assert np.mean(fractions) >= exact
    ratios = [float(found.stats["residual_ratio"]) for found in polished.values()]
    assert 0.9 < min(ratios) < max(ratios) < 1.1
