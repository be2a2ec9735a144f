"""NaN and infinity: where they are, and updates of damaged models."""

import numpy as np
import pytest

from jdetune import linalg, synth
from jdetune.damage import find_damage, finite_models, own_update

FLOAT64 = linalg.resolve_dtype("auto")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ([np.s_[3]], "row 3"),
        ([np.s_[:, 5]], "column 5"),
        ([np.s_[3, 4]], "element (3, 4)"),
        ([np.s_[1:7]], "rows 1, 2, 3, 4 and 2 more"),
        ([np.s_[2], np.s_[:, 1], np.s_[4, 3:5]], "row 2 and column 1 and elements (4, 3), (4, 4)"),
        ([np.s_[:]], "every row"),
        ([np.s_[3, :7]], "row 3"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_damage_in_words(where, said, value):
    matrix = np.ones((12, 10), np.float32)
    for part in where:
        matrix[part] = value
    assert str(find_damage(matrix)) == said


def test_finite_models_in_sixteen_bits():
    stack = np.ones((3, 2, 2), "bfloat16")
    stack[1, 0, 0] = np.inf
    assert finite_models(stack).tolist() == [True, False, True]


def damaged(where, dtype="float32"):
    """A model with a hole, its base and its true update."""
    rms = 1e-3 if dtype == "float32" else 5e-3
    family = synth.family(1, 48, 40, 3, dtype=dtype, update_rms=rms)
    model = family.merged[0].copy()
    for part in where:
        model[part] = np.nan
    return model, family.base, family.left[0] @ family.right[0]


def error(found, truth, keep):
    assert found is not None
    left, right = found
    assert left.dtype == right.dtype == np.float32
    assert left.shape[1] == right.shape[0] == 3
    np.testing.assert_allclose(left.T @ left, right @ right.T, atol=1e-6)  # balanced
    miss = (left @ right - truth)[keep]
    return np.sqrt(np.mean(np.square(miss, dtype=np.float64)))


def test_a_lost_row_or_column_is_zero_and_the_rest_is_the_update():
    rows, cols = np.arange(48) != 3, np.arange(40) != 7
    model, base, truth = damaged([np.s_[3], np.s_[:, 7]])
    found = own_update(model, base, FLOAT64)
    assert found is not None
    # one rounding of values below 0.1 is 2e-9 rms; the update takes up a fraction of it
    assert error(found, truth, np.ix_(rows, cols)) < 2e-9
    assert not (found[0] @ found[1])[3].any()
    assert np.abs((found[0] @ found[1])[:, 7]).max() < 1e-9


@pytest.mark.parametrize(
    "where",
    [
        [np.s_[3, 4]],
        [np.s_[3, :6], np.s_[20, 9]],
        [np.s_[:24, 2], np.s_[24:, 30]],  # no row is whole, 38 columns are
    ],
)
def test_single_elements_follow_from_the_others(where):
    model, base, truth = damaged(where)
    found = own_update(model, base, FLOAT64)
    assert error(found, truth, np.isnan(model)) < 1e-8  # a few roundings; the update is 1e-3


def test_elements_beside_a_lost_row_follow_too():
    model, base, truth = damaged([np.s_[3], np.s_[9, 4]])
    assert error(own_update(model, base, FLOAT64), truth, np.s_[9:10, 4:5]) < 1e-8


@pytest.mark.parametrize("saved", ["bfloat16", "float32"])
def test_sixteen_bits(saved):
    model, base, truth = damaged([np.s_[3, 4], np.s_[6]], "bfloat16")
    found = own_update(model.astype(saved), base.astype(saved), FLOAT64)
    rows = np.arange(48) != 6
    assert error(found, truth, rows) < 5e-5  # one rounding of bfloat16 at 0.02


@pytest.mark.parametrize("coarse", ["base", "model"])
def test_the_rounding_error_is_that_of_the_model(coarse):
    """A base on a coarser grid is exact, and what is put in for a hole is on no grid."""
    family = synth.family(1, 48, 40, 3, update_rms=5e-3)
    base, model = family.base, family.merged[0]
    if coarse == "base":
        base = base.astype("bfloat16").astype(np.float32)
        model = synth.merge(base, family.left[0], family.right[0])
    else:
        model = model.astype("bfloat16").astype(np.float32)
    model[3, 4] = np.nan
    found = own_update(model, base, FLOAT64)
    limit = 1e-8 if coarse == "base" else 5e-5  # one rounding of the model
    assert error(found, family.left[0] @ family.right[0], np.s_[:]) < limit


@pytest.mark.parametrize("case", ["all lost", "not low rank", "holes in every row"])
def test_no_update_where_too_little_is_left(case):
    model, base, _ = damaged([np.s_[3]])
    rng = np.random.default_rng(0)
    if case == "all lost":
        model[:] = np.nan
    elif case == "not low rank":
        model += (1e-3 * rng.standard_normal(model.shape)).astype(np.float32)
    else:
        model[np.arange(48), np.arange(48) % 40] = np.nan
    assert own_update(model, base, FLOAT64) is None
