"""Merging, subsets, sampling of layers, and a ledger that survives being cut off."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from jdetune.bench import layers, methods, protocol, subsets
from jdetune.bench.layers import Layer, Lora, Source
from jdetune.bench.ledger import Ledger
from jdetune.errors import InputError, OutputError

NAMES = tuple(f"layers.{i}.{kind}_proj" for i in range(6) for kind in "qkvo")


def one_layer(n=4, shape=(48, 32), rank=2, seed=0, name="layers.0.q_proj"):
    rng = np.random.default_rng(seed)
    loras = tuple(
        Lora(f"m{i}", rank, 3.0, *(
            (0.1 * rng.standard_normal(s)).astype(np.float32)
            for s in [(shape[0], rank), (rank, shape[1])]
        ))
        for i in range(n)
    )  # fmt: skip
    return Layer(name, (0.05 * rng.standard_normal(shape)).astype(np.float32), loras)


def source_of(*found):
    def read(wanted):
        yield from (layer for layer in found if layer.name in wanted)

    models = tuple(lora.name for lora in found[0].loras)
    return Source(tuple(layer.name for layer in found), models, read, {"data": "made"})


def settings(**changes):
    plain = protocol.Settings("made", ("layers.0.q_proj",), (3,), 2, ("lora-ft", "mean-lora"))
    return dataclasses.replace(plain, **changes)


def test_merges_in_float32_as_the_published_code_does():
    torch = pytest.importorskip("torch")
    layer = one_layer()
    base, merged = layers.merge(layer, [2, 0])
    lora = layer.loras[2]
    b, a = torch.from_numpy(lora.left), torch.from_numpy(lora.right)
    theirs = torch.from_numpy(layer.base) + (lora.alpha / lora.rank * b) @ a
    assert base.dtype == merged.dtype == np.float32
    # the same sum in another order: one unit in the last place
    np.testing.assert_allclose(merged[0], theirs.numpy(), rtol=0, atol=2.0**-25)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_round_the_base_and_then_the_sum_once(dtype):
    layer, stored = one_layer(), layers.MERGE_DTYPES[dtype]
    base, merged = layers.merge(layer, [1], dtype)
    lora = layer.loras[1]
    exact = base.astype(np.float64) + 1.5 * lora.left.astype(np.float64) @ lora.right
    assert base.dtype == merged.dtype == stored
    info = ml_dtypes.finfo(stored)
    apart = np.abs(merged[0].astype(np.float64) - exact)
    assert (apart <= 0.5001 * float(info.eps) * np.abs(exact) + float(info.tiny)).all()


def test_subsets_are_without_replacement_different_and_seeded():
    drawn = protocol.draw_subsets(15, 5, 10, seed=3)
    assert len(set(drawn)) == 10
    assert all(len(set(one)) == 5 and max(one) < 15 for one in drawn)
    assert drawn == protocol.draw_subsets(15, 5, 10, seed=3)
    assert drawn != protocol.draw_subsets(15, 5, 10, seed=4)
    assert drawn[:3] == protocol.draw_subsets(15, 5, 3, seed=3)
    assert len(protocol.draw_subsets(4, 3, 10, seed=0)) == 4


@pytest.mark.parametrize("count", [1, 3, 4, 5, 12, 24, 30])
def test_sampled_layers_span_depth_and_type(count):
    chosen = layers.spread(NAMES, count)
    assert len(chosen) == min(count, len(NAMES))
    assert chosen == [name for name in NAMES if name in chosen]
    if count >= 12:
        kinds = [layers.kind_of(name) for name in chosen]
        assert {kinds.count(kind) for kind in set(kinds)} == {min(count, 24) // 4}
        for kind in set(kinds):
            depths = [layers.depth_of(name) for name in chosen if layers.kind_of(name) == kind]
            assert depths[0] == 0
            assert depths[-1] == 5


def test_the_published_settings_are_the_papers():
    found = {s.name: (s.n, s.steps, s.layers, s.rank) for s in subsets.SUBSETS.values()}
    assert found == {
        "vit": (5, 300, 24, 16),
        "stable-diffusion-1.5": (5, 300, 264, 32),
        "mistral-7b-v0.1-sft": (12, 1000, 128, 64),
        "mistral-7b-v0.1-dpo": (8, 1000, 128, 64),
    }


def test_baselines_are_what_they_say(tmp_path):
    layer = one_layer()
    cells = protocol.run(source_of(layer), settings(repeats=1), tmp_path)
    models = cells[0]["models"]
    _, merged = layers.merge(layer, models)
    apart = [np.log10(np.mean(np.square(w.astype(np.float64) - layer.base))) for w in merged]
    assert cells[0]["w_error"] == pytest.approx(np.mean(apart), abs=1e-12)
    mean = np.mean(merged, 0, dtype=np.float64).astype(np.float32)
    apart = np.log10(np.mean(np.square(mean.astype(np.float64) - layer.base)))
    assert cells[1]["w_error"] == pytest.approx(apart, abs=1e-12)
    assert cells[1]["w_error"] < cells[0]["w_error"]


def test_a_cut_off_run_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    source = source_of(*(one_layer(name=name, seed=i) for i, name in enumerate(NAMES[:3])))
    chosen = settings(layers=source.names)
    whole = protocol.run(source, chosen, tmp_path / "whole")
    true, calls = methods.run, []

    def dies(method, task):
        calls.append(method)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return true(method, task)

    monkeypatch.setattr(methods, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        protocol.run(source, chosen, tmp_path / "cut")
    path = tmp_path / "cut" / "cells.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # the last line is torn
    calls.clear()
    monkeypatch.setattr(methods, "run", lambda m, t: calls.append(m) or true(m, t))
    again = protocol.run(source, chosen, tmp_path / "cut")
    assert len(calls) == len(whole) - 4
    timeless = [
        [{k: v for k, v in cell.items() if k not in ("seconds", "first_call")} for cell in run]
        for run in (whole, again)
    ]
    assert timeless[0] == timeless[1]
    lines = path.read_text().splitlines()
    torn = []
    for line in lines:
        try:
            json.loads(line)
        except ValueError:
            torn.append(line)
    assert len(torn) == 1


def test_a_ledger_of_other_settings_is_not_added_to(tmp_path):
    source = source_of(one_layer())
    protocol.run(source, settings(), tmp_path)
    more = protocol.run(source, settings(counts=(3, 4)), tmp_path)
    assert {cell["n"] for cell in more} == {3, 4}
    with pytest.raises(OutputError, match="seed differ.*--overwrite"):
        protocol.run(source, settings(seed=1), tmp_path)
    with pytest.raises(OutputError, match="merge_dtype differ"):
        protocol.run(source, settings(merge_dtype="bfloat16"), tmp_path)
    cells = protocol.run(source, settings(seed=1), tmp_path, overwrite=True)
    assert len(Ledger(tmp_path / "cells.jsonl", json.loads(
        (tmp_path / "cells.jsonl").read_text().splitlines()[0])["settings"]
    ).cells) == len(cells)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"counts": (5,)}, "has? 4 models|have 4 models"),
        ({"methods": ("magic",)}, "no method 'magic'"),
        ({"layers": ("nowhere",)}, "no layer 'nowhere'"),
    ],
)
def test_what_cannot_be_run_is_refused_first(tmp_path, change, said):
    with pytest.raises(InputError, match=said):
        protocol.run(source_of(one_layer()), settings(**change), tmp_path)
    assert not (tmp_path / "cells.jsonl").exists()
