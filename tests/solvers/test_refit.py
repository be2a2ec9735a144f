"""Updates fitted with a known base: uniform errors are worth more than least squares takes."""

import jax
import jax.numpy as jnp
import numpy as np

from jdetune import linalg, synth
from jdetune.solvers.likelihood import Refinement, refine
from jdetune.solvers.pairs import noise_scales
from jdetune.solvers.refit import refit

FLOAT64 = jnp.dtype("float64")


def test_fourth_powers_beat_least_squares_once_the_base_is_known():
    family = synth.family(3, 96, 80, 4, seed=6, dtype="bfloat16", update_rms=5e-3)
    truth = np.stack(
        [b.astype(np.float64) @ a for b, a in zip(family.left, family.right, strict=True)]
    )
    ranks = jnp.full(3, 4, jnp.int32)
    with linalg.scope(FLOAT64):
        scales = noise_scales(family.merged, FLOAT64)
        start = [jnp.asarray(np.stack(x), FLOAT64) for x in (family.left, family.right)]
        fit = jax.jit(lambda b, a: refine(family.merged, b, a, ranks, scales, Refinement(1e-2)))
        squares, _ = fit(*start)
        base = jnp.asarray(family.base.astype(np.float64))

        @jax.jit
        def again(b, a, known):
            return refit(family.merged, b, a, ranks, scales, base, known)

        known = jnp.ones(family.base.shape, bool)
        moved = [squares.left, squares.right]
        for _ in range(3):
            moved = again(*moved, known)
        errors = [
            float(np.sqrt(np.mean((np.asarray(b @ a) - truth) ** 2)))
            for b, a in ((squares.left, squares.right), moved)
        ]
        blind = again(squares.left, squares.right, ~known)
        drift = np.asarray(blind[0] @ blind[1]) - np.asarray(squares.left @ squares.right)
    assert errors[1] < 0.7 * errors[0]  # sqrt(3/7) by theory, with the base known also less
    assert np.sqrt(np.mean(drift**2)) < 0.05 * errors[0]  # nothing known: least squares already
