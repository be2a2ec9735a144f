"""What a monitor is compared with: other directions, and distances of activations.

The base-free variant of the paper needs no function: `directions` of the fine-tuned weights
themselves are their leading singular vectors.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jdetune import linalg
from jdetune.types import Array
from jdetune.watch.directions import Directions

#: Share of the mean variance that is added to every axis before a covariance is inverted.
_SHRINK = 1e-3


def random_directions(key: Array, like: Directions) -> Directions:
    """Random unit vectors in the place of some directions.

    Args:
      key: JAX random key.
      like: their number and places.
    """
    vectors = jax.random.normal(key, like.vectors.shape, jnp.float32)
    vectors = vectors / jnp.sqrt(jnp.sum(vectors * vectors, axis=-1, keepdims=True))
    valid = jnp.asarray(like.valid)
    return dataclasses.replace(
        like,
        vectors=jnp.where(valid[..., None], vectors, 0),
        values=valid.astype(jnp.float32),
    )


def pca_directions(
    activations: Float[Array, "sample token layer width"],
    valid: Bool[Array, "sample token"],
    like: Directions,
    last: bool = False,
) -> Directions:
    """Principal components of activations, as many at each place as there are slots.

    Args:
      activations: of the calibration.
      valid: False where there is only padding.
      like: number and places.
      last: the components of least variance instead, which answer to anything new.
    """
    _, covariance = moments(activations, valid)
    slots = len(like.slots)
    _, vectors = linalg.eigh_descending(covariance)
    chosen = vectors[..., -slots:] if last else vectors[..., :slots]
    chosen = jnp.swapaxes(chosen, 1, 2)
    ones = jnp.ones(chosen.shape[:2], jnp.float32)
    slot_names = tuple(("PCA", i) for i in range(chosen.shape[1]))
    return Directions(chosen, ones, like.places, slot_names)


@jax.jit
def moments(
    activations: Float[Array, "sample token layer width"], valid: Bool[Array, "sample token"]
) -> tuple[Float[Array, "layer width"], Float[Array, "layer width width"]]:
    """Mean and covariance of the tokens' activations at each place."""
    x, weight = jnp.asarray(activations), jnp.asarray(valid).astype(jnp.float32)
    total = jnp.maximum(jnp.sum(weight), 1)
    mean = linalg.contract("btlw,bt->lw", x, weight) / total
    centred = (x - mean) * weight[..., None, None]
    return mean, linalg.contract("btlw,btlv->lwv", centred, centred) / total


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mahalanobis:
    """Gaussian of the calibration's activations at each place.

    Attributes:
      mean: [layer, width].
      inverse: [layer, width, width], of the covariance.
    """

    mean: Float[Array, "layer width"]
    inverse: Float[Array, "layer width width"]


def fit_mahalanobis(
    activations: Float[Array, "sample token layer width"], valid: Bool[Array, "sample token"]
) -> Mahalanobis:
    """The Gaussian of harmless activations.

    Args:
      activations: of the calibration.
      valid: False where there is only padding.
    """
    mean, covariance = moments(activations, valid)
    width = mean.shape[-1]
    level = _SHRINK * jnp.trace(covariance, axis1=1, axis2=2)[:, None, None] / width
    return Mahalanobis(mean, linalg.inverse_definite(covariance + level * jnp.eye(width)))


@jax.jit
def distances(
    fitted: Mahalanobis,
    activations: Float[Array, "sample token layer width"],
    valid: Bool[Array, "sample token"],
) -> Float[Array, "sample layer"]:
    """Greatest Mahalanobis distance over the tokens of each input, at each place.

    Args:
      fitted: Gaussian of the calibration.
      activations: at the same places.
      valid: False where there is only padding.
    """
    x = jnp.asarray(activations) - fitted.mean
    square = linalg.contract("btlw,lwv,btlv->btl", x, jnp.asarray(fitted.inverse), x)
    square = jnp.where(jnp.asarray(valid)[..., None], square, 0)
    return jnp.sqrt(jnp.maximum(jnp.max(square, axis=1), 0))


def auroc(positive: Float[np.ndarray, " n"], negative: Float[np.ndarray, " m"]) -> float:
    """Share of pairs in which the positive scores higher; ties count half.

    Example:
      >>> auroc(np.array([1.0, 2.0]), np.array([0.0, 1.0]))
      0.875
    """
    order = np.sort(negative)
    below = np.searchsorted(order, positive, side="left")
    equal = np.searchsorted(order, positive, side="right") - below
    return float(np.mean(below + equal / 2) / len(order))
