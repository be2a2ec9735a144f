"""The compiled programs that solve a chunk of same-shaped layers."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jdetune import certificate, exact, grids, linalg
from jdetune.factors import balanced_factors
from jdetune.noise import Merged
from jdetune.solvers import intersection, likelihood, spectral
from jdetune.solvers.intersection import PairFactors, Scales, SubspaceIntersection
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
#: Conditioning below which no element is called certain: errors of one direction are common to all.
UNSURE = 1e-5
#: Conditioning below which the error bound of the worst single direction is counted.
ILL_CONDITIONED = 1e-6
#: Conditioning that is assumed of what the iterative solver has found, which has no closed form.
ITERATED_CONDITIONING = 1e-2


@functools.partial(jax.jit, static_argnames=("width", "dtype", "batch_size"))
def factor(
    weights: Merged, width: int, dtype: jnp.dtype, batch_size: int
) -> tuple[PairFactors, Scales]:
    """Singular triplets of all pairwise differences, and the whitening, of every layer."""
    run = functools.partial(
        intersection.factor_pairs, width=width, dtype=dtype, batch_size=batch_size
    )
    return jax.vmap(run)(weights)


@functools.partial(jax.jit, static_argnames=("max_rank", "solver", "finest", "mixed"))
def intersect(
    weights: Merged,
    factors: PairFactors,
    scales: Scales,
    max_rank: int,
    solver: SubspaceIntersection,
    finest: str,
    mixed: bool,
) -> dict[str, Array]:
    """Closed form of every layer; with ``polish`` also all that follows it."""

    def one(weights: Merged, factors: PairFactors, scales: Scales) -> dict[str, Array]:
        known = solver.rank if isinstance(solver.rank, int) else None
        found = intersection.intersect(weights, factors, scales, max_rank, known)
        left, right = linalg.matmul(found.left, found.core), jnp.swapaxes(found.right, 1, 2)
        fields = {name: getattr(found, name) for name in (*CLOSED_FORM, "agree", "shared")}
        if not solver.polish:
            base = found.base.astype(finest)
            return {**fields, "base": base, **_balanced(left, right, found.ranks)}
        ready = _polished(
            weights, left, right, found.ranks, scales, solver, finest, mixed, found.conditioning
        )
        return fields | ready

    return jax.vmap(one)(weights, factors, scales)


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
) -> dict[str, Array]:
    """Most likely updates, the base decided on its grid, and the certificate, of one layer."""
    rule = solver.rounding
    likely, base, variance, ratio = likelihood.most_likely(
        weights,
        left,
        right,
        ranks,
        scales,
        rounding=rule,
        conditioning=conditioning,
    )
    if solver.base_dtype == "auto":
        amplification = None
        if mixed or finest != "float32":
            active = jnp.arange(left.shape[2], dtype=jnp.int32) < ranks[:, None]
            nothing = jnp.zeros(base.shape, bool)
            amplification = certificate.spread(
                weights,
                likely.left,
                likely.right,
                active,
                scales,
                nothing,
                rule,
                conditioning,
            ).amplification.astype(base.dtype)
        grid = grids.find_grid(base, variance, finest, amplification, ratio)
    else:
        grid = jnp.int32(STORAGE_DTYPES.index(solver.base_dtype))
    known = [grids.grid(name) for name in STORAGE_DTYPES]
    on = jax.tree.map(lambda *parts: jnp.stack(parts)[grid], *known)
    final = exact.resolve(
        weights,
        likely.left,
        likely.right,
        ranks,
        scales,
        on,
        ratio,
        rule,
        conditioning,
    )
    snapped = final.snapped
    # one direction that rows and columns nearly share escapes conjugate gradients and a replicate
    noise = jnp.mean(variance)
    hidden = jnp.where(conditioning < ILL_CONDITIONED, noise / conditioning / base.size, 0)
    error = jnp.mean(snapped.error) + hidden
    share = jnp.where(hidden > 0, 1 - hidden / error, 1)
    amplification = jnp.maximum(final.amplification, jnp.sqrt(hidden / noise).astype(jnp.float32))
    certain = (snapped.wrong < exact.certain_below(amplification)) & (conditioning >= UNSURE)
    return {
        **_balanced(final.left, final.right, ranks),
        "base": snapped.base.astype(jnp.float32),
        "grid": grid,
        "certain": certain,
        "residual_ratio": ratio,
        "final_ratio": final.residual_ratio,
        "iterations": likely.steps + final.steps,
        "rounds": likely.rounds + final.rounds,
        "amplification": amplification,
        "slack": jnp.max(final.slack),
        "expected_error": error,
        "mean_error": snapped.mean_error,
        "exact_fraction": share * (1 - jnp.mean(snapped.wrong, dtype=base.dtype)),
        "ambiguous_fraction": 1 - jnp.mean(certain, dtype=base.dtype),
    }


@functools.partial(jax.jit, static_argnames=("solver", "finest", "mixed"))
def polish(
    weights: Merged,
    left: Float[Array, "layer model row rank"],
    right: Float[Array, "layer model rank col"],
    ranks: Int[Array, "layer model"],
    solver: SubspaceIntersection,
    finest: str,
    mixed: bool,
) -> dict[str, Array]:
    """Refines, decides and certifies updates that another solver has found."""

    def one(weights: Merged, left: Array, right: Array, ranks: Array) -> dict[str, Array]:
        scales = intersection.noise_scales(weights, left.dtype)
        conditioning = jnp.asarray(ITERATED_CONDITIONING, left.dtype)
        return _polished(weights, left, right, ranks, scales, solver, finest, mixed, conditioning)

    return jax.vmap(one)(weights, left, right, ranks)


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
