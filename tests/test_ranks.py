import jax.numpy as jnp
import numpy as np
import pytest

from jdetune.ranks import model_ranks, plan_pairs


@pytest.mark.parametrize("n", [3, 4, 5, 6, 7, 15, 40])
def test_pairs_are_linear_in_models_and_even(n):
    plan = plan_pairs(n)
    assert len(plan.first) == min(n * (n - 1) // 2, 2 * n)
    assert (plan.first < plan.second).all()
    assert len({*zip(plan.first.tolist(), plan.second.tolist(), strict=True)}) == len(plan.first)
    for model in range(n):
        for pair, sign in zip(plan.partner[model], plan.sign[model], strict=True):
            assert (plan.first if sign > 0 else plan.second)[pair] == model
        for ij, ik, jk in plan.triples[model]:
            sets = [{int(plan.first[p]), int(plan.second[p])} for p in (ij, ik, jk)]
            assert sets[0] & sets[1] == {model}
            assert sets[2] == (sets[0] | sets[1]) - {model}


@pytest.mark.parametrize("n", [3, 4, 5, 6, 9])
def test_generic_ranks_come_back(n):
    plan = plan_pairs(n)
    rng = np.random.default_rng(n)
    for _ in range(20):
        ranks = rng.integers(0, 20, n)
        found, agree = model_ranks(jnp.asarray(ranks[plan.first] + ranks[plan.second]), plan)
        assert bool(agree)
        np.testing.assert_array_equal(found, ranks)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_one_shared_direction_never_rounds_away(n):
    plan = plan_pairs(n)
    pair_ranks = np.full(len(plan.first), 8)
    pair_ranks[0] -= 1
    assert not bool(model_ranks(jnp.asarray(pair_ranks), plan)[1])


def test_negative_rank_is_no_agreement():
    assert not bool(model_ranks(jnp.array([2, 2, 8]), plan_pairs(3))[1])


def test_two_models_are_refused():
    with pytest.raises(ValueError, match="three models"):
        plan_pairs(2)
