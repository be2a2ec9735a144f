"""Cases, scores against truth and ceiling, plain estimates, and what the tables say."""

import dataclasses
import importlib.util

import ml_dtypes
import numpy as np
import pytest

from benchmarks import (
    calibration,
    cases,
    detection,
    exactness,
    grids,
    held_out,
    small_updates,
    tables,
)
from benchmarks.families import Factors
from benchmarks.scores import certainty, mean_error, score


@pytest.fixture(scope="module")
def case():
    return cases.synthetic(
        "tiny", n_models=3, row=64, col=48, rank=4, seed=0, dtype="bfloat16", update_rms=2e-3
    )


@pytest.fixture(scope="module")
def scored(case):
    return score(case)


def test_score_compares_with_truth_and_ceiling(case, scored):
    (one,) = scored
    assert one.has_base
    assert one.ranks == one.true_ranks == [4, 4, 4]
    assert one.dtype == "bfloat16"
    assert one.elements == 64 * 48
    # what the true updates give can only be matched, but for a handful of elements
    assert one.ceiling is not None
    assert one.found.exact <= one.ceiling.exact + 10 / one.elements
    assert one.ceiling.exact > 0.9
    assert mean_error(scored) == one.error
    assert "tiny, n=3, layers: 1" in case.text()


def test_certainty_counts_bits():
    truth = np.array([[1, 2], [0.0, 4]], np.float32)
    base = np.array([[1, 3], [-0.0, 4]], np.float32)
    certain = np.array([[True, True], [True, False]])
    found = certainty(base, certain, truth)
    assert found.exact == 0.5
    assert (found.certain_count, found.certain_wrong, found.sign_of_zero) == (3, 2, 1)
    assert found.certain_of_exact == 0.5
    assert certainty(base.astype(np.float16), certain, truth).certain_wrong == 3


def test_checks_say_pass_and_fail_and_nan_fails():
    good, bad = tables.at_least("a", 0.97, 0.96), tables.at_most("b", 2.0, 1.0)
    assert (good.verdict, bad.verdict) == ("PASS", "FAIL")
    assert not tables.at_least("c", float("nan"), 0.5).passed
    assert tables.exit_code([good]) == 0
    assert tables.exit_code([good, bad]) == 1
    lines = tables.checks_table([good]).splitlines()
    assert lines[1] == "|---|---|---|---|"
    assert lines[2] == "| a | 0.9700 | >= 0.96 | PASS |"


def test_exactness_table_has_a_cell_for_every_column(case, scored):
    check = tables.at_least("exact", scored[0].found.exact, 0.5)
    assert len(exactness.row(case, scored, check)) == len(exactness.HEADER)
    found = exactness.overall([scored], ["tiny"])
    assert len(found) == 2
    assert "per million" in found[0].what


def test_grids_and_small_updates_tables_have_a_cell_for_every_column(case, scored):
    check = tables.at_least("exact", scored[0].found.exact, 0.5)
    row = grids.row(case, grids.GRIDS[0], scored, 0, check)
    assert len(row) == len(grids.HEADER)
    assert len(small_updates.row(case, scored[0], check)) == len(small_updates.HEADER)


def test_digest_tells_dtype_and_bytes():
    one = np.array([1.0, 0.0], np.float32)
    assert grids.same_bytes(one, one.copy())
    assert not grids.same_bytes(one, np.array([1.0, -0.0], np.float32))
    assert not grids.same_bytes(np.zeros(2, np.float16), np.zeros(2, ml_dtypes.bfloat16))


def test_shared_value_is_the_most_common_then_the_nearest_to_the_mean():
    merged = np.array([[[1, 5, 1]], [[1, 6, 2]], [[9, 7, 9]]], np.float32)
    assert small_updates.shared_value(merged).tolist() == [[1, 6, 2]]
    assert small_updates.mean_of_models(merged)[0, 1] == 6


def test_small_updates_have_the_size_asked_for():
    case = small_updates.make(0.5, 64, 3, 4)
    layer = case.layers["weight"]
    rms = np.sqrt(np.mean(np.square(layer.updates[0].update())))
    # the spacing of bfloat16 around 0.02 * 0.67, the median size of a normal of deviation 0.02
    assert rms == pytest.approx(0.5 * 2.0**-14, rel=1e-3)


def test_singular_values_and_floor():
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal(s).astype(np.float32) for s in [(20, 3), (3, 30)])
    one = Factors(left, right, 0.5)
    values = detection.singular_values(one)
    expected = np.linalg.svd(0.5 * left.astype(np.float64) @ right, compute_uv=False)[:3]
    np.testing.assert_allclose(values, expected, rtol=1e-10)  # float64, condition below 10
    layer = cases.Layer(np.zeros((20, 30), np.float32), np.ones((1, 20, 30), np.float32), [one])
    assert detection.above_floor(layer, values[1] * 0.99) == [2]
    assert detection.margins(layer, values[2])[0] == pytest.approx(1.0)
    assert detection.stored_above_floor(layer, 1.0) == [1]


def test_near_shared_families_have_the_angle_asked_for():
    case = held_out.near(1e-2, 3, seed=1, whole=True, shape=(64, 80), rank=3)
    angle = np.radians(case.description.row_angle[0])
    # two directions each at 1e-2 from a third, in directions of their own: sqrt(2) of it or less
    assert 0.3e-2 < angle < 1.5e-2
    assert case.description.col_angle[0] > 10
    one = held_out.near(1e-2, 3, seed=1, whole=False, shape=(64, 80), rank=3)
    assert one.description.col_angle[0] < 2


def test_predicted_error_counts_as_near_where_exact_layers_are_said_to_be(scored):
    exact = dataclasses.replace(
        scored[0],
        predicted=-22.0,
        error=-40.0,
        exact_estimate=1.0,
        found=dataclasses.replace(scored[0].found, exact=1.0),
    )
    assert calibration.Point("g", "bfloat16", False, exact).near(0.3)
    unsure = dataclasses.replace(exact, exact_estimate=0.99)
    assert not calibration.Point("g", "bfloat16", False, unsure).near(0.3)
    off = dataclasses.replace(scored[0], predicted=-10.0, error=-10.35)
    point = calibration.Point("g", "bfloat16", True, off)
    assert not point.near(0.3)
    assert point.near(0.4)


def test_calibration_picture_is_drawn(tmp_path, scored):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("the bench extra brings matplotlib")
    from benchmarks import calibration_plot

    points = [calibration.Point("g", "bfloat16", held, scored[0]) for held in (False, True)]
    calibration_plot.draw(points, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_spread_out_keeps_both_ends():
    assert cases.spread_out(list("abcdefg"), 3) == ["a", "d", "g"]
    assert cases.spread_out(list("abc"), None) == list("abc")
