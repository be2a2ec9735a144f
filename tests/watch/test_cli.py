"""`jdetune watch` on what `jdetune recover` wrote."""

import json

import numpy as np
import pytest

from jdetune import pipeline, watch
from jdetune.checkpoint import merge_peft
from jdetune.cli import main as program
from jdetune.models import Llama, layout, linear_layers
from jdetune.models.config import llama_config
from jdetune.watch.tuned import load_tuned
from tests import pico

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 30,
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 12, "intermediate_size": 40, "tie_word_embeddings": True,
}  # fmt: skip
MODULE = Llama(llama_config(CONFIG))
TARGETS = ("v_proj", "o_proj", "down_proj")
TUNED = {n: s for n, s in linear_layers(MODULE).items() if n.endswith(TARGETS)}


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    """OUT of three merged decoders, and the true factors of each."""
    root = tmp_path_factory.mktemp("family")
    rng = np.random.default_rng(0)
    base = {
        name: np.asarray(0.3 * rng.standard_normal(shape) if len(shape) > 1 else np.ones(shape))
        for name, (_, shape) in layout(MODULE).items()
    }
    base = {name: array.astype(np.float32) for name, array in base.items()}
    factors = [{f"{n}.weight": pico.pair(rng, s, 2) for n, s in TUNED.items()} for _ in range(3)]
    paths = []
    for i, own in enumerate(factors):
        tuned = {n: merge_peft(base[n], 3 * left, 3 * right) for n, (left, right) in own.items()}
        paths.append(pico.write(root / f"tune-{i}", {**base, **tuned}, **CONFIG))
    out = root / "out"
    found = pipeline.run(paths, out, recover_fn=pico.truth_teller(base))
    assert found["summary"]["base_written"]
    return out, factors


def write_ids(path, rows, seed, extra=(), **known):
    rng = np.random.default_rng(seed)
    lines = [
        {"ids": rng.integers(0, 20, int(rng.integers(3, 9))).tolist(), **known} for _ in range(rows)
    ]
    lines += [{"ids": list(ids), "topic": "odd"} for ids in extra]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def call(capsys, *argv):
    capsys.readouterr()
    code = program.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_monitor_is_made_saved_shown_and_used(tmp_path, recovered, capsys):
    out, factors = recovered
    texts = write_ids(tmp_path / "texts.jsonl", 60, 0, topic="plain")
    new = write_ids(tmp_path / "new.jsonl", 3, 1, extra=[(25, 26, 27), (28, 29, 25)])
    saved, page = tmp_path / "monitor.safetensors", tmp_path / "watch.html"
    code, text, err = call(
        capsys, "watch", out, "--model=1", f"--texts={texts}", f"--check={new}",
        f"--save={saved}", f"--page={page}", "--extremes=3", "--json",
    )  # fmt: skip
    assert code == 0, err
    value = json.loads(text)
    assert value["schema"] == "jdetune.watch/1"
    assert value["model"] == "tune-1"
    assert value["directions"]["count"] == 2 * 2 * 2
    assert value["calibration"]["samples"] == {"user": 60, "assistant": 0}
    assert value["calibration"]["held_out"]["of"] == 6
    assert value["calibration"]["bound"] == pytest.approx(2 * 8 / 60)
    assert len(value["audit"]) == 16
    assert value["audit"][0]["topic"] == "plain"
    monitor = watch.load_monitor(saved)
    truth = watch.directions(factors[1])
    cosines = np.sum(np.asarray(monitor.directions.vectors * truth.vectors), axis=-1)
    assert np.abs(cosines).min() > 0.999  # recovered to rounding
    html = page.read_text()
    assert "8 directions watched" in html
    assert "2t/n" in html
    flagged = {row["input"] for row in value["checked"]["rows"]}
    code, text, _ = call(
        capsys, "watch", out, "--model=tune-1", f"--monitor={saved}", f"--check={new}"
    )
    assert code == 0
    assert f"{len(flagged)} of 5 inputs are flagged" in text
    code, text, _ = call(
        capsys, "watch", out, "--model=1", f"--monitor={saved}", f"--check={new}", "--json"
    )
    assert {row["input"] for row in json.loads(text)["checked"]["rows"]} == flagged


def test_flagged_inputs_say_direction_and_token(tmp_path, recovered, capsys):
    out, _ = recovered
    texts = write_ids(tmp_path / "texts.jsonl", 2, 2)
    new = write_ids(tmp_path / "new.jsonl", 0, 3, extra=[(2, 2, 25, 26, 27, 28, 29)])
    code, text, _ = call(
        capsys, "watch", out, "--model=0", f"--texts={texts}", f"--check={new}", "--margin=0",
        f"--page={tmp_path / 'p.html'}",
    )  # fmt: skip
    assert code == 0
    assert "1 of 1 inputs are flagged" in text
    assert "on token" in text
    assert "<mark>" in (tmp_path / "p.html").read_text()


@pytest.mark.slow
def test_updates_of_values_are_watched_if_asked_for(tmp_path, recovered, capsys):
    out, factors = recovered
    texts, saved = write_ids(tmp_path / "texts.jsonl", 8, 5), tmp_path / "m.safetensors"
    code, _, _ = call(
        capsys, "watch", out, "--model=1", f"--texts={texts}", "--carried", f"--save={saved}"
    )
    assert code == 0
    found = watch.load_monitor(saved).directions
    assert found.count == 2 * (2 + 2 + 2)
    merged = load_tuned(out, "1").params  # what values add goes through the tuned output matrix
    truth = watch.directions(watch.carried(factors[1], merged))
    assert np.abs(np.sum(np.asarray(found.vectors * truth.vectors), axis=-1)).min() > 0.99


@pytest.mark.slow
def test_a_decoder_answers_so_that_both_roles_are_calibrated(tmp_path, recovered, capsys):
    out, _ = recovered
    texts = write_ids(tmp_path / "texts.jsonl", 20, 4)
    code, text, _ = call(
        capsys, "watch", out, "--model=2", f"--texts={texts}", "--answer_tokens=3", "--json"
    )
    assert code == 0
    assert json.loads(text)["calibration"]["samples"] == {"user": 20, "assistant": 20}


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--model=0"], 2, "--texts=FILE or --monitor=FILE"),
        (["--texts=x"], 2, "--model=NAME is missing"),
        (["--model=9", "--texts=TEXTS"], 3, "there are tune-0, tune-1, tune-2"),
        (["--model=0", "--texts=none.txt"], 3, "none.txt"),
        (["--model=0", "--texts=TEXTS", "--trim=0.5"], 2, "--trim"),
        (["--model=0", "--texts=TEXTS", "--save=a.bin"], 2, "--save"),
        (["--model=0", "--monitor=TEXTS"], 3, "TEXTS"),
        (["--model=0", "--texts=WORDS"], 3, "token 99"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, recovered, capsys, flags, code, said):
    texts = write_ids(tmp_path / "texts.jsonl", 4, 0)
    words = write_ids(tmp_path / "words.jsonl", 4, 0, extra=[(99,)])
    paths = {"TEXTS": str(texts), "WORDS": str(words)}
    for word, path in paths.items():
        flags = [flag.replace(word, path) for flag in flags]
        said = said.replace(word, path)
    found, _, err = call(capsys, "watch", recovered[0], *flags)
    assert found == code
    assert said in err


def test_matrices_that_were_not_recovered_make_it_partial(tmp_path, recovered, capsys):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(recovered[0], out)
    report = json.loads((out / "report.json").read_text())
    entry = next(e for e in report["tensors"] if e["name"].endswith("0.mlp.down_proj.weight"))
    entry["status"] = "failed"
    (out / "report.json").write_text(json.dumps(report))
    texts = write_ids(tmp_path / "texts.jsonl", 4, 0)
    code, text, _ = call(capsys, "watch", out, "--model=0", f"--texts={texts}")
    assert code == 5
    assert f"not recovered, so not watched: {entry['name']}" in text


def test_text_needs_a_tokenizer_and_answers_are_told_apart(tmp_path):
    from jdetune.errors import InputError
    from jdetune.models.text import Codec
    from jdetune.watch.texts import read_texts, text_batches

    codec = Codec(lambda text: [1, *(ord(c) % 20 for c in text)], lambda ids: str(ids))
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "abc", "answer": "de", "topic": "t"}\n\n{"text": "xy"}\n')
    first, second = read_texts(path, lambda: codec, 64)
    assert (first.given, len(first.ids), first.topic, first.text) == (4, 6, "t", "abcde")
    assert (second.given, len(second.ids)) == (3, 3)
    _, _, valid, answer = next(text_batches([first, second], 4))
    assert valid.sum(1).tolist() == [6, 3, 0, 0]
    assert answer.sum(1).tolist() == [2, 0, 0, 0]
    plain = tmp_path / "a.txt"
    plain.write_text("hello\n")
    assert read_texts(plain, lambda: codec, 3)[0].ids == (1, 4, 1)
    path.write_text('{"topic": "t"}\n')
    with pytest.raises(InputError, match="line 1"):
        read_texts(path, lambda: codec, 3)
    path.write_text("")
    with pytest.raises(InputError, match="no inputs"):
        read_texts(path, lambda: codec, 3)
