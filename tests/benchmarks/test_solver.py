"""The solver's benchmark: formula, baseline, rows, README's table, and that of accelerators."""

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks import (  # noqa: E402
    accelerator,
    limit,
    micro,
    paper,
    readme_table,
    solver,
    solver_families,
    solver_report,
    tables,
)
from benchmarks.solver_families import FAMILIES, RESIDENT, RESIDENT_SMALL  # noqa: E402
from jdetune import synth  # noqa: E402
from jdetune.metrics import log_mse  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """PyTorch's threads wait for each other where other tests run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny():
    """One layer and few steps, measured once; the paper's solver fails."""
    case = dataclasses.replace(FAMILIES["tiny"][0], layers=2)
    with pytest.MonkeyPatch.context() as patch:

        def broken(*arguments, **more):
            raise RuntimeError("no convergence")

        patch.setattr(paper, "paper_in_torch", broken)
        names = ["closed form", "one layer", "full", "polish", "paper"]
        return solver.run_case(case, names, 2)


def test_the_limit_is_the_formula():
    # (2 * 8 + 1) * 1024 * 4096 * 4 bytes; 4 * 8 * 1024 * 4096 * 136 operations
    assert limit.work(8, 1024, 4096, 64) == (285_212_672, 18_253_611_008)
    assert limit.work(8, 1024, 4096, 64, itemsize=2)[0] == 142_606_336
    slow_memory = limit.limit(limit.Rates(stream=1e9, gemm=1e15), 8, 1024, 4096, 64)
    assert slow_memory.seconds == pytest.approx(0.285212672)
    slow_product = limit.limit(limit.Rates(stream=1e15, gemm=1e11), 8, 1024, 4096, 64)
    assert slow_product.seconds == pytest.approx(0.18253611008)


def test_rates_are_measured():
    rates = limit.measure(64, 64, 4, repeats=2, n_bytes=2**16)
    assert rates.stream > 0
    assert rates.gemm > 0


def test_extrapolation_takes_the_shortest_schedule():
    assert paper.ranks_of_schedule(1) == [1]
    assert paper.ranks_of_schedule(64) == [1, 2, 4, 8, 16, 32, 64]
    assert paper.extrapolate({1: 1.0, 2: 2.0, 3: 3.0}, 300).seconds == 150 * 1 + 150 * 3
    # of 5 steps the third sets the last rank, and two have it
    assert paper.extrapolate({1: 1.0, 3: 3.0}, 5).seconds == 3 * 1 + 2 * 3
    # a cheaper rank on the way is taken as long as may be
    assert paper.extrapolate({1: 2.0, 2: 1.0, 4: 3.0}, 4).seconds == 2 * 1 + 2 * 3


def test_extrapolation_times_every_rank():
    stack = synth.family(3, 32, 24, 3, seed=0).merged
    found = paper.measure_steps(stack, 3, 10, repeats=1)
    assert list(found.step_seconds) == [1, 2, 3]
    assert found.seconds > 0
    assert paper.faster_threads(stack, 3, 1) == 1


def test_the_papers_algorithm_finds_an_easy_base():
    family = synth.family(6, 64, 48, 2, seed=0, decay=0.5)
    base = paper.paper_in_torch(family.merged, 2, 300)
    assert log_mse(base, family.base) < -15
    assert log_mse(family.merged.mean(0), family.base) > -8


def test_layers_of_a_batch_differ_and_large_shapes_are_extrapolated():
    (_, one), (_, other) = FAMILIES["tiny"][0].stacks().values()
    assert not np.array_equal(one, other)
    assert all(case.extrapolate for case in FAMILIES["mistral7b"])
    assert not FAMILIES["vit"][0].extrapolate
    assert sum(group.layers for group in RESIDENT) == 128


def test_a_run_has_every_figure(tiny):
    assert {"n_bytes", "flops", "seconds", "stream", "gemm"} <= set(tiny["limit"])
    assert {"row", "col", "n_models", "rank", "dtype", "layers", "extrapolated"} <= set(tiny)
    for name in ("closed form", "one layer", "full"):
        entry = tiny["solvers"][name]
        assert {"seconds", "spread", "compile_seconds", "w_error", "exact", "failed"} <= set(entry)
        assert entry["runs"] == 2
        assert entry["w_error"] < -18  # the rounding's own is near -19.5
    assert tiny["solvers"]["full"]["w_error"] < tiny["solvers"]["closed form"]["w_error"]
    assert tiny["solvers"]["polish"]["seconds"] > 0
    assert len(solver_report.cells(tiny)) == len(solver_report.HEADER)


def test_a_failure_is_a_row(tiny):
    assert tiny["solvers"]["paper"] == {"error": "RuntimeError: no convergence"}
    assert "FAILED: RuntimeError: no convergence" in solver_report.lines(tiny)
    lost = {"name": "x", "family": "vit", "error": "too large"}
    assert "FAILED: too large" in solver_report.lines(lost)
    assert len(solver_report.cells(lost)) == len(solver_report.HEADER)
    assert "| x: FAILED |" in solver_report.summary([tiny, lost])
    assert tables.exit_code(solver_report.checks([tiny])) == 0
    assert tables.exit_code(solver_report.checks([lost])) == 1


def test_json_and_picture_are_written(tiny, tmp_path):
    machine = solver_report.machine(1)
    curves = [{**tiny, "family": "scaling-size", "row": size} for size in (64, 128)]
    result = {"machine": machine, "rows": [tiny, *curves, {"name": "x", "nan": float("nan")}]}
    solver_report.save(result, tmp_path / "a" / "r.json")
    read = json.loads((tmp_path / "a" / "r.json").read_text())
    assert read["rows"][0] == tiny
    assert read["rows"][-1]["nan"] is None
    assert {"processor", "device", "cores", "torch_threads", "load", "jax"} <= set(read["machine"])
    pytest.importorskip("matplotlib")
    solver_report.plot(result, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 10_000


def row(**more):
    least = {"n_bytes": 1, "flops": 1, "seconds": 0.25, "stream": 1.0, "gemm": 1.0}
    solvers = {
        "closed form": {"seconds": 0.5, "w_error": -20.0, "exact": 0.9},
        "float64": {"seconds": 2.0, "w_error": -20.2},
        "paper": {"seconds": 100.0},
    }
    known = {"name": "case", "family": "vit", "row": 1024, "col": 1024, "extrapolated": True}
    return known | {"limit": least, "solvers": solvers} | more


def test_checks_hold_the_targets():
    found = {check.what: check.passed for check in solver_report.checks([row()])}
    assert found == {
        "case: times faster": True,
        "case: of the limit": True,
        "case: W-error less float64's": False,
    }
    small = solver_report.checks([row(family="sd15", row=640, col=640)])
    assert [check.what for check in small] == ["case: W-error less float64's"]
    slow = solver_report.checks([row(family="mistral7b")])
    assert not slow[0].passed
    whole = row()["solvers"] | {"one layer": {"seconds": 1.0}, "full": {"seconds": 12.0}}
    what = "case: all that follows over the closed form"
    late = {check.what: check for check in solver_report.checks([row(solvers=whole)])}[what]
    assert (late.figure, late.passed) == ("11.0", False)
    measured = row()["solvers"] | {"paper": {"seconds": 100.0, "w_error": -21.0}}
    assert not solver_report.checks([row(solvers=measured)])[-1].passed


def test_the_readme_table_comes_from_the_results():
    machine = solver_report.machine(1) | {"processor": "a processor"}
    text = readme_table.block([{"machine": machine, "rows": [row(), row(family="scaling-n")]}])
    assert ("huge pages" in text) == machine["huge_pages"]
    assert "huge pages" in solver_report.about(machine | {"huge_pages": True})
    assert text.count("\n| case | 500") == 1
    assert "| case | 500.0 | 200* | 2.0 | -20.00 | -20.20 | - | - | - |" in text
    assert "extrapolated" in text.splitlines()[-1]
    assert text.startswith("a processor (")
    begin, end = (f"<!-- performance: {part} -->" for part in ("begin", "end"))
    again = tables.put_between(f"a\n{begin}\nold\n{end}\nb\n", readme_table.MARKED, text)
    assert again == f"a\n{begin}\n{text}\n{end}\nb\n"
    assert readme_table.block([]) == ""
    with pytest.raises(ValueError, match="markers"):
        tables.put_between(f"{end} {begin}", readme_table.MARKED, text)


def test_readme_is_in_step_with_the_results():
    readme = (readme_table.ROOT / "README.md").read_text()
    text = readme_table.block(readme_table.results())
    again = tables.put_between(readme, readme_table.MARKED, text)
    assert again == readme, "run python -m benchmarks.readme_table"


def test_all_layers_are_solved_on_the_device():
    found = accelerator.resident(RESIDENT_SMALL, [2], "float32", 1)
    assert found["layers"] == found["layers_solved"] == found["layers_with_all_ranks_right"] == 5
    assert found["bytes"] == 5 * 3 * 64 * 48 * 4
    assert set(found["sample"]) == set(found["seconds_by_group"]) == {"query", "key"}
    assert all(one["w_error"] < -18 for one in found["sample"].values())
    assert found["of_limit"] == found["seconds"] / found["limit_seconds"]
    machine = solver_report.machine(1)
    done = {"resident": found, "baseline": {"times_faster": 250.0, "extrapolated": True}}
    text = readme_table.block([{"machine": machine, "accelerator": done}])
    assert "| 5 layers on the device, n=3 r=4 float32, " in text
    assert "| 250* |" in text
    assert "5 of 5 layers" in accelerator.text("resident", done)


def test_chunks_that_do_not_fit_are_made_smaller(monkeypatch):
    def fit(groups, size, dtype, repeats):
        if size > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")
        return {"layers": 5}

    monkeypatch.setattr(accelerator, "_resident", fit)
    found = accelerator.resident(RESIDENT_SMALL, [4, 2, 1], "float32", 1)
    assert found["layers_at_a_time"] == 2
    assert found["tried"] == {4: "RuntimeError: RESOURCE_EXHAUSTED: out of memory"}
    with pytest.raises(RuntimeError, match="no chunk size works"):
        accelerator.resident(RESIDENT_SMALL, [8, 4], "float32", 1)


def test_the_baseline_of_the_device_is_extrapolated_over_all_layers():
    group = solver_families.Resident("query", 24, 16, 3, n_models=3, rank=2)
    found = accelerator.baseline((group,), "float32", steps=10)
    assert found["seconds"] == pytest.approx(3 * found["by_shape"]["24x16"]["seconds"])
    assert found["device"] == "cpu"


def test_operations_that_a_device_lacks_are_rows():
    found = list(micro.rows(small=True, repeats=1))
    kinds = {(one["what"], one["kind"]): one for one in found}
    assert kinds["eigh", "float64"]["seconds"] > 0
    assert kinds["product", "F64_F64_F64"]["relative_error"] < 1e-6
    assert "not supported" in kinds["product", "TF32_TF32_F32"]["error"]  # on CPU
    assert {"host to device", "device to host"} <= {one["what"] for one in found}
    assert len(micro.text(found).splitlines()) == len(found) + 2
