"""jdetune beside the paper's algorithm in PyTorch: accuracy and time on the same real matrices.

    python -m benchmarks.spectral --count=5 --repeats=3

Merges the committed adapters into all-MiniLM-L6-v2, runs every solver on every matrix in turn
(interleaved, so that a slow minute hits all alike) and prints medians. The first call of each
solver compiles and is timed apart.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
from absl import app, flags

import jdetune
from benchmarks.families import merged_stacks
from benchmarks.paper import paper_in_torch
from jdetune.metrics import exact_fraction, log_mse

FLAGS = flags.FLAGS
flags.DEFINE_string("set", "minilm-distinct", "Which adapters; see benchmarks/families.py.")
flags.DEFINE_integer("count", 5, "Number of models.", lower_bound=3)
flags.DEFINE_integer("rank", 16, "Rank given to the paper's solver.")
flags.DEFINE_integer("steps", 300, "Steps of the paper's solver.")
flags.DEFINE_integer("layers", 4, "Number of matrices.", lower_bound=1)
flags.DEFINE_integer("repeats", 3, "Timed runs of each solver on each matrix.", lower_bound=1)


def solvers(rank: int, steps: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Name to a function from [model, row, col] to the base."""

    def ours(solver):
        return lambda stack: np.asarray(jdetune.recover(stack, solver).base)

    paper = jdetune.SpectralDeTuning
    return {
        "intersection": ours(jdetune.SubspaceIntersection()),
        "intersection, not refined": ours(jdetune.SubspaceIntersection(polish=False)),
        "intersection, float32 only": ours(jdetune.SubspaceIntersection(precision="float32")),
        "paper in JAX, full space": ours(paper(rank, steps)),
        "paper in JAX, core space": ours(paper(rank, steps, space="core")),
        "paper in PyTorch": lambda stack: paper_in_torch(stack, rank, steps),
        "mean of the models": lambda stack: stack.mean(0),
    }


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    layers = list(merged_stacks(FLAGS.set, FLAGS.count).values())[: FLAGS.layers]
    table = solvers(FLAGS.rank, FLAGS.steps)
    first, runs, scores = {}, {name: [] for name in table}, {name: [] for name in table}
    for name, solve in table.items():
        clock = time.perf_counter()
        solve(layers[0][1])
        first[name] = time.perf_counter() - clock
    for repeat in range(FLAGS.repeats):
        for truth, stack in layers:
            for name, solve in table.items():
                clock = time.perf_counter()
                base = solve(stack)
                runs[name].append(time.perf_counter() - clock)
                if repeat == 0:
                    scores[name].append((log_mse(base, truth), exact_fraction(base, truth)))
    shape = layers[0][1].shape
    print(f"{FLAGS.set}: {len(layers)} matrices {shape[1]}x{shape[2]}, {shape[0]} models, float32")
    print(f"{'solver':<28}{'W-error':>9}{'exact':>8}{'first s':>9}{'median s':>10}{'ratio':>8}")
    reference = statistics.median(runs["paper in PyTorch"])
    for name in table:
        error, exact = np.mean(scores[name], axis=0)
        median = statistics.median(runs[name])
        print(
            f"{name:<28}{error:>9.2f}{exact:>8.3f}{first[name]:>9.2f}{median:>10.4f}"
            f"{reference / median:>8.1f}"
        )
    print(
        "first s: with compiling; median s: one matrix; ratio: times faster than PyTorch's median"
    )


if __name__ == "__main__":
    app.run(main)
