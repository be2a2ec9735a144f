"""The compiled programs that solve a chunk of same-shaped layers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float

from jdetune import certificate, exact, grids, linalg
from jdetune.factors import balanced_factors, balanced_products
from jdetune.noise import Merged
from jdetune.sharding import over_layers
from jdetune.snap import mean_error
from jdetune.solvers import intersection, likelihood, pairs, rowspace, spectral
from jdetune.solvers.intersection import SubspaceIntersection
from jdetune.solvers.pairs import PairFactors, Scales
from jdetune.solvers.spectral import SpectralDeTuning
from jdetune.types import STORAGE_DTYPES

#: Figures of a solution that become its ``stats``.
CLOSED_FORM = (
    "residual_ratio",
    "tail_ratio",
    "rank_gap",
    "shared_margin",
    "conditioning",
    "detection_floor",
    "ranks",
)
CERTIFIED = (
    "iterations",
    "amplification",
    "expected_error",
    "mean_error",
    "exact_fraction",
    "ambiguous_fraction",
    "rounds",
    "slack",
)
#: What the refinement starts from.
START = ("left", "right", "ranks", "scales", "conditioning", "rank_gap")
#: Conditioning below which no element is called certain: errors of one direction are common to all.
UNSURE = 1e-5
#: Ratio of the last singular value kept to the first left out below which no element is called
#: certain: further directions, whose ranks were not given, may be hidden in the rounding.
HIDING = 1.3
#: Conditioning below which the error bound of the worst single direction is counted.
ILL_CONDITIONED = 1e-6
#: The refinement works element by element for the most part: in the widest vectors that a CPU has.
WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}


@functools.partial(jax.jit, static_argnames=("width", "dtype", "batch_size", "mesh"))
def factor(
    weights: Merged, width: int, dtype: jnp.dtype, batch_size: int, mesh: Mesh | None = None
) -> tuple[PairFactors, Scales]:
    """Singular triplets of all pairwise differences, and the whitening, of every layer."""
    run = functools.partial(pairs.factor_pairs, width=width, dtype=dtype, batch_size=batch_size)
    return over_layers(run, mesh, weights)


@functools.partial(jax.jit, static_argnames=("max_rank", "batch_size", "mesh", "finest"))
def row_spaces(
    weights: Merged,
    max_rank: int,
    batch_size: int,
    mesh: Mesh | None = None,
    finest: str | None = None,
) -> dict[str, Array]:
    """Base and updates of every layer by the short way; valid where ``clear``.

    With ``finest`` they are as ``unpolished`` gives them; else what ``polish`` starts from.
    """

    def one(weights: Merged) -> dict[str, Array]:
        found = rowspace.solve_layer(weights, max_rank, batch_size)
        nothing = jnp.zeros((), bool)
        ready = {} if finest is None else _returned(*found[:4], finest)
        return (
            found._asdict()
            | ready
            | {
                "agree": ~nothing,
                "shared": nothing,
                "tail_ratio": found.residual_ratio,
                "shared_margin": jnp.full_like(found.conditioning, jnp.inf),
            }
        )

    return over_layers(one, mesh, weights)


@functools.partial(jax.jit, static_argnames=("max_rank", "known", "mesh"))
def intersect(
    weights: Merged,
    factors: PairFactors,
    scales: Scales,
    max_rank: int,
    known: int | None,
    mesh: Mesh | None = None,
) -> dict[str, Array]:
    """Closed form of every layer from the factors of its differences."""

    def one(weights: Merged, factors: PairFactors, scales: Scales) -> dict[str, Array]:
        found = intersection.intersect(weights, factors, scales, max_rank, known)
        fields = {name: getattr(found, name) for name in (*CLOSED_FORM, "agree", "shared", "base")}
        left = linalg.matmul(found.left, found.core)
        return fields | {"left": left, "right": jnp.swapaxes(found.right, 1, 2), "scales": scales}

    return over_layers(one, mesh, weights, factors, scales)


@functools.partial(jax.jit, static_argnames=("finest", "mesh"))
def unpolished(found: dict[str, Array], finest: str, mesh: Mesh | None = None) -> dict[str, Array]:
    """The closed form as it is returned: base in its dtype, factors balanced."""
    one = functools.partial(_returned, finest=finest)
    return over_layers(one, mesh, *(found[name] for name in ("base", "left", "right", "ranks")))


def _returned(
    base: Array, left: Array, right: Array, ranks: Array, finest: str
) -> dict[str, Array]:
    b, a = balanced_products(left, right, ranks)
    return {"base": base.astype(finest), "left": b, "right": a}


def _polished(
    weights: Merged,
    left: Array,
    right: Array,
    ranks: Array,
    scales: Scales,
    solver: SubspaceIntersection,
    finest: str,
    mixed: bool,
    conditioning: Array,
    rank_gap: Array,
) -> dict[str, Array]:
    """Most likely updates, the base decided on its grid, and the certificate, of one layer."""
    likely, base, variance, ratio, at = likelihood.most_likely(
        weights,
        left,
        right,
        ranks,
        scales,
        rounding=solver.rounding,
        conditioning=conditioning,
    )
    noise = certificate.spread(at, jnp.zeros(base.shape, bool), conditioning)
    if solver.base_dtype == "auto":
        amplification = None
        if mixed or finest != "float32":
            amplification = noise.amplification.astype(base.dtype)
        grid = grids.find_grid(base, variance, finest, amplification, ratio)
    else:
        grid = jnp.int32(STORAGE_DTYPES.index(solver.base_dtype))
    known = [grids.grid(name) for name in STORAGE_DTYPES]
    on = jax.tree.map(lambda *parts: jnp.stack(parts)[grid], *known)
    final, left, right = exact.resolve(weights, at, on, noise, ratio, conditioning)
    snapped = final.snapped
    # one direction that rows and columns nearly share escapes conjugate gradients and a replicate
    mean = jnp.mean(variance)
    hidden = jnp.where(conditioning < ILL_CONDITIONED, mean / conditioning / base.size, 0)
    error = snapped.error + hidden
    share = jnp.where(hidden > 0, 1 - hidden / error, 1)
    amplification = jnp.maximum(noise.amplification, jnp.sqrt(hidden / mean).astype(jnp.float32))
    all_seen = isinstance(solver.rank, int) | (rank_gap >= HIDING)
    sure = all_seen & (conditioning >= UNSURE)
    certain = sure & (snapped.wrong < exact.certain_below(amplification))
    return {
        **_balanced(left, right, ranks),
        "base": snapped.base.astype(jnp.float32),
        "grid": grid,
        "certain": certain,
        "residual_ratio": ratio,
        "final_ratio": final.residual_ratio,
        "iterations": likely.steps + final.steps,
        "rounds": likely.rounds + final.rounds,
        "amplification": amplification,
        "slack": jnp.max(final.unexplained.slack),
        "expected_error": error,
        "mean_error": mean_error(weights, at.units, snapped, on),
        "exact_fraction": share * (1 - jnp.mean(snapped.wrong, dtype=base.dtype)),
        "ambiguous_fraction": 1 - jnp.mean(certain, dtype=base.dtype),
    }


@functools.partial(
    jax.jit,
    static_argnames=("solver", "finest", "mixed", "mesh"),
    compiler_options=WIDE_VECTORS,
)
def polish(
    weights: Merged,
    found: dict[str, Any],
    solver: SubspaceIntersection,
    finest: str,
    mixed: bool,
    mesh: Mesh | None = None,
) -> dict[str, Array]:
    """Refines, decides and certifies what a solver has found.

    ``found`` holds what ``START`` names.
    """

    def one(weights: Merged, found: dict) -> dict[str, Array]:
        left, right, ranks, scales, *figures = (found[name] for name in START)
        return _polished(weights, left, right, ranks, scales, solver, finest, mixed, *figures)

    return over_layers(one, mesh, weights, found)


@jax.jit
def scales_of(weights: Merged) -> Scales:
    """Whitening of every layer."""
    return jax.vmap(lambda w: pairs.noise_scales(w, linalg.resolve_dtype("auto")))(weights)


def _balanced(left: Array, right: Array, ranks: Array) -> dict[str, Array]:
    """Factors in the form that ``Adapters`` promises, float32."""
    eye = jnp.eye(left.shape[2], dtype=left.dtype)
    eye = jnp.broadcast_to(eye, (left.shape[0], *eye.shape))
    b, a = balanced_factors(left, eye, jnp.swapaxes(right, 1, 2), ranks)
    return {"left": b.astype(jnp.float32), "right": a.astype(jnp.float32)}


@functools.partial(jax.jit, static_argnames=("solver",))
def iterate(
    weights: Float[Array, "layer model row col"], solver: SpectralDeTuning
) -> dict[str, Array]:
    """The paper's solver on every layer."""
    found = spectral.solve(weights, solver)
    left, right = jax.vmap(balanced_factors)(found.left, found.core, found.right, found.ranks)
    return {
        "base": found.base.astype(weights.dtype),
        "left": left.astype(jnp.float32),
        "right": right.astype(jnp.float32),
        "ranks": found.ranks,
        "residual_ratio": found.residual_ratio.astype(jnp.float32),
        "loss": found.loss,
        "rank_history": found.rank_history,
    }
