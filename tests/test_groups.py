"""Ranks given by the user, ranks too large for triples, and adapters cut to a share of energy."""

import numpy as np
import pytest

import jdetune
from jdetune import synth
from jdetune.status import Status
from tests import reference


@pytest.mark.slow
def test_ranks_that_fit_pairs_but_not_triples_are_solved_by_iteration():
    family = synth.family(6, 48, 48, 20, decay=1.0)
    found = jdetune.recover(family.merged)
    assert Status(int(found.status)) is Status.OK
    assert found.ranks.tolist() == [20] * 6
    true = reference.log_mse(found.base, family.base)
    assert true < np.log10(reference.sigma(family.merged) ** 2)
    assert float(found.predicted_error) == pytest.approx(true, abs=0.4)


@pytest.mark.parametrize("n_models", [3, 4])
def test_ranks_that_counting_forbids_are_refused(n_models):
    """r = 20 of 32: with n = 3 and 4, sum (32 - r)^2 is below 32^2."""
    family = synth.family(n_models, 32, 32, 15, decay=1.0)
    found = jdetune.recover(family.merged)
    assert Status(int(found.status)) in (Status.RANK_TOO_LARGE, Status.NOT_LOW_RANK)
    assert np.isnan(found.base).all()


def test_a_known_rank_is_taken_and_a_wrong_one_refused():
    family = synth.family(4, 96, 80, 4)
    # precision="float64" looks as closely as the solver does where a rank is given
    closely = jdetune.SubspaceIntersection(polish=False, precision="float64")
    plain = jdetune.recover(family.merged, closely)
    known = jdetune.recover(family.merged, jdetune.SubspaceIntersection(polish=False, rank=4))
    np.testing.assert_array_equal(known.base, plain.base)
    wrong = jdetune.recover(family.merged, jdetune.SubspaceIntersection(polish=False, rank=3))
    assert Status(int(wrong.status)) is Status.NOT_LOW_RANK
    assert np.isnan(wrong.base).all()


def test_a_share_of_energy_cuts_the_adapters_and_not_the_base():
    family = synth.family(4, 96, 80, 4)
    plain = jdetune.recover(family.merged, jdetune.SubspaceIntersection(polish=False))
    cut = jdetune.recover(family.merged, jdetune.SubspaceIntersection(polish=False, rank=0.9))
    np.testing.assert_array_equal(cut.base, plain.base)
    for i in range(4):
        update = family.left[i].astype(np.float64) @ family.right[i]
        values = np.linalg.svd(update, compute_uv=False)
        energy = np.cumsum(values**2) / np.sum(values**2)
        assert cut.ranks[i] == np.searchsorted(energy, 0.9) + 1
        kept = cut.adapters.left[i].astype(np.float64) @ cut.adapters.right[i]
        lost = np.sum((update - kept) ** 2) / np.sum(update**2)
        assert lost == pytest.approx(1 - energy[cut.ranks[i] - 1], rel=1e-3)


@pytest.mark.parametrize("value", [0, -1, 1.5, 0.0])
def test_ranks_that_mean_nothing_are_named(value):
    with pytest.raises(ValueError, match="rank is None"):
        jdetune.SubspaceIntersection(rank=value)
