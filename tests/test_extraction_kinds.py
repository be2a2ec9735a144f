"""Extraction from convolutions, stacks, tied heads, other prefixes and vocabularies."""

import numpy as np
import pytest

from jdetune import extraction
from jdetune.checkpoint import merge_peft, open_checkpoint, read_adapter, read_tensor
from tests import pico

CONV, STACK = "stem.conv.weight", "mlp.experts.gate_up_proj"
EMBED, HEAD, QUERY = "model.embed_tokens.weight", "lm_head.weight", "model.query.weight"
#: All of one matrix shape, that of other tests, so that little is compiled.
SHAPES = {CONV: (48, 8, 2, 2), STACK: (3, 48, 32), EMBED: (48, 32), QUERY: (48, 32)}


def family(folder, **config):
    rng = np.random.default_rng(0)
    base = {n: (0.05 * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}
    tuned = {}
    for name, value in base.items():
        parts = value if name == STACK else value.reshape(1, len(value), -1)
        pairs = [pico.pair(rng, part.shape, 2) for part in parts]
        merged = [merge_peft(part, *pair) for part, pair in zip(parts, pairs, strict=True)]
        if name == STACK:
            merged[1] = parts[1]
        tuned[name] = np.stack(merged).reshape(value.shape)
    pico.write(folder / "base", base, **config)
    return base, tuned


def run(folder, tuned, **config):
    path = pico.write(folder / "tune", tuned, **config)
    report = extraction.run(folder / "base", [path], folder / "out")
    entries = {entry["name"]: entry for entry in report["tensors"]}
    return report, entries, folder / "out" / "adapters" / "tune"


def test_convolutions_and_stacks(tmp_path):
    base, tuned = family(tmp_path)
    report, entries, folder = run(tmp_path, tuned)
    assert report["summary"]["exit_code"] == 0
    assert {name: e["rank"] for name, e in entries.items()} == dict.fromkeys(SHAPES, 2)
    updates = read_adapter(folder).updates
    conv = updates[CONV]
    again = merge_peft(base[CONV].reshape(48, 32), conv.left, conv.right)
    np.testing.assert_allclose(again, tuned[CONV].reshape(48, 32), atol=1e-7)
    assert 0.5 < entries[STACK]["remerge_match"] < 1  # the rest are an ulp off
    for index in range(3):
        update = updates[f"{STACK}[{index}]"]
        again = merge_peft(base[STACK][index], update.left, update.right)
        np.testing.assert_allclose(again, tuned[STACK][index], atol=1e-7)
        assert update.left.any() == (index != 1)


def test_a_slice_of_another_base_is_named(tmp_path):
    _, tuned = family(tmp_path)
    tuned[STACK] = tuned[STACK].copy()
    tuned[STACK][2] = np.random.default_rng(5).standard_normal((48, 32))
    report, entries, folder = run(tmp_path, tuned)
    assert report["summary"]["exit_code"] == 5
    assert entries[STACK]["status"] == "not_low_rank"
    assert f"{STACK}[2]" in entries[STACK]["reason"]
    assert "its module is kept whole" in entries[STACK]["reason"]
    np.testing.assert_array_equal(read_adapter(folder).saved[STACK], tuned[STACK])


def test_prefixes_are_those_of_the_base(tmp_path):
    _, tuned = family(tmp_path)
    wrapped = {f"base_model.model.{name}": value for name, value in tuned.items()}
    report, entries, folder = run(tmp_path, wrapped)
    assert report["summary"]["exit_code"] == 0
    assert set(entries) == set(SHAPES)
    assert "base_model.model." in report["notes"][0]
    assert EMBED in read_adapter(folder).updates


@pytest.mark.parametrize("stored", ["base", "model", "both"])
def test_tied_heads_are_extracted_once(tmp_path, stored):
    base, tuned = family(tmp_path)
    if stored != "model":
        pico.write(tmp_path / "base", {**base, HEAD: base[EMBED]})
    if stored != "base":
        tuned[HEAD] = tuned[EMBED]
    report, entries, folder = run(tmp_path, tuned)
    assert report["summary"]["exit_code"] == 0
    assert entries[HEAD]["status"] == "identical"
    assert "tied to" in entries[HEAD]["reason"]
    assert HEAD not in read_adapter(folder).updates


def test_a_head_that_was_untied_is_kept(tmp_path):
    _, tuned = family(tmp_path)
    tuned[HEAD] = tuned[EMBED] + 1
    _, entries, folder = run(tmp_path, tuned)
    assert entries[HEAD]["status"] == "kept_whole"
    np.testing.assert_array_equal(read_adapter(folder).saved[HEAD], tuned[HEAD])


def test_a_resized_vocabulary_is_kept_whole(tmp_path):
    _, tuned = family(tmp_path)
    tuned[EMBED] = np.concatenate([tuned[EMBED], np.ones((2, 32), np.float32)])
    report, entries, folder = run(tmp_path, tuned)
    assert report["summary"]["exit_code"] == 0
    assert "resize_token_embeddings(50)" in entries[EMBED]["reason"]
    stored = open_checkpoint(folder / "adapter_model.safetensors")
    whole = read_tensor(stored, f"base_model.model.{EMBED}")
    np.testing.assert_array_equal(whole, tuned[EMBED])
