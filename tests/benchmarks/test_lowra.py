"""LoWRA Bench offline: stand-ins like what they are made like, traces, checks that can fail."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from benchmarks import (  # noqa: E402
    lowra_checks,
    lowra_figures,
    lowra_plans,
    lowra_sources,
    lowra_tables,
    lowra_trace,
    paper,
)
from jdetune import synth  # noqa: E402
from jdetune.bench.layers import Layer, Lora, Source  # noqa: E402
from jdetune.bench.methods import TITLES  # noqa: E402
from jdetune.bench.subsets import CONTRADICTIONS  # noqa: E402
from jdetune.metrics import log_mse  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small products: PyTorch's threads only wait for each other, and for other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(shared=0.9, n=4, rank=6, shape=(160, 128)):
    """A real subset's stand-in for tests: models share part of every direction of their columns."""
    rng = np.random.default_rng(0)
    common = np.linalg.qr(rng.standard_normal((shape[0], rank)))[0]
    values = np.exp(-np.arange(rank) / 2)
    loras = []
    for i in range(n):
        own = np.linalg.qr(rng.standard_normal((shape[0], rank)))[0]
        left = np.linalg.qr(np.sqrt(shared) * common + np.sqrt(1 - shared) * own)[0] * values
        right = np.linalg.qr(rng.standard_normal((shape[1], rank)))[0].T
        loras.append(
            Lora(f"{i}", rank, float(rank), 0.1 * left.astype(np.float32), right.astype(np.float32))
        )
    layer = Layer(
        "layers.0.q", (0.05 * rng.standard_normal(shape)).astype(np.float32), tuple(loras)
    )
    models = tuple(lora.name for lora in loras)
    return Source((layer.name,), models, lambda names: iter([layer]), {"data": "made"})


def test_stand_ins_have_the_likeness_that_was_measured():
    source = made()
    like = lowra_sources.likeness(source, "made", source.names)
    stand_in = lowra_sources.stand_in("shapes", {"layers.0.k": (192, 144)}, 6, like, models=4)
    again = lowra_sources.likeness(stand_in, "again", stand_in.names)
    # over the rms of a base that is drawn anew
    assert again.ratio == pytest.approx(like.ratio, rel=0.02)
    assert again.rms == pytest.approx(like.rms, rel=0.02)
    np.testing.assert_allclose(again.spectrum, like.spectrum, rtol=1e-3)
    # columns share directions, rows only what random spaces share
    assert np.mean(like.cols) > 0.7 > 0.4 > np.mean(like.rows)
    np.testing.assert_allclose(again.cols, like.cols, atol=0.15)
    assert np.mean(again.rows) < 0.45
    first, second = (list(stand_in.read(stand_in.names))[0] for _ in range(2))
    np.testing.assert_array_equal(first.base, second.base)


def test_stand_ins_are_called_so_wherever_they_are_shown():
    for plan in (*lowra_plans.PLANS.values(), *lowra_plans.QUICK):
        assert plan.real != ("stand-in" in plan.title)
        assert plan.real != plan.about.startswith("Stand-in")
        assert plan.real != (plan.like is not None)
        assert plan.layers <= 12
        assert plan.repeats <= 3
        assert min(plan.counts) == 3


@pytest.fixture(scope="module")
def traced():
    family = synth.family(n_models=5, row=64, col=48, rank=4, seed=1)
    on, off = (
        lowra_trace.paper_trace(family.merged, family.base, 4, 120, scheduled)
        for scheduled in (True, False)
    )
    return family, on, off


def test_a_trace_ends_where_the_algorithm_ends(traced):
    family, on, _ = traced
    base = paper.paper_in_torch(family.merged, 4, 120)
    assert on.errors[-1] == pytest.approx(log_mse(base, family.base), abs=1e-9)
    assert on.ranks[0] == 1
    assert on.ranks[-1] == 4
    assert len(on.losses) == len(on.errors) == 120


def test_without_the_scheduler_every_step_has_the_true_rank(traced):
    _, _, off = traced
    assert set(off.ranks) == {4}


def fake(errors, losses=None):
    losses = losses or [10.0**e for e in errors]
    return lowra_trace.Trace(tuple(losses), tuple(errors), (1,) * len(errors), 0.0)


def test_effects_of_the_scheduler_are_told_apart():
    fast, slow = fake([-5.0, -9.0, -9.0]), fake([-1.0, -3.0, -8.0])
    other, wide = fake([-5.0, -9.1, -9.1]), fake([-1.0, -2.0, -6.0])
    found = lowra_trace.scheduler_effects([fast, other], [slow, wide])
    assert found["speed"]
    assert found["spread"]
    assert found["precision"]
    turned = lowra_trace.scheduler_effects([slow, wide], [fast, other])
    assert not turned["speed"]
    assert not turned["spread"]
    assert not turned["precision"]


def test_loss_and_error_correlate_only_if_they_do():
    assert lowra_trace.correlation([fake([-1.0, -2.0, -3.0])])["pooled"] == pytest.approx(1.0)
    apart = fake([-1.0, -2.0, -3.0], [1e-3, 1e-2, 1e-1])
    assert lowra_trace.correlation([apart])["pooled"] == pytest.approx(-1.0)


@pytest.mark.slow
def test_core_space_follows_full_space():
    family = synth.family(n_models=4, row=64, col=48, rank=4, seed=2)
    found = lowra_trace.equivalence(family.merged, family.base, 4, 60)
    assert found["same_ranks"]
    # float64 leaves about 1e-9 of the update; rounding of stored weights outside the core more
    assert found["base_difference"] < 1e-4
    errors = {run["run"]: run["w_error"] for run in found["runs"]}
    assert errors["core space, float64"] == pytest.approx(errors["full space, float64"], abs=0.1)


def cell(method, error, n=3, layer="layers.0.q", repeat=0, status="OK"):
    return {
        "layer": layer, "n": n, "repeat": repeat, "method": method, "status": status,
        "w_error": error, "w_error_wide": error, "exact_fraction": 0.9, "kind": "q", "depth": 0,
        "seconds": 0.1, "first_call": False, "predicted_error": error, "amplification": 1.5,
        "reason": None,
    }  # fmt: skip


def results_of(cells):
    from jdetune.bench import summary

    traces = {
        "n": 5, "on": [dataclasses.asdict(fake([-5.0, -9.0]))] * 2,
        "off": [dataclasses.asdict(fake([-1.0, -8.0]))] * 2, "ours": -10.0,
        "ours_layers": [-10.0, -10.1],
        "correlation": {"curve": 0.997, "pooled": 0.995, "least_layer": 0.99},
        "effects": lowra_trace.scheduler_effects(
            [fake([-5.0, -9.0])] * 2, [fake([-1.0, -8.0]), fake([-1.0, -7.0])]
        ),
    }  # fmt: skip
    whole = {
        "n": 3, "new_tokens": 4, "base_perplexity": 9.0, "texts": [
            {"prompt": "p", **dict.fromkeys(("base", *TITLES), "t")}
        ],
        "methods": {"jdetune": {"w_error": -9.0, "layers": 1, "without_base": 0, "answers": 100,
                                "equal": 100, "log_cosine": -16.0, "perplexity": 9.0,
                                "seconds": 1.0}},
    }  # fmt: skip
    subset = {
        "title": "Tiny", "real": True, "about": "Real.", "cells": cells, "ranks": [4],
        "rows": summary.summarize(cells), "gaps": lowra_checks.gaps(cells), "traces": traces,
        "exposure": lowra_checks.exposure(cells, {"layers.0.q": -19.0, "layers.1.q": -18.0}),
        "sampled": [{"n": 3, "method": m, "activation_distance": 0.1} for m in ("paper",)],
        "sampling": {"layers": 2, "layers_in_all": 4, "models_in_all": 5, "n": [3], "repeats": 1},
        "settings": {"steps": 300}, "whole": whole, "like": None,
    }  # fmt: skip
    return {
        "command": "python -m benchmarks.lowra", "seconds": 60.0, "cells_made": 1,
        "cells_in_all": 1, "missing": {"dinov2": "train them"}, "subsets": {"dinov2-tiny": subset},
        "machine": {"processor": "p", "cores": 2, "load": 0.0, "date": "d", "jdetune": "0"},
        "equivalence": {"shape": [5, 8, 8], "rank": 2, "steps": 3, "core_width": [8, 8],
                        "base_difference": 1e-9, "same_ranks": True, "runs": []},
    }  # fmt: skip


GOOD = [
    *(cell(m, e, layer="layers.0.q") for m, e in [("mean-lora", -5.0), ("paper", -8.0)]),
    *(cell(m, e, layer="layers.1.q") for m, e in [("mean-lora", -5.0), ("paper", -8.0)]),
    cell("jdetune", -9.0, layer="layers.0.q"),
    cell("jdetune", -9.5, layer="layers.1.q"),
    cell("jdetune", -9.2, layer="layers.1.q", repeat=1),
]


def failed(results):
    return [check.what for check in lowra_checks.checks(results) if not check.passed]


def test_checks_pass_and_each_can_fail():
    assert failed(results_of(GOOD)) == []
    worse = [*GOOD[:-3], cell("jdetune", -7.9), cell("jdetune", -9.0, layer="layers.1.q")]
    assert any("single cells worse" in what for what in failed(results_of(worse)))
    near = [*GOOD[:-3], cell("jdetune", -8.3), cell("jdetune", -8.3, layer="layers.1.q")]
    assert failed(results_of(near)) == ["dinov2-tiny, n=3: better by"]
    lost = [*GOOD[:-3], cell("jdetune", None, status="SHARED_DIRECTIONS"), GOOD[-2]]
    assert any("without a base" in what for what in failed(results_of(lost)))
    results = results_of(GOOD)
    results["subsets"]["dinov2-tiny"]["whole"]["methods"]["jdetune"]["equal"] = 99
    assert any("greedy answers" in what for what in failed(results))
    results = results_of(GOOD)
    results["subsets"]["dinov2-tiny"]["traces"]["correlation"]["pooled"] = 0.98
    assert failed(results) == ["dinov2-tiny: loss and W-error, single layers pooled"]


def test_every_figure_is_a_picture_and_its_numbers(tmp_path):
    made = lowra_figures.draw(results_of(GOOD), list(lowra_figures.FIGURES), tmp_path)
    assert set(made) == set(lowra_figures.FIGURES)
    for file in (name for files in made.values() for name in files):
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / file).with_suffix(".json").stat().st_size > 50


def test_the_page_says_what_is_real_and_what_is_missing():
    results = results_of(GOOD)
    made = {"fig7": ["fig7_models.png"]}
    page = lowra_tables.document(results, lowra_checks.checks(results), made)
    for line in CONTRADICTIONS:
        assert line in page
    for said in ("Real: Tiny", "dinov2**: not run. train them", "2 of 4 layers", "are not quoted",
                 "Table 1", "Table 2", "100 of 100", "results/fig7_models.png"):  # fmt: skip
        assert said in page
