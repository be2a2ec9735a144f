"""Tied heads and resized vocabularies, planned and written."""

import json

import numpy as np
import pytest

from jdetune import pipeline
from jdetune.checkpoint import load_stack, merge_peft, open_checkpoint, read_tensor
from jdetune.checkpoint.alignment import align
from jdetune.checkpoint.ties import is_alias, is_tied, tie_pairs
from jdetune.checkpoint.vocabulary import cut_rows, sizes_of
from jdetune.verification import verify
from tests import family_zoo as zoo
from tests import pico

ROWS, WIDTH = 48, 32
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.0.query.weight"


def base_of(rng, rows=ROWS):
    shapes = {EMBED: (rows, WIDTH), QUERY: (ROWS, WIDTH)}
    return {n: (0.05 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}


def family(folder, heads=(False, False, False), extra=(0, 0, 0), untied=(), **config):
    """Models with a tuned embedding; some store the head, some have more rows, some an own head."""
    rng = np.random.default_rng(0)
    base, paths = base_of(rng), []
    for index, (head, more) in enumerate(zip(heads, extra, strict=True)):
        tensors = {n: merge_peft(base[n], *pico.pair(rng, (ROWS, WIDTH), 2)) for n in base}
        grown = rng.standard_normal((more, WIDTH)).astype(np.float32)
        tensors[EMBED] = np.concatenate([tensors[EMBED], grown])
        if index in untied:
            tensors[HEAD] = merge_peft(base[EMBED], *pico.pair(rng, (ROWS, WIDTH), 1))
        elif head:
            tensors[HEAD] = tensors[EMBED]
        own = {"vocab_size": ROWS + more, "architectures": ["LlamaForCausalLM"], **config}
        paths.append(pico.write(folder / f"tune-{index}", tensors, **own))
    return {**base, HEAD: base[EMBED]}, paths


def run(folder, base, paths, **options):
    out = folder / "out"
    report = pipeline.run(paths, out, recover_fn=pico.truth_teller(base), **options)
    return report, out


def tensors_of(path):
    found = open_checkpoint(path)
    return {name: read_tensor(found, name) for name in found.tensors}


def test_a_head_is_tied_to_the_one_embedding_of_its_shape(tmp_path):
    _, paths = family(tmp_path, (True, False, False))
    models = [open_checkpoint(path) for path in paths]
    assert tie_pairs(models) == {HEAD: EMBED}
    aligned = align(models)
    assert [is_alias(c, HEAD, EMBED) for c in aligned.checkpoints] == [False, True, True]
    assert all(HEAD in c.tensors for c in aligned.checkpoints)
    _, others = family(tmp_path / "untied", (True, False, False), tie_word_embeddings=False)
    aligned = align([open_checkpoint(path) for path in others])
    assert [HEAD in c.tensors for c in aligned.checkpoints] == [True, False, False]


def test_the_config_of_the_text_model_counts():
    assert not is_tied({"text_config": {"tie_word_embeddings": False}})
    assert is_tied({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}})


@pytest.mark.parametrize("heads", [(False, True, True), (True, False, True), (True, True, True)])
def test_heads_that_equal_the_embedding_are_solved_once(tmp_path, heads):
    base, paths = family(tmp_path, heads)
    report, out = run(tmp_path, base, paths)
    assert report["summary"]["exit_code"] == 0
    assert zoo.statuses(report) == dict.fromkeys([EMBED, HEAD, QUERY], "recovered")
    assert "tied to" in zoo.entry(report, HEAD)["reason"]
    written = tensors_of(out / "base")
    assert (HEAD in written) is heads[0]  # the first model's convention
    for name, value in written.items():
        np.testing.assert_array_equal(value, base[name])
    stored = set(tensors_of(out / "adapters/tune-1/adapter_model.safetensors"))
    assert not any("lm_head" in key for key in stored)
    assert "merge_and_unload" in (out / "adapters/tune-1/README.md").read_text()
    reference = pico.write(tmp_path / "true", base)
    assert not verify(out, reference, paths)["failures"]


def test_an_untied_head_among_tied_ones_is_solved_by_itself(tmp_path):
    base, paths = family(tmp_path, (False, False, False), untied=(1,))
    report, out = run(tmp_path, base, paths)
    assert zoo.statuses(report)[HEAD] == "recovered"
    assert zoo.entry(report, HEAD)["ranks"] == [2, 1, 2]
    assert HEAD not in tensors_of(out / "base")
    keys = [set(tensors_of(out / f"adapters/tune-{i}/adapter_model.safetensors")) for i in range(3)]
    head = "base_model.model." + HEAD  # whole: factors would be merged into the embedding too
    assert [head in found for found in keys] == [False, True, False]
    assert not any("lm_head.lora" in key for found in keys for key in found)
    assert not verify(out, models=paths)["failures"]


def test_an_untied_base_gets_factors_for_both(tmp_path):
    base, paths = family(tmp_path, (True, True, True), tie_word_embeddings=False)
    _, out = run(tmp_path, base, paths)
    stored = set(tensors_of(out / "adapters/tune-1/adapter_model.safetensors"))
    assert {key.split(".")[-3] for key in stored if "lm_head" in key} == {"lm_head"}
    assert not verify(out, models=paths)["failures"]


@pytest.mark.parametrize("extra", [(0, 3, 0), (5, 3, 0), (5, 0, 0)])
def test_common_rows_of_resized_vocabularies(tmp_path, extra):
    base, paths = family(tmp_path, extra=extra)
    report, out = run(tmp_path, base, paths)
    assert report["summary"]["exit_code"] == 0
    written = tensors_of(out / "base")
    for name, value in written.items():
        np.testing.assert_array_equal(value, base[name])
    said = zoo.entry(report, EMBED)
    assert said["shape"] == [ROWS, WIDTH]
    assert f"the base has the {ROWS} rows" in said["reason"]
    assert any("vocabularies differ" in text for text in report["warnings"])
    assert json.loads((out / "base/config.json").read_text())["vocab_size"] == ROWS
    for index, more in enumerate(extra):
        folder = out / f"adapters/tune-{index}"
        stored = tensors_of(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        card = (folder / "README.md").read_text()
        if more:
            whole = stored["base_model.model." + EMBED]
            np.testing.assert_array_equal(whole, tensors_of(paths[index])[EMBED])
            assert config["modules_to_save"] == ["lm_head", "model.embed_tokens"]
            np.testing.assert_array_equal(stored["base_model.model." + HEAD], whole)
            assert f"resize_token_embeddings({ROWS + more})" in card
        else:
            assert "base_model.model.model.embed_tokens.lora_embedding_A" in stored
            assert config["modules_to_save"] is None
            assert "resize" not in card
    assert not verify(out, models=paths)["failures"]
    assert load_stack(paths)[EMBED].shape == (3, ROWS, WIDTH)


def test_tokenizer_files_are_those_of_the_smallest_vocabulary(tmp_path):
    base, paths = family(tmp_path, extra=(2, 0, 0))
    (paths[0] / "vocab.txt").write_text("more")
    (paths[0] / "added_tokens.json").write_text("{}")
    _, out = run(tmp_path, base, paths)
    assert (out / "base/vocab.txt").read_text() == (paths[1] / "vocab.txt").read_text()
    assert not (out / "base/added_tokens.json").exists()


def test_only_what_has_the_vocabularys_rows_is_cut(tmp_path):
    models = []
    for index, rows in enumerate((6, 8)):
        tensors = {
            EMBED: np.zeros((rows, 4), np.float32),
            "lm_head.bias": np.zeros(rows, np.float32),
            "score.weight": np.zeros((3 + index, 4), np.float32),
            QUERY: np.zeros((6, 4), np.float32),
        }
        models.append(open_checkpoint(pico.write(tmp_path / str(index), tensors)))
    assert sizes_of(models) == (6, 8)
    cut, reasons = cut_rows(models)
    assert set(reasons) == {EMBED, "lm_head.bias"}
    assert cut[1].tensors["lm_head.bias"].shape == (6,)
    assert cut[1].tensors["lm_head.bias"].whole == (8,)
    assert cut[1].tensors["score.weight"].shape == (4, 4)


def test_other_prefixes_and_shards_give_the_same_base(tmp_path):
    known = pico.make(tmp_path / "f")
    wrapped = {f"base_model.model.{n}": v for n, v in known.models[1].items()}
    pico.write(known.paths[1], wrapped, shards=3)
    backwards = dict(reversed(known.models[2].items()))
    pico.write(known.paths[2], {f"module.{n}": v for n, v in backwards.items()}, shards=2)
    for path in (known.paths[1], known.paths[2]):
        (path / "model.safetensors").unlink()
    report, out = run(tmp_path, known.base, known.paths)
    assert report["summary"]["exit_code"] == 0
    for name, value in tensors_of(out / "base").items():
        np.testing.assert_array_equal(value, known.base[name])
    assert len([t for t in report["warnings"] if "tensors of tune-" in t]) == 2
    assert not verify(out, models=known.paths)["failures"]


def test_names_that_match_in_two_ways_are_said(tmp_path):
    known = pico.make(tmp_path / "f")
    both = {f"a.{n}": v for n, v in known.models[0].items()}
    both |= {f"b.{n}": v for n, v in known.models[0].items()}
    pico.write(known.paths[0], both)
    with pytest.raises(Exception, match="no tensor in common"):
        run(tmp_path, known.base, known.paths)


def test_what_is_excluded_is_no_failure(tmp_path):
    base, paths = family(tmp_path, (True, False, False), extra=(0, 0, 0))
    report, _ = run(tmp_path, base, paths, options=pipeline.Options(exclude="embed_tokens"))
    assert report["summary"]["exit_code"] == 0
    assert zoo.statuses(report) == {EMBED: "skipped", HEAD: "skipped", QUERY: "recovered"}


def test_a_resized_embedding_can_be_excluded(tmp_path):
    base, paths = family(tmp_path, extra=(0, 4, 0))
    report, _ = run(tmp_path, base, paths, options=pipeline.Options(exclude="embed_tokens"))
    assert report["summary"]["exit_code"] == 0
