"""recover(): shapes, dtypes, statuses, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdetune
from jdetune import Status, synth
from tests import reference

#: For what has nothing to do with accuracy: a smaller program to compile.
PLAIN = jdetune.SubspaceIntersection(polish=False)


def stack_of(shapes, n=3, rank=3, dtype="float32"):
    return {
        f"block.{index}.weight": synth.family(n, row, col, rank, seed=index, dtype=dtype)
        for index, (row, col) in enumerate(shapes)
    }


def test_three_axes_come_back_without_a_layer_axis():
    family = synth.family(3, 48, 40, 4)
    found = jdetune.recover(family.merged)
    assert found.base.shape == (48, 40)
    assert found.ranks.tolist() == [4, 4, 4]
    assert found.adapters.left.shape == (3, 48, 4)
    assert found.adapters.right.shape == (3, 4, 40)
    assert found.status.shape == found.predicted_error.shape == ()
    assert found.ok


def test_four_axes_and_a_mapping_equal_each_layer_alone():
    families = list(stack_of([(48, 40)] * 3).values())
    stacked = jdetune.recover(np.stack([family.merged for family in families]), solver=PLAIN)
    mapped = jdetune.recover(
        {str(i): family.merged for i, family in enumerate(families)}, solver=PLAIN
    )
    assert stacked.base.shape == (3, 48, 40)
    assert list(mapped) == ["0", "1", "2"]
    for index, family in enumerate(families):
        alone = jdetune.recover(family.merged, solver=PLAIN)
        for other in (stacked.layer(index), mapped[str(index)]):
            np.testing.assert_array_equal(other.base, alone.base)
            np.testing.assert_array_equal(other.ranks, alone.ranks)
            # float32 sums of the rounding's power are taken in another order on another device
            for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(alone), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-8)


def test_mapping_of_mixed_shapes_keeps_names_order_and_ranks():
    families = stack_of([(48, 40), (40, 64), (48, 40), (30, 30)])
    found = jdetune.recover(
        {name: family.merged for name, family in families.items()}, solver=PLAIN
    )
    assert list(found) == list(families)
    assert found.ok
    for name, family in families.items():
        assert found[name].base.shape == family.base.shape
        assert found.ranks[name].tolist() == [3, 3, 3]
        assert found.status[name] is Status.OK
        assert reference.log_mse(found.base[name], family.base) < -17


@pytest.mark.parametrize("kind", ["numpy", "jax"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_base_has_the_dtype_and_array_type_of_the_input(dtype, kind):
    family = synth.family(5, 96, 80, 3, dtype=dtype, update_rms=5e-3)
    stack = family.merged if kind == "numpy" else jnp.asarray(family.merged)
    found = jdetune.recover(stack, PLAIN)
    assert found.ok
    assert found.base.dtype == stack.dtype
    for leaf in jax.tree.leaves(found):
        assert isinstance(leaf, np.ndarray if kind == "numpy" else jax.Array)
    floor = np.log10(reference.sigma(family.merged) ** 2)
    assert reference.log_mse(np.asarray(found.base), family.base) < floor + 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_saved_in_thirty_two_are_seen_as_what_they_are(dtype):
    family = synth.family(5, 96, 80, 3, dtype=dtype, update_rms=5e-3)
    wide = jdetune.recover(family.merged.astype(np.float32), solver=PLAIN)
    assert wide.ok
    assert wide.base.dtype == dtype
    np.testing.assert_array_equal(wide.base, jdetune.recover(family.merged, solver=PLAIN).base)


def test_adapters_rebuild_every_merged_model_to_rounding():
    family = synth.family(4, 96, 80, [2, 5, 0, 7], seed=2)
    found = jdetune.recover(family.merged)
    base, lefts, rights = map(np.asarray, (found.base, found.adapters.left, found.adapters.right))
    assert found.ranks.tolist() == [2, 5, 0, 7]
    for i, merged in enumerate(family.merged):
        left, right = lefts[i], rights[i]
        rebuilt = synth.merge(base, left, right)
        error = rebuilt.astype(np.float64) - merged
        assert np.sqrt(np.mean(error**2)) < reference.sigma(merged)  # of one rounding
        rank = int(found.ranks[i])
        assert not left[:, rank:].any()
        assert not right[rank:].any()
        b, a = left[:, :rank], right[:rank]
        np.testing.assert_allclose(b.T @ b, a @ a.T, atol=1e-6)  # balanced, float32
        assert (np.take_along_axis(b, np.abs(b).argmax(0)[None], 0) > 0).all()


def test_duplicates_are_dropped_with_a_warning_and_share_adapters():
    family = synth.family(3, 48, 40, 4)
    with pytest.warns(UserWarning, match=r"models \[2\] equal an earlier model"):
        found = jdetune.recover(family.merged[[0, 1, 0, 2]], solver=PLAIN)
    np.testing.assert_array_equal(found.base, jdetune.recover(family.merged, solver=PLAIN).base)
    np.testing.assert_array_equal(found.adapters.left[2], found.adapters.left[0])
    assert found.ranks.tolist() == [4] * 4


def test_models_that_happen_to_be_equal_here_keep_rank_zero_if_told_so():
    family = synth.family(4, 48, 40, [4, 4, 0, 0])
    assert (family.merged[2] == family.merged[3]).all()
    found = jdetune.recover(family.merged, drop_duplicates=False, solver=PLAIN)
    assert found.ok
    assert found.ranks.tolist() == [4, 4, 0, 0]


def test_models_equal_in_one_layer_only_have_rank_zero_there():
    first, second = synth.family(3, 48, 40, 4, seed=1), synth.family(3, 48, 40, 4, seed=2)
    merged = first.merged.copy()
    merged[:] = first.base
    found = jdetune.recover({"same": merged, "other": second.merged}, solver=PLAIN)
    assert found.ranks["same"].tolist() == [0, 0, 0]
    assert found.ok
    np.testing.assert_array_equal(found.base["same"], first.base)


def status_cases():
    family = synth.family(3, 48, 40, 4)
    other = synth.family(3, 48, 40, 4, seed=9)
    rng = np.random.default_rng(0)
    nan = family.merged.copy()
    nan[1, 3, 4] = np.nan
    inf = family.merged.copy()
    inf[2, 0, 0] = np.inf
    shared = [b.copy() for b in family.left]
    shared[1][:, :2] = shared[0][:, :2]
    shared_merged = np.stack(
        [synth.merge(family.base, b, a) for b, a in zip(shared, family.right, strict=True)]
    )
    full = family.base + (1e-3 * rng.standard_normal((3, 48, 40))).astype(np.float32)
    rows = (1 + 1e-3 * rng.standard_normal((3, 48, 1))).astype(np.float32)
    step4, step8 = np.float32(0.12 / 15), np.float32(0.12 / 255)
    small = synth.family(4, 128, 128, 4, update_rms=2e-10)
    return {
        "two": (family.merged[:2], Status.TOO_FEW_MODELS),
        "other base": (np.concatenate([family.merged, other.merged]), Status.NOT_LOW_RANK),
        "full fine-tuning": (full, Status.NOT_LOW_RANK),
        "dora": (family.merged * rows, Status.NOT_LOW_RANK),
        "4-bit": (np.round(family.merged / step4) * step4, Status.NOT_LOW_RANK),
        "8-bit": (np.round(family.merged / step8) * step8, Status.NOT_LOW_RANK),
        "rank": (synth.family(3, 48, 40, 15).merged, Status.RANK_TOO_LARGE),
        "shared": (shared_merged, Status.SHARED_DIRECTIONS),
        "nan": (nan, Status.NON_FINITE),
        "inf": (inf, Status.NON_FINITE),
        "noise": (small.merged, Status.NOISE_DOMINATED),
    }


@pytest.mark.parametrize("case", list(status_cases()))
def test_status_says_why_and_no_failed_layer_has_a_base(case):
    stack, status = status_cases()[case]
    found = jdetune.recover(stack)
    assert Status(int(found.status)) is status
    assert bool(np.isnan(found.base.astype(np.float32)).all()) is not status.has_base
    assert not found.ok


def nearly_shared(angle):
    """One rank-one part of model 1 is that of model 0 but for ``angle``."""
    family = synth.family(3, 128, 96, 8, seed=3, decay=0.0, update_rms=5e-3)
    left, right = [b.copy() for b in family.left], [a.copy() for a in family.right]
    left[1][:, :1] = left[0][:, :1] + np.float32(angle) * left[1][:, :1]
    right[1][:1] = right[0][:1] + np.float32(angle) * right[1][:1]
    merged = [synth.merge(family.base, b, a) for b, a in zip(left, right, strict=True)]
    return family.base, np.stack(merged)


@pytest.mark.parametrize("angle", [3e-6, 1e-5, 3e-5])
def test_directions_too_near_to_part_are_refused(angle):
    """The ranks can be told, the base cannot: its error would exceed that of the mean."""
    _, merged = nearly_shared(angle)
    found = jdetune.recover(merged)
    assert Status(int(found.status)) is Status.SHARED_DIRECTIONS
    assert np.isnan(found.base).all()


def test_nearly_shared_directions_are_solved_by_the_refinement():
    base, merged = nearly_shared(1e-3)
    found = jdetune.recover(merged)
    assert found.ok
    assert float(found.stats["residual_ratio"]) < 1.1
    assert reference.log_mse(found.base, base) < -12
    closed = jdetune.recover(merged, jdetune.SubspaceIntersection(polish=False))
    assert float(closed.stats["residual_ratio"]) > 2


@pytest.mark.parametrize("case", ["zero rows", "row scales", "large updates", "no base"])
def test_arithmetic_of_the_merge_is_not_taken_for_rank(case):
    """Where weights are small against the update, float32 sums round by more than the storage."""
    rng = np.random.default_rng(5)
    base = (0.05 * rng.standard_normal((128, 96))).astype(np.float32)
    size = np.float32(0.01)
    if case == "zero rows":
        base[:20] = 0
    elif case == "row scales":
        base *= np.logspace(-6, 0, 128, dtype=np.float32)[:, None]
    elif case == "large updates":
        size = np.float32(0.1)
    else:
        base[:] = 0
    left = size * rng.standard_normal((3, 128, 8)).astype(np.float32)
    right = rng.standard_normal((3, 8, 96)).astype(np.float32) / np.float32(8**0.5)
    merged = np.stack([synth.merge(base, b, a) for b, a in zip(left, right, strict=True)])
    found = jdetune.recover(merged)
    assert found.ranks.tolist() == [8, 8, 8]
    assert found.ok
    assert reference.log_mse(found.base, base) < -16.5


def test_a_nan_does_not_hide_duplicates():
    family, other = synth.family(3, 48, 40, 4, seed=1), synth.family(3, 48, 40, 4, seed=2)
    nan = other.merged[[0, 0, 1]]
    nan[:, 0, 0] = np.nan
    with pytest.warns(UserWarning, match=r"models \[1\] equal"):
        found = jdetune.recover({"good": family.merged[[0, 0, 1]], "nan": nan})
    assert set(found.status.values()) == {Status.TOO_FEW_MODELS}


@pytest.mark.parametrize(("n", "rank"), [(3, 40), (3, 96), (5, 60)])
def test_an_iteration_with_a_rank_that_determines_nothing_is_refused(n, rank):
    family = synth.family(n, 128, 96, 8)
    found = jdetune.recover(family.merged, jdetune.SpectralDeTuning(rank, steps=5))
    assert Status(int(found.status)) is Status.RANK_TOO_LARGE


def test_one_bad_layer_leaves_the_others_alone():
    good = synth.family(3, 48, 40, 4)
    bad, status = status_cases()["nan"]
    found = jdetune.recover(np.stack([good.merged, bad, good.merged]), solver=PLAIN)
    assert found.status.tolist() == [0, status, 0]
    np.testing.assert_array_equal(found.base[0], found.base[2])


def test_throw_names_layers_cause_and_remedy():
    good = synth.family(3, 48, 40, 4).merged
    bad, status = status_cases()["full fine-tuning"]
    with pytest.raises(jdetune.RecoveryFailed, match="1 of 2 layers failed") as caught:
        jdetune.recover({"fine": good, "broken": bad}, throw=True, solver=PLAIN)
    assert "broken: NOT_LOW_RANK: " + status.message in str(caught.value)
    assert "fine:" not in str(caught.value)


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        (np.zeros((3, 4), np.float32), "shape"),
        (np.zeros((3, 4, 4), np.int32), "dtype int32"),
        (np.zeros((3, 4, 4), np.float64), "dtype float64"),
        (np.zeros((3, 0, 4), np.float32), "empty axis"),
        (np.zeros((0, 3, 4, 4), np.float32), "empty"),
        ({}, "empty"),
        ({"a": np.zeros((3, 4, 4), np.float32), "b": np.zeros((4, 4, 4), np.float32)}, "models"),
        ({"a": np.zeros((4, 4), np.float32)}, "a: expected axes"),
    ],
)
def test_malformed_arguments_raise(stack, message):
    with pytest.raises(ValueError, match=message):
        jdetune.recover(stack)


def test_one_large_rank_among_small_ones():
    """The rank axis must hold it, even where the sketch is as wide as the matrix."""
    found = jdetune.recover(synth.family(3, 40, 30, [20, 2, 2]).merged)
    assert found.ranks.tolist() == [20, 2, 2]
    assert found.ok


def test_progress_counts_layers():
    seen = []
    families = stack_of([(48, 40), (40, 30), (48, 40)])
    jdetune.recover(
        {name: family.merged for name, family in families.items()},
        progress=lambda done, total: seen.append((done, total)),
        solver=PLAIN,
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.fixture
def compilations(caplog):
    """What is compiled from here on, in every thread: the setting is of the whole process."""
    jax.config.update("jax_log_compiles", True)
    with caplog.at_level("WARNING"):
        yield lambda: [r for r in caplog.records if "Compiling" in r.getMessage()]
    jax.config.update("jax_log_compiles", False)


def test_a_second_call_compiles_nothing(compilations):
    first, second = (synth.family(3, 61, 43, 4, seed=s).merged for s in (1, 2))
    jdetune.recover(first, solver=PLAIN)
    seen = len(compilations())
    assert seen  # such a shape is in no other test
    jdetune.recover(second, solver=PLAIN)
    assert len(compilations()) == seen


def test_wide_ranks_enlarge_the_sketch():
    family = synth.family(3, 200, 180, 40, decay=1.0)
    found = jdetune.recover(family.merged, solver=PLAIN)
    assert found.ok
    assert found.ranks.tolist() == [40, 40, 40]


def test_float32_precision_is_a_choice_anywhere():
    family = synth.family(3, 96, 80, 6)
    found = jdetune.recover(family.merged, jdetune.SubspaceIntersection(precision="float32"))
    assert found.ok
    assert reference.log_mse(found.base, family.base) < -16


def test_recoveries_is_a_pytree():
    found = jdetune.recover({"w": synth.family(3, 48, 40, 4).merged}, solver=PLAIN)
    again = jax.tree.map(lambda x: x, found)
    assert list(again) == ["w"]
    np.testing.assert_array_equal(again["w"].base, found["w"].base)
