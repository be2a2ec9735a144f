import ast
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jaxtyping import TypeCheckError

import jdetune
from jdetune import linalg, synth
from jdetune.solvers import intersection

PACKAGE = Path(jdetune.__file__).parent
FLOAT32, FLOAT64 = jnp.dtype("float32"), jnp.dtype("float64")


def low_rank(row, col, rank, noise, seed=0):
    rng = np.random.default_rng(seed)
    values = np.logspace(0, -3, rank)
    exact = (rng.standard_normal((row, rank)) * values) @ rng.standard_normal((rank, col))
    return exact + noise * rng.standard_normal((row, col))


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-4])
def test_orthonormal_basis_of_a_sketch_wider_than_the_rank(noise):
    """The case in which CholeskyQR2 in float32 returns NaN."""
    matrix = low_rank(200, 150, 16, noise)
    sketch = np.random.default_rng(1).choice([-1.0, 1.0], (150, 42))
    with linalg.scope(FLOAT64):
        basis = np.asarray(linalg.orthonormalize(jnp.asarray(matrix @ sketch)))
    assert np.isfinite(basis).all()
    strong = low_rank(200, 150, 16, 0.0)
    missed = np.linalg.norm(strong - basis @ (basis.T @ strong)) / np.linalg.norm(strong)
    assert missed < 100 * noise + 1e-10  # the noise, times what a sketch amplifies
    if noise:  # stored weights carry noise of at least 1e-8 of the difference: 1e-9 is enough
        np.testing.assert_allclose(basis.T @ basis, np.eye(42), atol=1e-9)


def test_orthonormal_basis_of_zero_is_zero():
    with linalg.scope(FLOAT64):
        basis = linalg.orthonormalize(jnp.zeros((20, 5), FLOAT64))
        assert float(jnp.abs(basis).max()) == 0.0


@pytest.mark.parametrize("svd", [linalg._svd_lapack, linalg._svd_jordan_wielandt])
def test_small_svd_sees_values_far_below_the_largest(svd):
    """Squaring the condition number would lose values under 1e-8 of the largest."""
    values = np.logspace(0, -12, 20)
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((20, 20)))[0] for _ in range(2))
    with linalg.scope(FLOAT64):
        left, found, right = (np.asarray(x) for x in svd(jnp.asarray((u * values) @ v.T)))
    np.testing.assert_allclose(found, values, atol=1e-15)  # a few eps of the largest
    np.testing.assert_allclose((left * found) @ right.T, (u * values) @ v.T, atol=1e-14)


def test_inverse_keeps_masked_axes_at_zero():
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((6, 4))
    padded = np.zeros((6, 6))
    padded[:4, :4] = factor.T @ factor
    with linalg.scope(FLOAT64):
        inverse = np.asarray(linalg.inverse_psd(jnp.asarray(padded)))
    np.testing.assert_allclose(inverse, np.linalg.pinv(padded), atol=1e-12)
    assert not inverse[4:].any()


def test_long_float32_product_is_closer_than_a_plain_one():
    rng = np.random.default_rng(0)
    a = (rng.standard_normal((40, 4096)) + 1.0).astype(np.float32)
    b = (rng.standard_normal((4096, 30)) + 1.0).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    blocked = np.asarray(linalg.long_matmul(jnp.asarray(a), jnp.asarray(b)))
    sequential = np.zeros_like(blocked)
    for k in range(a.shape[1]):  # what a plain sum of 4096 float32 products loses
        sequential += a[:, k : k + 1] * b[k]
    assert np.abs(blocked - exact).max() < 0.25 * np.abs(sequential - exact).max()
    assert np.abs(blocked / exact - 1).max() < 3e-7


def test_two_sum_is_exact():
    total, error = linalg.two_sum(jnp.float32(1.0), jnp.float32(1e-9))
    assert float(total) == 1.0
    assert float(error) == np.float32(1e-9)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_map_batched_equals_a_loop(batch_size):
    xs = jnp.arange(5.0)
    np.testing.assert_array_equal(linalg.map_batched(jnp.sin, xs, batch_size), jnp.sin(xs))


def test_precision_auto_is_float64_on_cpu():
    assert linalg.resolve_dtype("auto") == FLOAT64
    with pytest.raises((ValueError, TypeCheckError), match="precision"):
        linalg.resolve_dtype("tf32")  # pyright: ignore[reportArgumentType]


def products_in(jaxpr):
    """All dot_general equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from products_in(inner)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_every_product_of_the_solver_asks_for_full_precision(precision):
    """CPU tests cannot see TF32 or bfloat16 products, so the program itself is read."""
    stack = np.zeros((3, 40, 30), np.float32)
    with linalg.scope(linalg.resolve_dtype(precision)):
        traced = jax.make_jaxpr(lambda w: intersection.solve_layer(w, 4, precision))(stack)
    products = list(products_in(traced.jaxpr))
    assert len(products) > 20
    for equation in products:
        assert equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_products_in_tf32_would_be_seen(monkeypatch):
    """Why precision is stated: with TF32's 10 bits the base is off by orders of magnitude."""
    family = synth.family(3, 96, 80, 6, seed=3)

    def error(product):
        monkeypatch.setattr(linalg, "matmul", product)
        with linalg.scope(FLOAT32):
            found = jax.jit(lambda w: intersection.solve_layer(w, 6, "float32"))(family.merged)
        return np.abs(np.asarray(found.base) - family.base).max()

    def tf32(x):
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)

    plain = linalg.matmul
    good = error(plain)
    bad = error(lambda a, b: plain(tf32(a), tf32(b)))
    assert bad > 30 * good


def test_linear_algebra_lives_in_one_file():
    """No ``@``, jnp.dot, jnp.linalg and the like outside linalg.py, where precision is stated."""
    banned = {"dot", "matmul", "einsum", "tensordot", "vdot", "inner", "linalg"}
    numeric = [
        path
        for path in PACKAGE.rglob("*.py")
        if path.name != "linalg.py" and "jax.numpy" in path.read_text()
    ]
    assert len(numeric) > 5
    for path in numeric:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.BinOp):
                assert not isinstance(node.op, ast.MatMult), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert not (node.value.id in ("jnp", "lax") and node.attr in banned), path


def test_many_solves_without_any_setting_do_not_hang():
    """A Python user sets no flags; batched LAPACK or OpenBLAS threads would wait for ever."""
    code = (
        "import jax, jdetune\n"
        "from jdetune import synth\n"
        "f = synth.family(3, 384, 384, 32)\n"
        "for _ in range(25): assert jdetune.recover(f.merged).ok\n"
    )
    unset = ("XLA_FLAGS", "OPENBLAS_NUM_THREADS", "JAX_NUM_CPU_DEVICES")
    plain = {name: value for name, value in os.environ.items() if name not in unset}
    subprocess.run([sys.executable, "-c", code], env=plain, check=True, timeout=120)


def test_svd_of_a_graded_matrix_on_which_divide_and_conquer_fails():
    """A real one: the inner matrix of a retraction, on which LAPACK's gesdd does not converge."""
    graded = np.load(Path(__file__).parent / "data" / "gesdd_fails_32x32.npy")
    with linalg.scope(jnp.dtype("float64")):
        left, values, right = (np.asarray(x) for x in linalg.svd_square(jnp.asarray(graded)))
    assert np.abs((left * values) @ right.T - graded).max() < 1e-13 * values[0]
    assert np.abs(left.T @ left - np.eye(32)).max() < 1e-12


def test_the_inverse_of_a_definite_matrix_and_nan_where_it_is_not():
    with linalg.scope(jnp.dtype("float64")):
        root = np.random.default_rng(0).standard_normal((2, 6, 9))
        gram = np.matmul(root, root.swapaxes(1, 2))
        inverse = np.asarray(jax.jit(linalg.inverse_definite)(jnp.asarray(gram)))
        np.testing.assert_allclose(inverse, np.linalg.inv(gram), rtol=1e-9)
        assert np.isnan(np.asarray(linalg.inverse_definite(jnp.asarray(-gram[0])))).any()
