"""Changes of coordinates leave what a model computes as it is, and nothing else does."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from jdetune import defend, models
from jdetune.defend.places import Kind
from jdetune.errors import InputError
from tests.defend import small

#: Rounding to float32 of weights in another basis, and of two runs through two blocks.
ROUNDING = 1e-5
#: What every architecture has.
KINDS: dict[str, dict[Kind, int]] = {
    "bert": {"order": 2, "mix": 4},
    "vit": {"order": 2, "mix": 4, "scale": 4},
    "dinov2": {"order": 2, "mix": 4, "scale": 8},
    "llama": {"order": 2, "mix": 2, "turn": 2, "scale": 7},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_change_leaves_the_outputs(name):
    module = small.MODULES[name]
    before, free = small.weights(module), defend.places(module)
    for kind, count in KINDS[name].items():
        assert sum(place.kind == kind for place in free) == count
        after, changes = defend.change_coordinates(module, before, 3, (kind,), spread=3.0)
        assert len(changes) == count
        for change in changes:
            for axis in change.place.axes:
                assert np.abs(after[axis.name] - before[axis.name]).max() > 1e-3, axis
        assert defend.output_change(module, before, after, small.inputs(module)) < ROUNDING
    assert {place.kind for place in free} == set(KINDS[name])


def test_outputs_move_where_only_one_side_is_changed():
    """The measure sees what it should: a place without one of its tensors is not free."""
    before = small.weights(small.BERT)
    for place in defend.places(small.BERT)[:3]:
        for left_out in (axis for axis in place.axes if axis.name.endswith("weight")):
            axes = tuple(axis for axis in place.axes if axis != left_out)
            change = defend.draw(dataclasses.replace(place, axes=axes), np.random.default_rng(0))
            after = defend.moved(before, [change])
            assert defend.output_change(small.BERT, before, after, small.IDS) > 1e-2


def test_rotary_positions_allow_turns_of_pairs_only():
    before = small.weights(small.LLAMA)
    turns = [place for place in defend.places(small.LLAMA) if place.kind == "turn"]
    free = [dataclasses.replace(place, kind="mix") for place in turns]
    after = defend.moved(before, [defend.draw(place, np.random.default_rng(0)) for place in free])
    assert defend.output_change(small.LLAMA, before, after, small.IDS) > 1e-2


def test_tied_embeddings_keep_the_last_norm():
    config = dataclasses.replace(small.LLAMA.config, tie_word_embeddings=True)
    names = {place.name for place in defend.places(models.Llama(config))}
    assert "model.norm" not in names
    assert "model.norm" in {place.name for place in defend.places(small.LLAMA)}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_orders_are_undone_bit_by_bit(dtype):
    before = {n: w.astype(dtype) for n, w in small.weights(small.BERT).items()}
    after, changes = defend.change_coordinates(small.BERT, before, 5, ("order",))
    assert {str(array.dtype) for array in after.values()} == {np.dtype(dtype).name}
    back = defend.moved(after, [defend.inverse(change) for change in changes])
    for name, array in before.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("name", KINDS)
def test_inverses_undo_all_else_to_rounding(name):
    before = small.weights(small.MODULES[name])
    after, changes = defend.change_coordinates(small.MODULES[name], before, 5, spread=2.0)
    back = defend.moved(after, [defend.inverse(change) for change in changes[::-1]])
    for key, array in before.items():
        np.testing.assert_allclose(back[key], array, atol=2e-6)  # ulps of values of size 4


def test_a_missing_tensor_is_named():
    before = small.weights(small.BERT)
    del before["encoder.layer.1.output.dense.weight"]
    with pytest.raises(InputError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        defend.change_coordinates(small.BERT, before, 0)
