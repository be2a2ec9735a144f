import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import noise
from tests.reference import spacing, to_dtype


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_ulp_is_numpys_spacing(dtype):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(4000) * 10.0 ** rng.uniform(-6, 3, 4000)
    edges = [1.0, 2.0, 0.5, -1.0, -4.0, 6.1e-5, 3e-5]
    stored = to_dtype(np.concatenate([values, edges]), dtype)
    np.testing.assert_array_equal(
        np.asarray(noise.ulp(jnp.asarray(stored)), np.float64), spacing(stored)
    )


def test_ulp_of_float16_subnormals_is_constant():
    stored = jnp.asarray(np.array([0.0, 6e-8, 1e-7, 6e-5], np.float16))
    np.testing.assert_array_equal(np.asarray(noise.ulp(stored)), np.float32(2.0**-24))


def test_sigma_is_the_rms_of_real_rounding():
    exact = np.random.default_rng(1).standard_normal((300, 200)) * 0.02
    for dtype in ("float32", "float16", "bfloat16"):
        stored = to_dtype(exact, dtype)
        seen = np.sqrt(np.mean((stored.astype(np.float64) - exact) ** 2))
        assert noise.sigma(stored) == pytest.approx(seen, rel=0.02)  # 60000 samples


def test_edge_bounds_rounding_with_unequal_rows_and_columns():
    """Real rows and columns differ in size; the edge is just above the noise, seldom far above."""
    rng = np.random.default_rng(2)
    sizes = np.exp(rng.normal(0, 1.0, (200, 1))) * np.exp(rng.normal(0, 0.7, (1, 150)))
    exact = 0.02 * sizes * rng.standard_normal((2, 200, 150))
    stored = exact.astype(np.float32)
    error = stored.astype(np.float64) - exact
    largest = np.linalg.svd(error[0] - error[1], compute_uv=False)[0]
    variance = (spacing(stored[0]) ** 2 + spacing(stored[1]) ** 2) / 12
    with jax.enable_x64(True):
        edge = float(noise.pair_edge(jnp.asarray(variance)))
    assert largest < edge < 2.5 * largest
