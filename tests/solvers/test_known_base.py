"""Updates of a known base: ranks, accuracy against plain SVD, and what is not low rank."""

import ml_dtypes
import numpy as np
import pytest

from jdetune.checkpoint import merge_peft
from jdetune.solvers.known_base import extract_update
from tests import pico, real

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def merged(dtype, rank=4, shape=(96, 64), seed=0, size=0.1):
    rng = np.random.default_rng(seed)
    base = (0.05 * rng.standard_normal(shape)).astype(dtype)
    left, right = pico.pair(rng, shape, rank) if rank else (np.zeros((shape[0], 0)),) * 2
    scale = np.float32(size / 0.1)
    truth = np.matmul((left * scale).astype(np.float64), right)
    return base, merge_peft(base, left * scale, right), truth


def truncated(base, model, rank):
    """What every other tool does: the leading part of a plain SVD."""
    u, s, vt = np.linalg.svd(model.astype(np.float64) - base.astype(np.float64))
    return np.matmul(u[:, :rank] * s[:rank], vt[:rank])


def error(estimate, truth):
    return np.sqrt(np.mean((estimate - truth) ** 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_and_update_are_found_to_rounding(dtype):
    base, model, truth = merged(dtype, size=0.01)
    found = extract_update(base, model)
    assert found.rank == 4
    assert found.low_rank
    # below least squares, whose error is the noise times sqrt(r / row + r / col): 0.32 here
    estimate = np.matmul(found.left.astype(np.float64), found.right)
    assert error(estimate, truth) < 0.25 * found.noise_rms
    assert error(estimate, truth) < 0.75 * error(truncated(base, model, 4), truth)
    assert 0.85 < found.residual_ratio < 1.1


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (300, 40)])
def test_ranks_beyond_the_first_sketch_are_found(shape):
    for rank in (1, min(shape) // 2 - 2):
        base, model, _ = merged(np.float32, rank, shape)
        assert extract_update(base, model).rank == rank
    base, model, _ = merged(np.float32, 60, (192, 160))
    assert extract_update(base, model).rank == 60


def test_a_given_rank_is_kept_and_a_share_cuts():
    base, model, _ = merged(np.float32)
    assert extract_update(base, model, 2).rank == 2
    assert extract_update(base, model, 2).residual_ratio > 100
    assert extract_update(base, model, 500).rank == 64
    cut = extract_update(base, model, 0.5)
    values = np.linalg.svd(model - base, compute_uv=False) ** 2
    wanted = int(np.argmax(np.cumsum(values) >= 0.5 * values.sum())) + 1
    assert cut.rank == wanted < 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_rank_is_said(dtype):
    base, model, _ = merged(dtype)
    other, _, _ = merged(dtype, seed=5)
    assert not extract_update(other, model).low_rank
    noise = np.random.default_rng(1).standard_normal(base.shape) * 0.01
    assert not extract_update(base, (base.astype(np.float64) + noise).astype(dtype)).low_rank


def test_rounding_alone_has_rank_zero():
    base, model, _ = merged(ml_dtypes.bfloat16, size=2e-4)
    assert (base != model).any()
    assert extract_update(base, model).rank == 0


def test_a_model_cast_down_from_a_wider_base():
    base, model, _ = merged(np.float32)
    assert extract_update(base, model.astype(ml_dtypes.bfloat16)).rank == 4


def test_a_model_merged_in_sixteen_bits_and_saved_in_thirty_two():
    base, model, _ = merged(ml_dtypes.bfloat16)
    found = extract_update(base, model.astype(np.float32))
    assert found.rank == 4
    assert found.noise_rms == extract_update(base, model).noise_rms


def test_arguments_are_checked():
    base, model, _ = merged(np.float32)
    for rank in (0, -1, 1.5, 0.0):
        with pytest.raises(ValueError, match="rank is None"):
            extract_update(base, model, rank)


@pytest.mark.parametrize(("dtype", "match"), [(np.float32, 0.85), (ml_dtypes.bfloat16, 0.95)])
def test_a_real_adapter_comes_back(dtype, match):
    name, (left, right) = next(iter(real.factors("distinct_tasks_r16", 0).items()))
    base = real.minilm()[name].astype(dtype)
    model = merge_peft(base, left, right)
    found = extract_update(base, model)
    assert found.rank == 16
    again = merge_peft(base, found.left, found.right)
    assert np.mean(again == model) > match
    truth = np.matmul(left.astype(np.float64), right)
    plain = truncated(base, model, 16)
    ours = np.matmul(found.left.astype(np.float64), found.right)
    assert error(ours, truth) < 0.5 * error(plain, truth)
