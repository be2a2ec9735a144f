"""recover() where models do not belong or are damaged: repaired with a warning, or refused."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import jdetune
from jdetune import Status, recovery, repair, synth
from jdetune.explain import RepairWarning
from tests import reference

PLAIN = jdetune.SubspaceIntersection(polish=False)
SHAPE = (48, 40)
GOOD = synth.family(4, *SHAPE, 4)
OTHER = synth.family(4, *SHAPE, 4, seed=9)


def refused(stack, status, **kind):
    """Recovers what must be refused without a warning; returns the message."""
    found = jdetune.recover(stack, PLAIN)
    assert Status(int(found.status)) is status
    assert np.isnan(found.base).all()
    assert not found.ranks.any()
    for name, value in kind.items():
        assert found.stats[name].tolist() == value
    with pytest.raises(jdetune.RecoveryFailed) as caught:
        jdetune.recover({"attention.weight": stack}, PLAIN, throw=True)
    assert "attention.weight: " + status.name in str(caught.value)
    return str(caught.value)


def repaired(stack, match, **options):
    with pytest.warns(RepairWarning, match=match):
        found = jdetune.recover(stack, PLAIN, **options)
    assert found.ok
    return found


@pytest.mark.parametrize("place", [0, 2, 4])
def test_one_model_of_another_base_is_left_out(place):
    stack = np.insert(GOOD.merged, place, OTHER.merged[0], axis=0)
    found = repaired(stack, f"model {place} was left out of every tensor .* another base")
    np.testing.assert_array_equal(found.base, jdetune.recover(GOOD.merged, PLAIN).base)
    others = np.arange(5) != place
    assert found.ranks.tolist() == np.where(others, 4, 0).tolist()
    assert found.stats["base_group"].tolist() == np.where(others, 0, 1).tolist()
    assert not found.adapters.left[place].any()
    assert not found.adapters.right[place].any()


def test_several_strangers_are_left_out_where_three_models_remain():
    stack = np.concatenate(
        [GOOD.merged[:3], OTHER.merged[:1], synth.family(1, *SHAPE, 4, 5).merged]
    )
    with pytest.warns(RepairWarning) as caught:
        found = jdetune.recover(stack, PLAIN)
    assert found.ranks.tolist() == [4, 4, 4, 0, 0]
    assert [str(w.message)[:21] for w in caught] == [
        "model 3 was left out ",
        "model 4 was left out ",
    ]


def test_a_full_fine_tune_and_a_model_of_too_large_a_rank_are_left_out():
    rng = np.random.default_rng(0)
    full = GOOD.merged[:1] + (1e-3 * rng.standard_normal((1, *SHAPE))).astype(np.float32)
    tall = synth.family(1, *SHAPE, 33, seed=3)
    large = synth.merge(GOOD.base, tall.left[0], tall.right[0])[None]
    for stranger in (full, large):
        found = repaired(np.concatenate([GOOD.merged, stranger]), "model 4 was left out")
        assert found.ranks.tolist() == [4, 4, 4, 4, 0]


def test_only_the_layer_that_differs_leaves_a_model_out():
    second = synth.family(4, *SHAPE, 4, seed=1)
    odd = second.merged.copy()
    odd[1] = OTHER.merged[0]
    layers = {"a": odd, "b": GOOD.merged, "c": second.merged}
    found = repaired(layers, r"model 1 was left out of 1 of 3 tensors solved \(a\)")
    assert {n: r.tolist() for n, r in found.ranks.items()} == {
        "a": [4, 0, 4, 4],
        "b": [4] * 4,
        "c": [4] * 4,
    }
    plain = jdetune.recover({"b": GOOD.merged, "c": second.merged}, PLAIN)
    for name in plain:
        np.testing.assert_array_equal(found.base[name], plain.base[name])


def test_strangers_that_change_from_layer_to_layer():
    first, second = GOOD.merged.copy(), GOOD.merged.copy()
    first[0], second[3] = OTHER.merged[0], OTHER.merged[3]
    with pytest.warns(RepairWarning):
        found = jdetune.recover(np.stack([first, second, first]), PLAIN)
    assert found.ranks.tolist() == [[0, 4, 4, 4], [4, 4, 4, 0], [0, 4, 4, 4]]


def test_later_layers_do_without_the_ordinary_solve(monkeypatch):
    runs = []
    intersect = recovery.intersect_group

    def count(stacks, *rest, **options):
        for result in intersect(stacks, *rest, **options):
            runs.append(stacks[0].shape[0])
            yield result

    monkeypatch.setattr(recovery, "intersect_group", count)
    stack = np.concatenate([GOOD.merged, OTHER.merged[:1]])
    with pytest.warns(RepairWarning, match="every tensor solved .3.: "):
        jdetune.recover(np.stack([stack] * 3), PLAIN)
    assert runs == [5, 4, 4, 4]
    runs.clear()
    groups = np.concatenate([GOOD.merged[:3], OTHER.merged[:2]])
    found = jdetune.recover(np.stack([groups] * 3), PLAIN)
    assert set(found.status.tolist()) == {Status.NOT_LOW_RANK}
    assert runs == [5]


@pytest.mark.parametrize("count", [3, 4])
def test_a_large_rank_that_fits_is_no_stranger_after_an_odd_layer(count):
    """Ranks of 29 together look like no relatives, but all three fit into 40."""
    large = synth.family(count, *SHAPE, [27] + [2] * (count - 1)).merged
    odd = GOOD.merged[:count].copy()
    odd[-1] = OTHER.merged[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RepairWarning)
        found = jdetune.recover(np.stack([odd, large]), PLAIN)
    assert found.status.tolist() == [Status.NOT_LOW_RANK if count == 3 else Status.OK, Status.OK]
    assert found.ranks[1].tolist() == [27] + [2] * (count - 1)


def test_nothing_is_compared_where_the_ordinary_solve_succeeds(monkeypatch):
    def fail(*_):
        raise AssertionError("compared")

    monkeypatch.setattr(repair, "split_by_base", fail)
    found = jdetune.recover(np.stack([GOOD.merged, OTHER.merged]), PLAIN)
    assert found.ok
    assert not found.stats["base_group"].any()


@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_arrays_of_either_kind(kind):
    stack = np.concatenate([GOOD.merged, OTHER.merged[:1]])
    found = repaired(stack if kind == "numpy" else jnp.asarray(stack), "model 4")
    assert isinstance(found.base, np.ndarray) is (kind == "numpy")


def test_duplicates_of_strangers_are_strangers():
    stack = np.concatenate([GOOD.merged, OTHER.merged[[0, 0]]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = jdetune.recover(stack, PLAIN)
    assert [w.category for w in caught] == [UserWarning, RepairWarning, RepairWarning]
    assert found.ranks.tolist() == [4, 4, 4, 4, 0, 0]


def test_a_stranger_of_wider_rounding_among_sixteen_bit_models():
    kin = synth.family(4, *SHAPE, 2, dtype="bfloat16", update_rms=5e-3)
    stack = np.concatenate([kin.merged.astype(np.float32), OTHER.merged[:1]])
    found = repaired(stack, "model 4")
    np.testing.assert_array_equal(
        found.base.astype(np.float32), jdetune.recover(kin.merged, PLAIN).base.astype(np.float32)
    )


def test_two_groups_are_refused_by_name():
    stack = np.concatenate([GOOD.merged[:3], OTHER.merged[:3]])
    message = refused(stack, Status.NOT_LOW_RANK, base_group=[0, 0, 0, 1, 1, 1])
    assert "model 0, model 1, model 2 share one base; model 3, model 4, model 5 another" in message
    assert "Recover each group of three or more alone." in message


def test_a_pair_of_another_base_is_refused_too():
    stack = np.concatenate([OTHER.merged[:2], GOOD.merged])
    message = refused(stack, Status.NOT_LOW_RANK, base_group=[1, 1, 0, 0, 0, 0])
    assert "model 0, model 1 another" in message


def test_two_of_one_base_are_too_few():
    stack = np.concatenate([GOOD.merged[:2], OTHER.merged[:1]])
    message = refused(stack, Status.NOT_LOW_RANK, base_group=[0, 0, 1])
    assert "model 0, model 1 share one base; model 2 shares none of these" in message
    assert "add models of the base of model 0, model 1" in message


def changed(case, models):
    rng = np.random.default_rng(0)
    if case == "full fine-tuning":
        return models + (1e-3 * rng.standard_normal(models.shape)).astype(np.float32)
    if case == "dora":
        return models * (1 + 1e-2 * rng.standard_normal((len(models), SHAPE[0], 1))).astype(
            np.float32
        )
    step = np.abs(models).max(axis=2, keepdims=True) / (7 if case == "4-bit" else 127)
    return np.round(models / step) * step


@pytest.mark.parametrize("case", ["full fine-tuning", "dora", "4-bit", "8-bit"])
@pytest.mark.parametrize("count", [3, 5])
def test_merges_that_are_not_low_rank_are_refused(case, count):
    models = synth.family(count, *SHAPE, 4).merged
    message = refused(changed(case, models), Status.NOT_LOW_RANK)
    assert Status.NOT_LOW_RANK.message in message


@pytest.mark.parametrize(("count", "rank"), [(3, 15), (5, 15)])
def test_ranks_above_the_limit_are_refused(count, rank):
    merged = synth.family(count, *SHAPE, rank).merged
    message = refused(merged, Status.RANK_TOO_LARGE)
    assert Status.RANK_TOO_LARGE.message in message
    found = jdetune.recover(np.stack([merged] * 2), PLAIN)
    assert found.status.tolist() == [Status.RANK_TOO_LARGE] * 2


@pytest.mark.parametrize(("count", "sharers"), [(3, 2), (3, 3), (4, 3), (5, 4)])
@pytest.mark.parametrize("side", ["columns", "rows"])
def test_all_but_one_model_sharing_a_direction_are_refused(count, sharers, side):
    family = synth.family(count, *SHAPE, 3)
    left, right = [b.copy() for b in family.left], [a.copy() for a in family.right]
    for model in range(1, sharers):
        if side == "columns":
            left[model][:, 0] = left[0][:, 0]
        else:
            right[model][0] = right[0][0]
    merged = [synth.merge(family.base, b, a) for b, a in zip(left, right, strict=True)]
    refused(np.stack(merged), Status.SHARED_DIRECTIONS)


HOLES = {
    "row 3": np.s_[1, 3],
    "column 5": np.s_[1, :, 5],
    r"element \(3, 4\)": np.s_[1, 3, 4],
    "every row": np.s_[1],
}


@pytest.mark.parametrize("where", list(HOLES))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_hole_in_one_model_of_four_is_solved_around(where, value):
    stack = GOOD.merged.copy()
    stack[HOLES[where]] = value
    found = repaired(stack, f"model 1 holds NaN or infinity in {where} of weight")
    np.testing.assert_array_equal(found.base, jdetune.recover(GOOD.merged[[0, 2, 3]], PLAIN).base)
    assert found.ranks.tolist() == [4, 0 if where == "every row" else 4, 4, 4]
    left, right = found.adapters.left[1], found.adapters.right[1]
    seen = np.isfinite(stack[1])
    again = synth.merge(found.base, left, right)
    if where != "every row":
        assert np.abs(again - GOOD.merged[1])[seen].max() < 2e-8  # a few ulps at 0.07
    if where in ("row 3", "column 5"):
        assert np.abs(left @ right)[~seen].max() < 1e-9
    if "element" in where:
        assert abs(again - GOOD.merged[1])[3, 4] < 5e-8


def test_a_hole_concerns_its_own_tensor_only():
    hole = GOOD.merged.copy()
    hole[2, 0] = np.nan
    found = repaired({"a": GOOD.merged, "b": hole, "c": GOOD.merged}, "row 0 of b: .*left at zero")
    plain = jdetune.recover(GOOD.merged, PLAIN)
    for name in ("a", "c"):
        np.testing.assert_array_equal(found.base[name], plain.base)
        np.testing.assert_array_equal(found[name].adapters.left, plain.adapters.left)


def test_holes_in_two_models_of_five():
    family = synth.family(5, *SHAPE, 4)
    stack = family.merged.copy()
    stack[0, 1], stack[4, :, 2] = np.nan, np.inf
    with pytest.warns(RepairWarning) as caught:
        found = jdetune.recover(stack, PLAIN)
    assert [str(w.message).partition(" of ")[0] for w in caught] == [
        "model 0 holds NaN or infinity in row 1",
        "model 4 holds NaN or infinity in column 2",
    ]
    assert found.ranks.tolist() == [4] * 5


def test_a_hole_and_a_stranger_in_one_layer():
    stack = np.concatenate([OTHER.merged[:1], GOOD.merged])
    stack[2, 7] = np.nan
    with pytest.warns(RepairWarning) as caught:
        found = jdetune.recover(stack, PLAIN)
    assert len(caught) == 2
    assert found.ranks.tolist() == [0, 4, 4, 4, 4]
    assert found.stats["base_group"].tolist() == [1, 0, repair.DAMAGED, 0, 0]


def test_a_damaged_model_of_larger_rank_gets_all_of_it():
    family = synth.family(4, *SHAPE, [2, 9, 2, 2])
    stack = family.merged.copy()
    stack[1, 3, 4] = np.nan
    found = repaired(stack, "filled in")
    assert found.ranks.tolist() == [2, 9, 2, 2]
    assert found.adapters.left.shape == (4, 48, 9)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_hole_where_too_few_remain_is_refused(value):
    stack = GOOD.merged[:3].copy()
    stack[1, 3] = value
    message = refused(stack, Status.NON_FINITE)
    assert "Found: model 1 in row 3." in message


def test_the_iterative_solver_is_repaired_around_holes_too():
    stack = GOOD.merged.copy()
    stack[3, 3] = np.nan
    solver = jdetune.SpectralDeTuning(4, steps=300, space="core")
    with pytest.warns(RepairWarning, match="model 3 holds NaN or infinity in row 3"):
        found = jdetune.recover(stack, solver)
    assert found.ranks.tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize("count", [4, 3])
@pytest.mark.parametrize("seed", range(3))
def test_averages_of_two_merges_are_low_rank(count, seed):
    family = synth.family(2 * count, *SHAPE, 2, seed)
    merged = (family.merged[::2] + family.merged[1::2]) / np.float32(2)
    found = jdetune.recover(merged, PLAIN)
    assert found.ok
    assert found.ranks.tolist() == [4] * count
    assert reference.log_mse(found.base, family.base) < -17  # rounding alone: -18


@pytest.mark.parametrize("count", [4, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(3))
def test_chained_merges_are_rounded_twice(count, dtype, seed):
    rms = 1e-3 if dtype == "float32" else 5e-3
    first = synth.family(count, *SHAPE, 2, seed, dtype, update_rms=rms)
    second = synth.family(count, *SHAPE, 2, seed + 100, dtype, update_rms=rms)
    merged = [
        synth.merge(weights, left, right)
        for weights, left, right in zip(first.merged, second.left, second.right, strict=True)
    ]
    found = jdetune.recover(np.stack(merged), PLAIN)
    assert found.ok
    assert found.ranks.tolist() == [4] * count
    floor = np.log10(reference.sigma(first.merged) ** 2)
    # two roundings each, and updates that take up part of them
    assert reference.log_mse(np.asarray(found.base), first.base) < floor + 0.5


@pytest.mark.parametrize("case", ["zero in all models", "zero in the base", "one model at zero"])
def test_zero_layers(case):
    family = synth.family(3, *SHAPE, 2)
    updates = [b @ a for b, a in zip(family.left, family.right, strict=True)]
    merged = np.stack(updates)
    if case == "zero in all models":
        merged[:] = 0
    elif case == "one model at zero":
        merged[1] = 0
    found = jdetune.recover({"zero": merged, "other": GOOD.merged[:3]}, PLAIN)
    assert found.ok
    assert np.abs(found.base["zero"]).max() < 1e-9  # rounding of values below 1e-2
    ranks = {"zero in all models": [0, 0, 0], "one model at zero": [2, 0, 2]}
    assert found.ranks["zero"].tolist() == ranks.get(case, [2, 2, 2])


def test_the_good_path_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jdetune.recover({"a": GOOD.merged}, PLAIN, throw=True)
