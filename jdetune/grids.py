"""Grids of storage dtypes: their points, and which one a base lies on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdetune.noise import ulp
from jdetune.types import STORAGE_DTYPES

#: Coarser grids that a base may lie on, finest first, by the widest dtype of the models.
COARSER = {"float32": ("float16", "bfloat16"), "float16": ("bfloat16",), "bfloat16": ()}
#: Share of a base that may be off a grid it is said to lie on, by the widest dtype of the models
#: (16 bits leave noise that is not spread evenly), and the amplification of the noise that there is
#: room for where it is not known.
ON_GRID = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.1}
CAUTION_GRID = 5.0
#: A base is finer than its 16-bit models above this share off their grid, with residuals this near
#: to the rounding error.
OFF_GRID = 0.7
USUAL_RESIDUAL = 0.1


class Grid(NamedTuple):
    """A storage dtype as numbers: spacing just above one, and smallest normal number."""

    eps: Float[Array, ""]
    smallest: Float[Array, ""]


def grid(dtype: str) -> Grid:
    """The grid of a dtype.

    Example:
      >>> float(grid("bfloat16").eps)
      0.0078125
    """
    info = jnp.finfo(jnp.dtype(dtype))
    return Grid(jnp.float32(info.eps), jnp.float32(info.smallest_normal))


def nearest(values: Float[Array, "*shape"], grid: Grid) -> Float[Array, "*shape"]:
    """Grid points nearest to values, in the dtype of the values.

    Example:
      >>> import jax.numpy as jnp
      >>> nearest(jnp.array([1.001, -2.99]), grid("bfloat16")).tolist()
      [1.0, -2.984375]
    """
    unit = unit_of(values, grid)
    return jnp.round(values / unit) * unit


def step_up(points: Float[Array, "*shape"], grid: Grid, steps: int) -> Float[Array, "*shape"]:
    """Grid points that many steps further up.

    Example:
      >>> import jax.numpy as jnp
      >>> step_up(jnp.array([1.0, -1.0]), grid("bfloat16"), 1).tolist()
      [1.0078125, -0.99609375]
    """
    sign = 1 if steps > 0 else -1
    for _ in range(abs(steps)):
        unit = unit_of(points, grid)
        inward = jnp.where(at_binade(points, grid.smallest), unit / 2, unit)
        points = points + sign * jnp.where(points * sign < 0, inward, unit)
    return points


def unit_of(values: Float[Array, "*shape"], grid: Grid) -> Float[Array, "*shape"]:
    """Spacing of the grid at values; at zero, what float32 can hold of it."""
    return jnp.maximum(ulp(values, grid.eps, grid.smallest).astype(values.dtype), 1e-37)


def at_binade(
    values: Float[Array, "*shape"], smallest: Float[Array, "..."]
) -> Bool[Array, "*shape"]:
    """Whether the grid is finer on the side of zero than on the other."""
    magnitude = jnp.abs(values.astype(jnp.float32))
    mantissa = jax.lax.bitcast_convert_type(magnitude, jnp.uint32) & jnp.uint32(0x7FFFFF)
    return (mantissa == 0) & (magnitude > smallest)


def off_grid(
    base: Float[Array, "row col"], variance: Float[Array, "row col"], grid: Grid
) -> Float[Array, ""]:
    """How far an estimate of the base is from lying on a grid: 0 on it, 1 for any other base.

    The mean squared distance to the grid in units of its spacing, less what the estimate's error
    explains, over the 1/12 of a base that knows nothing of the grid. Only elements count whose
    error is below a fifth of the spacing.

    Args:
      base: estimated base, finer than the grid.
      variance: of the estimate.
      grid: the grid.

    Returns:
      The share; infinite where fewer than a tenth of the elements count.
    """
    unit = unit_of(base, grid)
    place = base / unit
    deviation = jnp.sqrt(variance) / unit
    counts = (deviation < 0.2) & (jnp.abs(place) > 0.5)
    number = jnp.sum(counts, dtype=base.dtype)
    explained = jnp.sum(jnp.where(counts, jnp.square(deviation), 0)) / jnp.maximum(number, 1)
    distance = jnp.square(place - jnp.round(place))
    mean = jnp.sum(jnp.where(counts, distance, 0)) / jnp.maximum(number, 1)
    share = jnp.maximum(mean - explained, 0) / (1 / 12 - explained)
    return jnp.where(number * 10 >= base.size, share, jnp.inf)


def find_grid(
    base: Float[Array, "row col"],
    variance: Float[Array, "row col"],
    finest: str,
    known_amplification: Float[Array, ""] | None = None,
    residual_ratio: Float[Array, ""] | None = None,
) -> Int[Array, ""]:
    """Which dtype the base is on, as an index of ``STORAGE_DTYPES``: the coarsest that fits.

    A base finer than its 16-bit models is told by its lying off their grid; it comes in float32.
    That takes noise that is not amplified, and residuals of the size that a base off the grid
    gives them.

    Args:
      base: estimated base.
      variance: of the estimate, if the updates were known.
      finest: widest dtype of the models, taken where no coarser grid fits.
      known_amplification: of the noise; None if it is not known, then no finer grid is found.
      residual_ratio: rms of the residuals over that of the rounding error.

    Returns:
      The index.
    """
    found = jnp.full((), STORAGE_DTYPES.index(finest), jnp.int32)
    if known_amplification is not None and residual_ratio is not None:
        off = off_grid(base, variance * jnp.square(known_amplification), grid(finest))
        usual = jnp.abs(residual_ratio - 1) < USUAL_RESIDUAL
        found = jnp.where((off > OFF_GRID) & jnp.isfinite(off) & usual, 0, found).astype(jnp.int32)
    room = jnp.square(CAUTION_GRID if known_amplification is None else known_amplification)
    for name in COARSER[finest]:
        fits = off_grid(base, variance * room, grid(name)) < ON_GRID[finest]
        found = jnp.where(fits, jnp.int32(STORAGE_DTYPES.index(name)), found)
    return found
