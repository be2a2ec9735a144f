r"""Kernel ridge regression from an adapter's products B A to a picture: the plain attack.

With X the products of the bank, each scaled to norm one, and Y their pictures,
:math:`f(x) = \bar y + k(x)^T (K + \lambda I)^{-1} (Y - \bar y)` for the linear kernel of centred
products. :math:`\lambda` is the one with the least leave-one-out error, which is known in closed
form. The kernel sees B A only, so refactored factors change nothing.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

#: Strengths tried, as shares of the kernel's mean eigenvalue.
STRENGTHS = tuple(10.0 ** (k / 2) for k in range(-6, 5))


@dataclasses.dataclass(frozen=True)
class Ridge:
    """A fitted regression.

    Attributes:
      inputs: [tune, feature], centred products of the bank.
      centre: [feature], what was subtracted.
      weights: [tune, target], dual coefficients.
      mean: [target], of the bank's targets.
      strength: lambda that was chosen.
      left_out: mean squared leave-one-out error over that of the mean.
    """

    inputs: Float[np.ndarray, "tune feature"]
    centre: Float[np.ndarray, " feature"]
    weights: Float[np.ndarray, "tune target"]
    mean: Float[np.ndarray, " target"]
    strength: float
    left_out: float


def features(products: Float[np.ndarray, "tune layer row col"]) -> np.ndarray:
    """Products as vectors of norm one; zero stays zero."""
    flat = np.asarray(products, np.float32).reshape(len(products), -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-30)


def fit(
    products: Float[np.ndarray, "tune layer row col"],
    wanted: Float[np.ndarray, "tune target"],
) -> Ridge:
    """Fits the regression.

    Args:
      products: of the bank, from `updates.products`.
      wanted: targets, such as pictures as vectors.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> x = rng.standard_normal((40, 1, 2, 2)).astype(np.float32)
      >>> found = fit(x, features(x)[:, :1])
      >>> bool(found.left_out < 0.1)
      True
    """
    x = features(products)
    centre = x.mean(axis=0)
    x = x - centre
    mean = np.asarray(wanted, np.float64).mean(axis=0)
    y = np.asarray(wanted, np.float64) - mean
    values, basis = np.linalg.eigh(np.matmul(x, x.T).astype(np.float64))
    values = np.maximum(values, 0.0)
    along, best = np.matmul(basis.T, y), (np.inf, 0.0)
    for share in STRENGTHS:
        strength = share * values.mean() + 1e-12
        kept = strength / (values + strength)  # 1 - hat matrix, in the eigenbasis
        diagonal = np.maximum(np.sum(basis**2 * kept, axis=1), 1e-12)
        errors = np.matmul(basis, kept[:, None] * along) / diagonal[:, None]
        best = min(best, (float(np.mean(errors**2)), strength))
    weights = np.matmul(basis, along / (values + best[1])[:, None])
    scale = max(float(np.mean(y**2)), 1e-30)
    return Ridge(x, centre, weights, mean, best[1], best[0] / scale)


def predict(
    ridge: Ridge, products: Float[np.ndarray, "tune layer row col"]
) -> Float[np.ndarray, "tune target"]:
    """Targets of unseen adapters.

    Args:
      ridge: fitted.
      products: theirs.
    """
    x = features(products) - ridge.centre
    kernel = np.matmul(x, ridge.inputs.T).astype(np.float64)
    return ridge.mean + np.matmul(kernel, ridge.weights)
