"""Which models share a base, from pairs of them."""

import numpy as np
import pytest

from jdetune import foreign, synth
from jdetune.foreign import labels, solvable, split_by_base

SIXTEEN = ("float16", "bfloat16")


def models(count, seed, dtype="float32"):
    rms = 1e-3 if dtype == "float32" else 5e-3
    return synth.family(count, 48, 40, 2, seed, dtype, update_rms=rms).merged


@pytest.mark.parametrize("dtype", ["float32", *SIXTEEN])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_one_stranger_is_found_wherever_it_stands(dtype, place):
    stack = np.insert(models(3, 1, dtype), place, models(1, 2, dtype)[0], axis=0)
    others = tuple(model for model in range(4) if model != place)
    assert split_by_base(stack) == (others, (place,))


def test_groups_come_largest_first_with_their_labels():
    parts = [models(2, 1), models(3, 2), models(2, 3), models(1, 4)]
    groups = split_by_base(np.concatenate(parts))
    assert groups == ((2, 3, 4), (0, 1), (5, 6), (7,))
    assert labels(groups).tolist() == [1, 1, 0, 0, 0, 2, 2, 3]


def test_solvable_is_one_large_group_and_nobody_else_in_company():
    assert solvable(((0, 1, 2), (3,), (4,)))
    assert not solvable(((0, 1), (2,)))
    assert not solvable(((0, 1, 2), (3, 4)))
    assert not solvable(((0, 1, 2), (3, 4, 5)))


def test_one_base_with_mixed_ranks_or_equal_models_is_one_group():
    assert len(split_by_base(synth.family(5, 48, 40, [0, 12, 1, 3, 0]).merged)) == 1


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_models_rounded_to_sixteen_bits_and_saved_in_thirty_two(dtype):
    stack = np.concatenate([models(3, 1, dtype), models(1, 2, dtype)]).astype(np.float32)
    assert split_by_base(stack) == ((0, 1, 2), (3,))


def test_models_rounded_to_different_widths_may_share_a_base():
    family = synth.family(4, 48, 40, 2, update_rms=5e-3)
    narrow = family.merged[:2].astype("bfloat16").astype(np.float32)
    assert len(split_by_base(np.concatenate([narrow, family.merged[2:]]))) == 1


def test_full_fine_tuning_dora_and_requantising_look_like_another_base():
    stack = models(6, 1)
    rng = np.random.default_rng(0)
    stack[3] += (1e-4 * rng.standard_normal((48, 40))).astype(np.float32)
    stack[4] *= (1 + 1e-3 * rng.standard_normal((48, 1))).astype(np.float32)
    step = np.float32(np.abs(stack[5]).max() / 127)
    stack[5] = np.round(stack[5] / step) * step
    assert split_by_base(stack) == ((0, 1, 2), (3,), (4,), (5,))


@pytest.mark.parametrize("seed", range(3))
def test_a_dequantised_base_does_not_hide_in_the_rounding_of_sixteen_bits(seed):
    """Rows of very different size, with outliers: int8 is above the rounding in the small ones."""
    rng = np.random.default_rng(seed)
    rows = np.exp(1.5 * rng.standard_normal((96, 1)))
    base = (0.03 * rows * rng.standard_t(4, (96, 96))).astype(np.float32)
    step = np.abs(base).max(axis=1, keepdims=True) / np.float32(127)
    tunes = [1e-2 * rng.standard_normal((96, 2)) @ rng.standard_normal((2, 96)) for _ in range(6)]
    half = [(base.astype("bfloat16") + t).astype("bfloat16") for t in tunes[:3]]
    whole = [np.round(base / step) * step + t for t in tunes[3:]]
    stack = np.stack([*half, *whole]).astype(np.float32)
    assert split_by_base(stack) == ((0, 1, 2), (3, 4, 5))


def test_large_matrices_are_sampled(monkeypatch):
    monkeypatch.setattr(foreign, "SIDE", 32)
    sizes = []
    svd = np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda a, **k: sizes.append(a.shape) or svd(a, **k))
    assert split_by_base(np.concatenate([models(3, 1), models(1, 2)])) == ((0, 1, 2), (3,))
    assert set(sizes) == {(32, 32)}


def test_the_work_is_linear_in_the_models(monkeypatch):
    tried = []
    related = foreign.related

    def count(pair, storage):
        tried.append(1)
        return related(pair, storage)

    monkeypatch.setattr(foreign, "related", count)
    split_by_base(np.concatenate([models(10, 1), models(1, 2)]))
    assert len(tried) == 10
    tried.clear()
    alone = split_by_base(np.concatenate([models(1, seed) for seed in range(12)]))
    assert alone == tuple((model,) for model in range(12))
    assert len(tried) == 11 + 10 + 9 + 8
