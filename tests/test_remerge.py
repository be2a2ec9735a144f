"""Figures of merging again, against what they are by definition."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from jdetune import pipeline
from jdetune.checkpoint import merge_peft
from jdetune.metrics import ulp_distance, ulp_steps
from jdetune.remerge import Remerged, entries, remerge, rounding_noise, singular_values
from jdetune.result import Adapters, Recoveries
from jdetune.solvers.intersection import SubspaceIntersection
from tests import pico

RNG = np.random.default_rng(0)


def test_singular_values_are_those_of_the_product():
    left, right = RNG.standard_normal((9, 3)), RNG.standard_normal((3, 7))
    wanted = np.linalg.svd(left @ right, compute_uv=False)[:3]
    np.testing.assert_allclose(singular_values(left, right), wanted, rtol=1e-12)
    assert singular_values(np.zeros((4, 0)), np.zeros((0, 4))).size == 0
    assert singular_values(np.full((4, 1), np.nan), np.ones((1, 4))).size == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rounding_stays_below_its_edge_and_has_its_rms(dtype):
    exact = RNG.standard_normal((300, 200)) * np.exp(RNG.standard_normal((300, 1)))
    stored = exact.astype(dtype)
    error = stored.astype(np.float64) - exact
    edge, rms = rounding_noise(stored)
    top = np.linalg.svd(error, compute_uv=False)[0]
    assert top < edge < 3 * top
    # 60,000 errors: their mean square is within a percent of its expectation
    assert rms == pytest.approx(np.sqrt(np.mean(error**2)), rel=0.02)


def test_edge_passes_over_what_is_not_finite():
    stored = np.ones((4, 4), np.float32)
    broken = stored.copy()
    broken[0] = np.nan
    edge, rms = rounding_noise(broken)
    assert 0 < edge <= rounding_noise(stored)[0]
    assert np.isfinite(rms)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_steps_are_signed_ulp_distances(dtype):
    first = RNG.standard_normal(3000).astype(dtype)
    second = first.copy()
    for k in range(5):  # some elements a few steps up
        second[k::9] = np.nextafter(second[k::9], np.asarray(np.inf, dtype))
    second[::900] = np.nan
    counts = ulp_steps(first, second)
    distance = ulp_distance(first, second)
    assert counts["not finite"] == 4
    assert sum(counts.values()) == first.size
    assert counts["0"] == np.sum(distance == 0)
    assert counts["1"] == counts["2"] == counts[">2"] == 0  # the first is below
    assert counts["-1"] == np.sum(distance == 1) > 0


def test_models_in_two_dtypes_are_compared_as_they_are_stored():
    base = RNG.standard_normal((48, 32)).astype(ml_dtypes.bfloat16)
    pairs = [pico.pair(RNG, (48, 32), 2) for _ in range(3)]
    models = [merge_peft(base, *pair).astype(np.float32) for pair in pairs]
    found = pico.known(np.stack(models), base)
    found = dataclasses.replace(
        found,
        ranks=np.full(3, 2, np.int32),
        adapters=Adapters(*(np.stack(side) for side in zip(*pairs, strict=True))),
    )
    kinds = ["bfloat16", "float32", "bfloat16"]
    narrow = remerge(found, np.stack(models), kinds)
    assert narrow[0].match == 1.0
    assert narrow[0].steps["0"] == 48 * 32
    assert narrow[1].match < 0.1  # a float32 merge is not rounded to bfloat16
    assert narrow[1].edge < narrow[0].edge / 1000


def test_merges_are_repeated_by_the_rule_that_was_given(tmp_path):
    """Of bfloat16 models whose update was rounded before it was added, as safe_merge does."""
    family = pico.make(tmp_path, dtype=ml_dtypes.bfloat16)
    for path, own in zip(family.paths, family.factors, strict=True):
        merged = {n: merge_peft(family.base[n], *pair, rounding="R2") for n, pair in own.items()}
        pico.write(path, {**family.base, **merged})

    def teller(stacks, solver, progress):
        found = {}
        for name, stack in stacks.items():
            left, right = (
                np.stack(s) for s in zip(*(f[name] for f in family.factors), strict=True)
            )
            known = pico.known(stack, family.base[name])
            ranks = np.full(3, left.shape[2], np.int32)
            found[name] = dataclasses.replace(known, ranks=ranks, adapters=Adapters(left, right))
        return Recoveries(found)

    match = {}
    for rule in ("R1", "R2"):
        options = pipeline.Options(solver=SubspaceIntersection(rounding=rule))
        report = pipeline.run(family.paths, tmp_path / rule, options, recover_fn=teller)
        tuned = [t for t in report["tensors"] if t["status"] == "recovered"]
        match[rule] = [share for tensor in tuned for share in tensor["remerge_match"]]
    assert set(match["R2"]) == {1.0}
    assert max(match["R1"]) < 1.0


def test_report_sums_over_models_and_is_short(tmp_path):
    family = pico.make(tmp_path)
    report = pipeline.run(family.paths, tmp_path / "out", recover_fn=pico.truth_teller(family.base))
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    for entry in report["tensors"]:
        if entry["status"] != "recovered":
            assert entry["ulp_histogram"] is entry["singular_values"] is None
            continue
        assert sum(entry["ulp_histogram"].values()) == 3 * np.prod(entry["shape"])
        share = entry["ulp_histogram"]["0"] / (3 * np.prod(entry["shape"]))
        assert share == pytest.approx(np.mean(entry["remerge_match"]), abs=1e-9)
        assert [len(values) for values in entry["singular_values"]] == entry["ranks"]
        for values, edge in zip(entry["singular_values"], entry["noise_edge"], strict=True):
            assert values == sorted(values, reverse=True)
            assert values[-1] > edge > 0
            assert all(len(f"{v:.10g}".replace(".", "").lstrip("0")) <= 4 for v in values)
        assert 1e-10 < entry["noise_rms_expected"] < 1e-8  # float32 weights of about 0.1


def test_entries_of_nothing_and_of_several():
    assert set(entries(None).values()) == {None}
    one = Remerged(1.0, {"0": 2, "not finite": 1}, [3.0], 1.0, 0.1)
    assert entries([one, one])["ulp_histogram"] == {"0": 4, "not finite": 2}
