"""All of an accelerator's figures in one run: the solver, its precision, the baseline, operations.

    python -m benchmarks.accelerator --out=DIR               # one GPU of 80 GB, about eight minutes
    python -m benchmarks.accelerator --out=DIR --small       # anything, in a minute

The closed form solves every attention matrix of a Mistral-7B-shaped model (128 layers: query and
output 4096x4096, key and value 1024x4096; eight models, rank 64). The merged weights are made on
the device and stay there, as do the recovered ones; the size of the rank axis, which
``jdetune.recover`` guesses from a first difference on the host, is given. ``recover`` itself, with
its checks and copies to the host, is timed on some of the layers apart.

``DIR/accelerator.json`` is written after every part: ``machine``, and under ``accelerator`` the
parts ``resident``, ``recover``, ``precision``, ``baseline``, ``operations``. What failed, and what
no time was left for, says so in ``error``.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from absl import app, flags

from jdetune.cli.main import prepare_environment

if __name__ == "__main__":  # before JAX starts
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.85")  # the rest is PyTorch's
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # compile time is measured
    prepare_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import jdetune  # noqa: E402
from benchmarks import limit, micro, solver_report  # noqa: E402
from benchmarks.solver_families import (  # noqa: E402
    RESIDENT,
    RESIDENT_SMALL,
    Chunk,
    Resident,
    make,
    make_chunks,
)
from benchmarks.tables import table  # noqa: E402
from jdetune import linalg, programs  # noqa: E402
from jdetune.machine import cores  # noqa: E402
from jdetune.metrics import exact_fraction, log_mse  # noqa: E402
from jdetune.noise import Merged, as_merged  # noqa: E402
from jdetune.solvers import rowspace  # noqa: E402

FAILURES = (RuntimeError, ValueError, TypeError, MemoryError, ImportError, jdetune.RecoveryFailed)
#: The solver's dtype of all that is small.
WIDE = jnp.dtype("float64")
CLOSED_FORM = jdetune.SubspaceIntersection(polish=False)


@contextlib.contextmanager
def products_at(precision: jax.lax.Precision) -> Iterator[None]:
    """The solver's matrix products at another precision than it asks for."""
    with mock.patch.object(linalg, "matmul", lambda a, b: jnp.matmul(a, b, precision=precision)):
        yield


def closed_form(rank: int, batch_size: int) -> Callable[[Merged], dict[str, jax.Array]]:
    """The short way of the closed form, compiled: base, factors, ranks and whether all is clear."""

    def run(weights: Merged) -> dict[str, jax.Array]:
        found = programs.row_spaces(weights, rank, batch_size)
        start = {name: found[name] for name in ("base", "left", "right", "ranks")}
        ready = programs.unpolished(start, str(weights.values.dtype))
        return ready | {"ranks": found["ranks"], "clear": found["clear"]}

    return jax.jit(run)


def with_grids(merged: jax.Array) -> Merged:
    """Stacks of layers with the grids of their models."""
    grids = as_merged(merged[0])[1:]
    return Merged(merged, *(jnp.asarray(np.tile(part, (merged.shape[0], 1))) for part in grids))


def rates(groups: tuple[Resident, ...]) -> dict[tuple[int, int], limit.Rates]:
    """The device's rates at every shape."""
    n_bytes = limit.STREAM_BYTES if groups[0].row > 1000 else 2**20
    return {
        shape: limit.measure(*shape, groups[0].rank, n_bytes=n_bytes)
        for shape in {(group.row, group.col) for group in groups}
    }


def least_seconds(groups: tuple[Resident, ...], known: dict, itemsize: int) -> float:
    """The limit of all layers together."""
    return sum(
        g.layers
        * limit.limit(known[g.row, g.col], g.n_models, g.row, g.col, g.rank, itemsize).seconds
        for g in groups
    )


def resident(
    groups: tuple[Resident, ...], sizes: list[int], dtype: str, repeats: int
) -> dict[str, Any]:
    """All layers, on the device from first to last, with the first chunk size that fits."""
    tried = {}
    for size in sizes:
        try:
            found = _resident(groups, size, dtype, repeats)
        except RuntimeError as error:  # memory, most likely
            tried[size] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        return found | {"layers_at_a_time": size, "tried": tried}
    raise RuntimeError(f"no chunk size works: {tried}")


def _resident(groups: tuple[Resident, ...], size: int, dtype: str, repeats: int) -> dict[str, Any]:
    rank, on_cpu = groups[0].rank, jax.default_backend() == "cpu"
    chunks = make_chunks(groups, size, dtype)
    solve = closed_form(rank, 1 if on_cpu else 2 * groups[0].n_models)
    weights = [with_grids(chunk.merged) for chunk in chunks]
    jax.block_until_ready(weights)
    times, by_group, found = [], {}, []
    with linalg.scope(WIDE):
        for _ in range(repeats + 1):
            found = []  # the arrays of the last run make room
            clock = time.perf_counter()
            found = [solve(one) for one in weights]
            jax.block_until_ready(found)
            times.append(time.perf_counter() - clock)
        for group in groups:
            own = [one for one, c in zip(weights, chunks, strict=True) if c.group is group]
            clock = time.perf_counter()
            jax.block_until_ready([solve(one)["base"] for one in own])
            by_group[group.name] = time.perf_counter() - clock
    first, *times = times
    layers = sum(group.layers for group in groups)
    right = sum(int(jnp.sum(jnp.all(one["ranks"] == rank, axis=1))) for one in found)
    clear = sum(int(jnp.sum(one["clear"])) for one in found)
    known = rates(groups)
    least = least_seconds(groups, known, jnp.dtype(dtype).itemsize)
    seconds = sorted(times)[len(times) // 2]
    return {
        "layers": layers,
        "n_models": groups[0].n_models,
        "rank": rank,
        "dtype": dtype,
        "bytes": sum(one.merged.nbytes for one in chunks),
        "seconds": seconds,
        "spread": [min(times), max(times)],
        "compile_seconds": max(first - seconds, 0.0),
        "seconds_by_group": by_group,
        "limit_seconds": least,
        "of_limit": seconds / least,
        "rates": {f"{r}x{c}": dataclasses.asdict(rate) for (r, c), rate in known.items()},
        "layers_solved": clear,
        "layers_with_all_ranks_right": right,
        "sample": _sample(groups, chunks, [one["base"] for one in found], dtype),
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def _sample(
    groups: tuple[Resident, ...], chunks: list[Chunk], bases: list[jax.Array], dtype: str
) -> dict[str, Any]:
    """W-error and exact fraction of the first layer of every group, whose base is made again."""
    found = {}
    for group in groups:
        place = next(i for i, chunk in enumerate(chunks) if chunk.group is group)
        seed = jnp.int32(chunks[place].seeds[0])
        truth = np.asarray(jax.jit(lambda s, g=group: make(g, s, dtype)[0])(seed))
        base = np.asarray(bases[place][0])
        found[group.name] = {
            "w_error": log_mse(base, truth),
            "exact": exact_fraction(base, truth),
        }
    return found


def recovered(group: Resident, count: int, dtype: str, repeats: int) -> dict[str, Any]:
    """``jdetune.recover`` of a few layers on the device; results come to the host."""
    some = dataclasses.replace(group, layers=count)
    stack = make_chunks((some,), count, dtype)[0].merged
    layers = {f"layer.{k}": stack[k] for k in range(count)}
    times = []
    for _ in range(repeats + 1):
        clock = time.perf_counter()
        found = jdetune.recover(layers, CLOSED_FORM, throw=True)
        jax.block_until_ready([found[name].base for name in layers])
        times.append((time.perf_counter() - clock) / count)
    first, *times = times
    seconds = sorted(times)[len(times) // 2]
    return {
        "group": group.name,
        "layers": count,
        "seconds_a_layer": seconds,
        "compile_seconds": max(count * (first - seconds), 0.0),
    }


def precisions(group: Resident, dtype: str) -> list[dict[str, Any]]:
    """W-error of one layer at every precision of the algebra, and with the hardware's default."""
    base, merged = jax.jit(lambda seed: make(group, seed, dtype))(jnp.int32(0))
    truth, rows = np.asarray(base), []

    def closed(precision: Any) -> Any:
        solver = dataclasses.replace(CLOSED_FORM, precision=precision)
        return jdetune.recover(merged, solver, throw=True).base

    def by_default() -> Any:
        with linalg.scope(WIDE), products_at(jax.lax.Precision.DEFAULT):
            run = jax.jit(lambda w: rowspace.solve_layer(w, group.rank).base)
            return run(as_merged(merged))

    names = ("auto", "float32", "float64")
    table: dict[str, Callable[[], Any]] = {n: lambda n=n: closed(n) for n in names}
    table["auto, products at the hardware's default"] = by_default
    for name, run in table.items():
        try:
            found = np.asarray(run()).astype(truth.dtype)
            rows.append({"precision": name, "w_error": log_mse(found, truth)})
        except FAILURES as error:
            rows.append({"precision": name, "error": f"{type(error).__name__}: {error}"})
    return rows


def baseline(groups: tuple[Resident, ...], dtype: str, steps: int = 1000) -> dict[str, Any]:
    """The paper's solver in PyTorch on this device, extrapolated from a few steps."""
    import torch

    from benchmarks import paper

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise ImportError("PyTorch here has no CUDA: no baseline on this device")
    by_shape, total = {}, 0.0
    for group in groups:
        shape = f"{group.row}x{group.col}"
        if shape not in by_shape:
            merged = np.array(jax.jit(lambda g=group: make(g, jnp.int32(0), dtype)[1])())
            merged = merged.astype(np.float32)
            if device == "cpu":
                torch.set_num_threads(paper.faster_threads(merged, group.rank, cores()))
            found = paper.measure_steps(merged, group.rank, steps, device)
            by_shape[shape] = dataclasses.asdict(found)
        total += group.layers * by_shape[shape]["seconds"]
    return {
        "extrapolated": True,
        "device": device,
        "steps": steps,
        "torch": torch.__version__,
        "by_shape": by_shape,
        "seconds": total,
    }


def main(argv: list[str]) -> None:
    """Runs the parts in turn, as long as the budget lasts."""
    if len(argv) > 1:
        raise app.UsageError("python -m benchmarks.accelerator takes flags only")
    given = flags.FLAGS
    groups = RESIDENT_SMALL if given.small else RESIDENT
    smallest = min(groups, key=lambda group: group.row * group.col)
    sizes = [int(size) for size in given.chunk]
    parts: dict[str, Callable[[], Any]] = {
        "resident": lambda: resident(groups, sizes, given.dtype, given.repeats),
        "baseline": lambda: baseline(groups, given.dtype),
        "precision": lambda: precisions(smallest, given.dtype),
        "recover": lambda: recovered(groups[0], min(4, groups[0].layers), given.dtype, 1),
        "operations": lambda: list(micro.rows(given.small)),
    }
    done: dict[str, Any] = {}
    result = {"machine": solver_report.machine(cores()), "accelerator": done}
    print(solver_report.about(result["machine"]), flush=True)
    start = time.perf_counter()
    for name, run in parts.items():
        clock = time.perf_counter()
        if clock - start > given.budget:
            done[name] = {"error": "no time was left"}
        else:
            try:
                done[name] = run()
            except FAILURES as error:
                done[name] = {"error": f"{type(error).__name__}: {error}"}
        if name == "baseline" and "seconds" in done[name] and "seconds" in done["resident"]:
            done[name]["times_faster"] = done[name]["seconds"] / done["resident"]["seconds"]
        print(f"{name}: {time.perf_counter() - clock:.1f} s", flush=True)
        print(text(name, done), flush=True)
        solver_report.save(result, Path(given.out) / "accelerator.json")


def text(name: str, done: dict[str, Any]) -> str:
    """A part in words."""
    part: Any = done[name]
    if "error" in part:
        return f"  FAILED: {part['error']}"
    if name == "operations":
        return micro.text(part)
    if name == "precision":
        said = [[row["precision"], f"{row.get('w_error', row.get('error'))}"] for row in part]
        return table(["precision", "W-error"], said)
    if name == "resident":
        sample = "; ".join(f"{g} {s['w_error']:.2f}" for g, s in part["sample"].items())
        return (
            f"  {part['layers_solved']} of {part['layers']} layers in {part['seconds']:.3f} s,"
            f" {part['of_limit']:.2f} times the limit of {part['limit_seconds']:.3f} s; compile"
            f" {part['compile_seconds']:.1f} s\n  ranks right in"
            f" {part['layers_with_all_ranks_right']} layers; W-error: {sample}\n"
            f"  seconds by group: {part['seconds_by_group']}; {part['rates']}"
        )
    if name == "baseline":
        faster = part.get("times_faster")
        said = f"; the closed form is {faster:.0f} times faster" if faster else ""
        return f"  all layers in {part['seconds']:.0f} s (extrapolated){said}"
    return f"  {part}"


def define_flags() -> None:
    """The flags of this command."""
    flags.DEFINE_string("out", None, "Folder for accelerator.json.", required=True)
    flags.DEFINE_boolean("small", False, "Sizes that any machine does at once.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Storage dtype.")
    flags.DEFINE_list("chunk", ["8", "4", "2", "1"], "Layers at a time; the first that works.")
    flags.DEFINE_integer("repeats", 3, "Timed runs of all layers.", lower_bound=1)
    flags.DEFINE_integer("budget", 420, "Seconds after which no further part is begun.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
