"""Model cards: YAML that every reader takes, figures of the report, text that stays text."""

import json

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt

from jdetune import extraction, pipeline
from jdetune.checkpoint import read_adapter
from jdetune.pages import markdown as md
from jdetune.pages.cards import AdapterFacts, adapter_card, base_card
from jdetune.pages.markup import visible
from jdetune.pages.view import read_view
from tests import pico
from tests.pages import reports
from tests.pages.test_page import broken

ODD = [
    *reports.HOSTILE[:6],
    "a: b",
    "# x",
    "- y",
    "'",
    "*",
    "no",
    "1.5",
    "",
    " ",
    "@",
    "a\\",
    "%",
    "é",
]


def parts_of(card):
    """Front matter, read, and the text below."""
    start, head, text = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(head), text


@pytest.mark.parametrize("text", [*ODD, "../../base", "base_model:adapter", "2026-01-01", "~"])
def test_any_text_is_one_line_of_yaml(text):
    said = md.front_matter({"key": text, "list": [text, text], "none": None})
    assert len(said.splitlines()) == 6
    found = yaml.safe_load(said.replace("---", ""))
    assert found == {"key": text, "list": [text, text]}


def test_half_of_a_pair_can_be_written():
    md.yaml_text("\ud800").encode()
    assert yaml.safe_load(md.yaml_text("a\ud800b")) == "a\N{REPLACEMENT CHARACTER}b"


def test_card_of_a_base_says_how_good_it_is():
    head, text = parts_of(
        base_card(read_view(reports.decoder(2)), {"architectures": ["XForCausalLM"]})
    )
    assert head == {
        "library_name": "transformers",
        "license": "unknown",
        "tags": ["jdetune", "recovered-base", "safetensors"],
    }
    assert "14 of 14 that differ" in text
    exact = [t["exact_fraction_est"] for t in reports.decoder(2)["tensors"] if t["code"]]
    assert f"{100 * np.mean(exact):.2f}%" in text
    assert "jdetune recover tune-a tune-b tune-c tune-d --out=recovered" in text
    assert "AutoModelForCausalLM" in text
    assert "What is missing" not in text
    assert "[!WARNING]" in text
    assert "Nothing in the weights can tell it apart" in text


def test_card_of_a_base_says_what_is_missing():
    head, text = parts_of(base_card(read_view(broken()), None))
    assert "library_name" not in head
    assert "from transformers" not in text
    assert "4 tensors of the models are not in it" in text
    assert "differ in most models: `head.bias`" in text
    assert "failed: `layer.0.k.weight`, `layer.1.k.weight`, `layer.2.k.weight`" in text
    assert "Doubtful, better not used: `layer.1.q.weight`" in text
    assert "tune-b is odd" in text


def tokens_of(text):
    """All tokens of a Markdown text, those inside others too."""
    found = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    return [t for token in found for t in (token, *(token.children or ()))]


def test_hostile_names_stay_code():
    report = reports.hostile()
    facts = AdapterFacts(reports.HOSTILE[7], [1], 0.5, None, missing=list(reports.HOSTILE))
    config = {"modules_to_save": list(ODD)}
    base = adapter_card(facts, config, reports.HOSTILE[1], {}, report, ["a"])
    for card in (base, base_card(read_view(report), {})):
        head, text = parts_of(card)
        assert not {"\x1b", "\u202e", "\x00"} & set(text)
        text.encode()
        tokens = tokens_of(text)
        assert not {t.type for t in tokens} & {"html_inline", "html_block", "link_open", "image"}
        assert [t.content for t in tokens if t.type == "fence"][-1].count("\n") == 3
        said = [t.content for t in tokens if t.type == "code_inline"]
        assert visible(reports.HOSTILE[5]) in said
        assert visible(reports.HOSTILE[7]).replace("|", "\N{BROKEN BAR}") in said
    assert parts_of(base)[0]["base_model"] == reports.HOSTILE[1]


@pytest.mark.parametrize("text", ["a`b", "``", "`", "a``b`", "", "x|y"])
def test_code_holds_any_text(text):
    said = md.code(text)
    fence = said[: len(said) - len(said.lstrip("`"))]
    assert said.endswith(fence)
    assert fence not in said[len(fence) : -len(fence)]
    assert "|" not in said


def test_recover_writes_cards_that_load_and_do_not_matter(tmp_path):
    family, out = pico.make(tmp_path), tmp_path / "out"
    report = pipeline.run(family.paths, out, recover_fn=pico.truth_teller(family.base))
    head, text = parts_of((out / "base" / "README.md").read_text())
    assert head["library_name"] == "transformers"
    assert report["command"] in text
    for model, entry in enumerate(report["inputs"]):
        folder = out / "adapters" / entry["name"]
        head, text = parts_of((folder / "README.md").read_text())
        assert (head["library_name"], head["base_model"]) == ("peft", "../../base")
        matches = [t["remerge_match"][model] for t in report["tensors"] if t["remerge_match"]]
        assert f"| {100 * np.mean(matches):.2f}% |" in text  # the matrices are of one size
        assert "| 2 |" in text
        assert len(read_adapter(folder).updates) == 4


def test_extract_writes_cards(tmp_path):
    family = pico.make(tmp_path)
    base = pico.write(tmp_path / 'ba"se: #1', family.base)
    report = extraction.run(base, family.paths[:1], tmp_path / "out")
    folder = tmp_path / "out" / "adapters" / "tune-0"
    head, text = parts_of((folder / "README.md").read_text())
    assert head["base_model"] == str(base.resolve())
    matches = [t["remerge_match"] for t in report["tensors"] if t["status"] == "extracted"]
    assert f"{100 * np.mean(matches):.2f}%" in text
    assert json.dumps(str(base.resolve())) in text
    assert "the base it was compared with" in text
