"""The rank schedule against its rules written out in plain Python, under every transform."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jdetune import rank_schedule
from jdetune.rank_schedule import RankSchedule

N_STEPS = 64
INF, NAN = math.inf, math.nan
SCHEDULE = RankSchedule(patience=3)


class PlainSchedule:
    """The rules, one sentence at a time; losses are what float32 holds of them."""

    def __init__(self, schedule: RankSchedule, end_rank: int, n_steps: int) -> None:
        self.schedule, self.end_rank, self.n_steps = schedule, end_rank, n_steps
        self.step, self.rank = 0, schedule.start_rank
        self.best, self.bad_steps = INF, 0

    def advance(self, loss: float) -> None:
        self.step += 1
        last_steps = self.n_steps * self.schedule.force_end_rank_percent
        if not self.step < self.n_steps - last_steps:
            self.rank = self.end_rank
            return
        if float(np.float32(loss)) < self.best:
            self.best, self.bad_steps = float(np.float32(loss)), 0
        else:
            self.bad_steps += 1
        if self.bad_steps > self.schedule.patience:
            self.rank = min(self.rank * self.schedule.factor, self.end_rank)
            self.bad_steps = 0

    def trace(self, losses: Sequence[float]) -> np.ndarray:
        """(rank, best, bad steps) after each loss, [step, 3]."""
        rows = []
        for loss in losses:
            self.advance(loss)
            rows.append((self.rank, self.best, self.bad_steps))
        return np.array(rows)


def noisy(seed: int) -> list[float]:
    rng = np.random.default_rng(seed)
    falling = np.exp(-0.1 * np.arange(N_STEPS))
    return list(falling * rng.uniform(0.5, 2.0, N_STEPS))


def stairs(width: int) -> list[float]:
    return [1.0 / (1 + step // width) for step in range(N_STEPS)]


#: Name to (losses, end rank, number of steps the schedule is told).
CASES: dict[str, tuple[list[float], int, int]] = {
    "falls": ([1.0 / (1 + s) for s in range(N_STEPS)], 16, N_STEPS),
    "rises": ([1.0 + s for s in range(N_STEPS)], 16, N_STEPS),
    "plateau from the start (ties)": ([1.0] * N_STEPS, 16, N_STEPS),
    "plateau, never forced": ([1.0] * N_STEPS, 16, 1000),
    "plateau, end rank no power of two": ([1.0] * N_STEPS, 11, 1000),
    "fires at the end rank": ([1.0] * N_STEPS, 2, 1000),
    "start is the end": ([1.0] * N_STEPS, 1, 1000),
    "stairs as wide as the patience": (stairs(3), 16, 1000),
    "stairs one wider": (stairs(4), 16, 1000),
    "stairs two wider": (stairs(5), 16, 1000),
    "two values in turn": ([1.0, 0.5] * (N_STEPS // 2), 16, 1000),
    "falls by less than float32 holds": (
        [1.0 - 1e-9 * s for s in range(N_STEPS)],
        16,
        1000,
    ),
    "falls by one float32 each": (
        list(1 - 2.0**-24 * np.arange(N_STEPS)),
        16,
        1000,
    ),
    "NaN throughout": ([NAN] * N_STEPS, 16, 1000),
    "NaN then falls": ([NAN] * 3 + stairs(1)[3:], 16, 1000),
    "NaN in every gap": ([NAN, 1.0, NAN, 0.9] * (N_STEPS // 4), 16, 1000),
    "infinity throughout": ([INF] * N_STEPS, 16, 1000),
    "infinity then falls": ([INF] * 4 + stairs(2)[4:], 16, 1000),
    "minus infinity": ([-INF] * N_STEPS, 16, 1000),
    "zero": ([0.0] * N_STEPS, 16, 1000),
    "worse after a new rank, best is kept": (
        [1.0] * 5 + [2.0, 1.9, 1.8, 1.7] * 14 + [0.5] * 3,
        64,
        1000,
    ),
    "forced on a plateau": ([1.0] * N_STEPS, 16, 12),
    "forced just as it fires": ([1.0] * N_STEPS, 16, 10),
    "forced while falling": (stairs(1), 16, 20),
    "forced at an odd number of steps": ([1.0] * N_STEPS, 16, 13),
    "forced at once": ([1.0] * N_STEPS, 16, 1),
    "noisy 0": (noisy(0), 16, N_STEPS),
    "noisy 1": (noisy(1), 64, 1000),
    "noisy 2": (noisy(2), 5, 100),
}
OTHERS = {
    "patience 0": RankSchedule(patience=0),
    "patience 15": RankSchedule(),
    "factor 3, start 2": RankSchedule(start_rank=2, factor=3, patience=2),
    "never forced": RankSchedule(patience=1, force_end_rank_percent=0.0),
    "always forced": RankSchedule(patience=1, force_end_rank_percent=1.0),
    "a share that float32 does not hold": RankSchedule(patience=1, force_end_rank_percent=0.29),
}

LOSSES = np.array([losses for losses, _, _ in CASES.values()], np.float32)
END_RANKS = np.array([end for _, end, _ in CASES.values()], np.int32)
STEPS = np.array([steps for _, _, steps in CASES.values()], np.int32)


def expected(schedule: RankSchedule) -> np.ndarray:
    traces = [PlainSchedule(schedule, end, n).trace(x) for x, end, n in CASES.values()]
    return np.array(traces)


def scan_trace(schedule, losses, end_rank, n_steps):
    """Trace [step, ..., 3]; the state has the shape of one step's losses."""
    start = rank_schedule.init(schedule, losses.shape[1:])
    start = jax.tree.map(lambda x: x + jnp.zeros_like(losses, shape=x.shape, dtype=x.dtype), start)

    def step(state, loss):
        state = rank_schedule.advance(schedule, end_rank, n_steps, state, loss)
        rank, bad = state.rank.astype(jnp.float32), state.bad_steps.astype(jnp.float32)
        return state, jnp.stack([rank, state.best, bad], axis=-1)

    return jax.lax.scan(step, start, losses)[1]


def test_there_are_more_than_twenty_sequences_and_they_differ():
    traces = expected(SCHEDULE)
    assert len(CASES) > 20
    assert len({trace.tobytes() for trace in traces}) > 20
    assert {1, 2, 4, 8, 16, 11, 5} <= set(traces[:, :, 0].ravel().astype(int))


def test_step_by_step_as_it_comes():
    """No transform at all, Python numbers for the end rank and the steps."""
    for losses, end_rank, n_steps in list(CASES.values())[::3]:
        plain = PlainSchedule(SCHEDULE, end_rank, n_steps)
        state = rank_schedule.init(SCHEDULE)
        for loss in losses:
            plain.advance(loss)
            state = rank_schedule.advance(SCHEDULE, end_rank, n_steps, state, jnp.float32(loss))
            assert int(state.step) == plain.step
            assert int(state.rank) == plain.rank
            assert float(state.best) == plain.best
            assert int(state.bad_steps) == plain.bad_steps


@pytest.mark.parametrize("name", ["patience 3", *OTHERS])
def test_jit_and_vmap_and_one_state_for_all_layers(name):
    schedule = OTHERS.get(name, SCHEDULE)
    one = functools.partial(scan_trace, schedule)
    single = jax.jit(one)
    jitted = [single(*args) for args in zip(LOSSES, END_RANKS, STEPS, strict=True)]
    mapped = jax.jit(jax.vmap(one))(LOSSES, END_RANKS, STEPS)
    together = jax.jit(one)(LOSSES.T, END_RANKS, STEPS)
    truth = expected(schedule)
    np.testing.assert_array_equal(np.array(jitted), truth)
    np.testing.assert_array_equal(mapped, truth)
    np.testing.assert_array_equal(np.swapaxes(together, 0, 1), truth)


def test_shard_map():
    count = jax.device_count()
    rows = np.resize(np.arange(len(CASES)), -(-len(CASES) // count) * count)
    mesh = jax.make_mesh((count,), ("layer",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("layer")

    def local(losses, end_ranks, n_steps):
        return jnp.swapaxes(scan_trace(SCHEDULE, losses.T, end_ranks, n_steps), 0, 1)

    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))
    trace = sharded(LOSSES[rows], END_RANKS[rows], STEPS[rows])
    assert count > 1
    assert len(trace.sharding.device_set) == count
    np.testing.assert_array_equal(trace, expected(SCHEDULE)[rows])


def test_the_forced_part_starts_where_python_says():
    """For traced step counts too, with shares whose products round."""
    counts = np.arange(1, 400, dtype=np.int32)
    for share in (0.0, 0.1, 0.29, 0.3, 1 / 3, 0.5, 0.57, 0.7, 1.0):
        schedule = RankSchedule(force_end_rank_percent=share)
        traced = jax.jit(functools.partial(rank_schedule.forced_from, schedule))(counts)
        assert str(traced.dtype) == "int32"
        for count, first in zip(counts.tolist(), np.asarray(traced).tolist(), strict=True):
            assert not first < count - count * share
            assert first - 1 < count - count * share
            assert first == rank_schedule.forced_from(schedule, count)


def test_integers_stay_int32_and_best_keeps_its_dtype():
    for dtype in ("float32", "float16"):
        state = rank_schedule.init(SCHEDULE, (3,), jnp.dtype(dtype))
        state = rank_schedule.advance(SCHEDULE, 4, 10, state, jnp.ones(3))
        kinds = [str(field.dtype) for field in state]
        assert kinds == ["int32", "int32", dtype, "int32"]


@pytest.mark.parametrize(
    "bad",
    [
        {"start_rank": 0},
        {"factor": 0},
        {"patience": -1},
        {"force_end_rank_percent": 1.5},
        {"force_end_rank_percent": NAN},
    ],
)
def test_impossible_schedules_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        RankSchedule(**bad)
