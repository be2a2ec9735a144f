import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdetune import watch
from jdetune.errors import InputError
from jdetune.models import LlamaConfig, Lora
from jdetune.result import Adapters, Recoveries
from jdetune.status import Status
from jdetune.watch.names import writer
from tests import pico

#: Width 24, as wide as it is tall in one matrix, so that a wrong side is no error of shapes.
SHAPES = {
    "model.layers.0.self_attn.o_proj.weight": (24, 24),
    "model.layers.0.mlp.down_proj.weight": (24, 40),
    "model.layers.1.self_attn.o_proj.weight": (24, 24),
    "model.layers.1.mlp.down_proj.weight": (24, 40),
    "model.layers.1.mlp.up_proj.weight": (40, 24),
}


def factors(rank=3, seed=0):
    rng = np.random.default_rng(seed)
    return {name: pico.pair(rng, shape, rank) for name, shape in SHAPES.items()}


def close(found, update):
    """Against NumPy's SVD of the whole matrix; signs are free."""
    for layer in range(2):
        for slot, (matrix, rank) in enumerate(found.slots):
            part = "self_attn.o_proj" if matrix == "attention" else "mlp.down_proj"
            u, s, _ = np.linalg.svd(update[f"model.layers.{layer}.{part}.weight"])
            vector = np.asarray(found.vectors[layer, slot], np.float64)
            np.testing.assert_allclose(found.values[layer, slot], s[rank], rtol=1e-5)
            assert abs(vector @ u[:, rank]) > 1 - 1e-5  # float32 vectors of float64 arithmetic
            assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def products(pairs):
    return {name: left.astype(np.float64) @ right for name, (left, right) in pairs.items()}


def test_factors_give_what_a_whole_svd_gives():
    pairs = factors()
    found = watch.directions(pairs, top_k=2)
    assert found.vectors.shape == (2, 4, 24)
    assert found.places == (("residual", 1), ("residual", 2))
    assert found.count == 8
    assert found.label(1, 2) == "mlp 1 #0"
    close(found, products(pairs))


def test_ranks_may_be_smaller_than_top_k():
    pairs = factors()
    name = "model.layers.1.self_attn.o_proj.weight"
    left, right = pairs[name]
    pairs[name] = (left * [1, 1, 0], right)
    found = watch.directions(pairs, top_k=20)
    assert found.vectors.shape == (2, 6, 24)
    assert found.count == 11
    assert not np.any(np.asarray(found.vectors)[~np.asarray(found.valid)])
    assert not found.valid[1, 2]


def test_a_dense_difference_gives_the_same():
    pairs = factors()
    before = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    after = {name: update.astype(np.float32) for name, update in products(pairs).items()}
    update = watch.difference(after, before)
    assert "model.layers.1.mlp.up_proj.weight" not in update
    close(watch.directions(update, top_k=3), products(pairs))


def test_flax_kernels_and_gpt2_are_read_from_the_other_side():
    pairs = {n: p for n, p in factors().items() if "up_proj" not in n}
    wanted = watch.directions(pairs)
    flax = {n.removesuffix("weight") + "kernel": (r.T, b.T) for n, (b, r) in pairs.items()}
    found = watch.directions({n.replace(".", "/"): p for n, p in flax.items()})
    np.testing.assert_allclose(found.vectors, wanted.vectors, atol=1e-6)
    names = {"self_attn.o_proj": "attn.c_proj", "mlp.down_proj": "mlp.c_proj"}
    gpt2 = {}
    for name, (left, right) in pairs.items():
        _, _, layer, *middle, _ = name.split(".")
        gpt2[f"h.{layer}.{names['.'.join(middle)]}.weight"] = (right.T, left.T)
    np.testing.assert_allclose(watch.directions(gpt2).vectors, wanted.vectors, atol=1e-6)
    wrong = watch.directions(pairs | {}, transposed=False)
    square = watch.directions({n: p for n, p in pairs.items() if "o_proj" in n}, transposed=True)
    assert np.abs(np.asarray(square.vectors) - np.asarray(wrong.vectors[:, :3])).max() > 0.1
    with pytest.raises(InputError, match="transposed=True"):
        watch.directions({n: (p[1].T, p[0].T) for n, p in pairs.items()})


def test_adapters_of_the_models_and_recoveries_are_read():
    pairs = {n: p for n, p in factors().items() if "up_proj" not in n}
    wanted = watch.directions(pairs)
    lora = {
        n.removesuffix(".weight"): Lora(jnp.asarray(right), jnp.asarray(left / 4), 4.0)
        for n, (left, right) in pairs.items()
    }
    np.testing.assert_allclose(watch.directions(lora).vectors, wanted.vectors, atol=1e-5)
    np.testing.assert_allclose(watch.directions(lora).values, wanted.values, rtol=1e-5)
    other = factors(seed=1)
    layers = {}
    for name, pair in pairs.items():
        stack = np.stack([np.zeros((24, len(pair[1].T)), np.float32)] * 2)
        made = pico.known(stack, stack[0])
        parts = (np.stack([other[name][i], pair[i]]) for i in range(2))
        layers[name] = dataclasses.replace(made, adapters=Adapters(*parts))
    found = watch.directions(Recoveries(layers), model=1)
    np.testing.assert_allclose(found.vectors, wanted.vectors, atol=1e-6)
    with pytest.raises(ValueError, match="which model"):
        watch.directions(Recoveries(layers))
    name = "model.layers.1.mlp.down_proj.weight"
    failed = dataclasses.replace(layers[name], status=np.array(int(Status.NOT_LOW_RANK), np.int32))
    found = watch.directions(Recoveries({**layers, name: failed}), model=1)
    assert not np.any(found.valid[1, 3:])


def test_written_has_a_place_for_each_matrix():
    pairs = factors()
    found = watch.directions(pairs, where="written")
    assert found.places == (("attention", 0), ("mlp", 0), ("attention", 1), ("mlp", 1))
    assert found.slots == (("", 0), ("", 1), ("", 2))
    assert found.label(3, 1) == "mlp 1 #1"
    together = watch.directions(pairs)
    np.testing.assert_array_equal(found.vectors[1], together.vectors[0, 3:])
    assert watch.directions(pairs, drop_last=1).places == (("residual", 1),)


def test_updates_that_write_nothing_are_refused():
    pairs = factors()
    with pytest.raises(InputError, match="writes to the residual stream"):
        watch.directions({n: p for n, p in pairs.items() if "up_proj" in n})
    with pytest.raises(InputError, match="zero"):
        watch.directions({n: (0 * b, a) for n, (b, a) in pairs.items()})
    name = "model.layers.0.mlp.down_proj.weight"
    twice = {name: pairs[name], f"decoder.{name}": pairs[name]}
    with pytest.raises(InputError, match="a second mlp"):
        watch.directions(twice)


@pytest.mark.parametrize(
    ("name", "layer", "matrix"),
    [
        ("encoder.layer.3.output.dense.weight", 3, "mlp"),
        ("bert.encoder.layer.3.attention.output.dense", 3, "attention"),
        ("encoder.layer.1.mlp.fc2.weight", 1, "mlp"),
        ("transformer.h.11.attn.c_proj.weight", 11, "attention"),
        ("gpt_neox.layers.2.attention.dense.weight", 2, "attention"),
        ("model.decoder.layers.4.fc2.weight", 4, "mlp"),
    ],
)
def test_names_of_writers(name, layer, matrix):
    found = writer(name)
    assert found is not None
    assert found[:2] == (layer, matrix)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.weight", "pooler.dense.weight", "lm_head.weight",
     "encoder.layer.0.intermediate.dense.weight", "encoder.layer.0.output.LayerNorm.weight"],
)  # fmt: skip
def test_other_matrices_are_no_writers(name):
    assert writer(name) is None


def test_the_projects_models_have_their_writers():
    from jdetune.models import Bert, BertConfig, Llama, ViT, ViTConfig, linear_layers

    small: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 8}  # fmt: skip
    llama = LlamaConfig(vocab_size=8, num_key_value_heads=1, head_dim=4, **small)
    modules = [
        Llama(llama),
        Bert(BertConfig(vocab_size=8, **small)),
        ViT(ViTConfig(image_size=8, patch_size=4, **small)),
        ViT(ViTConfig(image_size=8, patch_size=4, layer_scale=True, **small)),
    ]
    for module in modules:
        found = [writer(name) for name in linear_layers(module)]
        wanted = {(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")}
        assert {one[:2] for one in found if one} == wanted


def test_a_pytree_with_a_leading_axis_of_models():
    found = [watch.directions(factors(seed=s), top_k=2) for s in range(2)]
    both = jax.tree.map(lambda *parts: jnp.stack(parts), *found)
    assert both.vectors.shape == (2, 2, 4, 24)
    assert both.places == found[0].places


def test_updates_of_values_are_seen_where_the_output_carries_them():
    rng = np.random.default_rng(0)
    pre = "model.layers.0.self_attn."
    value, own = pico.pair(rng, (8, 24), 2), pico.pair(rng, (24, 16), 1)
    output = rng.standard_normal((24, 16))
    weights = {f"{pre}o_proj.weight": output}
    update = {
        f"{pre}o_proj.weight": own,
        f"{pre}v_proj.weight": value,
        f"{pre}q_proj.weight": value,
    }
    found = watch.carried(update, weights, head_dim=4)
    # two heads read each value head: values of heads are [v0, v0, v1, v1]
    heads = value[0].reshape(2, 4, 2)[[0, 0, 1, 1]].reshape(16, 2)
    whole = np.concatenate([own[0] @ own[1], output @ heads @ value[1]], axis=1)
    left, right = found[f"{pre}o_proj.weight"]
    np.testing.assert_allclose(left @ right, whole, atol=1e-6)
    directions = watch.directions(found)
    u = np.linalg.svd(whole)[0][:, 0]
    assert abs(u @ np.asarray(directions.vectors[0, 0])) > 1 - 1e-5
    assert directions.count == 3
    with pytest.raises(InputError, match="head_dim"):
        watch.carried(update, weights)
    with pytest.raises(InputError, match="no such weight"):
        watch.carried(update, {})


def test_updates_of_inner_matrices_go_through_mlp_down():
    rng = np.random.default_rng(0)
    pair, down = pico.pair(rng, (40, 24), 2), rng.standard_normal((24, 40))
    for inner, last in (("mlp.up_proj", "mlp.down_proj"), ("intermediate.dense", "output.dense")):
        name, target = (f"encoder.layer.3.{part}.weight" for part in (inner, last))
        left, right = watch.carried({name: pair}, {target: down})[target]
        np.testing.assert_allclose(left @ right, down @ pair[0] @ pair[1], atol=1e-5)
