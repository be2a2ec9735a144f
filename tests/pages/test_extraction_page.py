"""The page of an extraction: well formed, deaf to what names say, and of the same figures."""

import copy
import json

import numpy as np
import pytest

from jdetune.cli import main as program
from jdetune.pages import markup
from jdetune.pages.extraction_page import render_extraction
from tests import pico
from tests.pages.test_page import KNOWN, Page

EVIL = '</style><script>alert(1)</script><img src=x onerror="alert(2)">\u202e'


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """The report of one good model and one with a matrix of full rank, and the page written."""
    root = tmp_path_factory.mktemp("extracted")
    made = pico.make(root, n_models=2)
    pico.write(root / "base", made.base)
    name = "encoder.layer.0.dense.weight"
    noise = np.random.default_rng(0).standard_normal(made.base[name].shape).astype(np.float32)
    pico.write(root / "tune-1", {**made.models[1], name: made.base[name] + noise})
    argv = ["extract", f"--base={root}/base", *map(str, made.paths), f"--out={root}/out"]
    assert program.main(argv) == 5
    report = json.loads((root / "out" / "report.json").read_text())
    return report, (root / "out" / "report.html").read_text()


def well_formed(text):
    page = Page(text)
    assert page.problems == []
    assert {tag for tag, _ in page.elements} <= KNOWN
    assert len(page.named("script")) == len(page.named("h1")) == 1
    assert not any(key.startswith("on") for _, own in page.elements for key in own)
    assert all(a["href"].removeprefix("#") in page.ids for a in page.named("a"))
    assert len(set(page.ids)) == len(page.ids)
    return page


def test_what_is_written_is_the_page_of_the_report(extracted):
    report, text = extracted
    assert text == render_extraction(report)
    page = well_formed(text)
    said = "".join(page.text)
    assert "A part of the adapters is out" in said
    assert "8 matrices of 2 models differ from the base by a low-rank update, of rank 2." in said
    assert "1 tensor could not be extracted" in said
    differing = [t for t in report["tensors"] if t["status"] != "identical"]
    assert len(differing) == 9
    for tensor in differing:
        assert tensor["name"] in page.rows
        assert (tensor["reason"] or "") in said


def test_report_writes_it_again(extracted, tmp_path, capsys):
    report, text = extracted
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert program.main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text() == text
    assert "worst residual" in capsys.readouterr().out
    one = next(t for t in report["tensors"] if t["status"] == "extracted")
    report = {**report, "tensors": [{**one, "shape": None}]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert program.main(["report", str(tmp_path)]) == 3
    assert "not a whole report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "written", "words"),
    [
        (0, [True, True], "The adapters are out"),
        (0, [True, False], "The adapter is out"),
        (4, [False, False], "No adapter could be extracted"),
    ],
)
def test_words_fit_the_outcome(extracted, code, written, words):
    report = copy.deepcopy(extracted[0])
    report["summary"]["exit_code"] = code
    for entry, yes in zip(report["inputs"], written, strict=True):
        entry["written"] = yes
    page = well_formed(render_extraction(report))
    assert words in "".join(page.text)


def test_nothing_extracted_has_no_figures(extracted):
    report = copy.deepcopy(extracted[0])
    report["tensors"] = [t for t in report["tensors"] if t["status"] == "identical"]
    text = "".join(well_formed(render_extraction(report)).text)
    assert "No matrix of 2 models differs from the base by a low-rank update." in text
    assert "worst residual" not in text.partition("The models")[0]


def test_hostile_names_stay_text(extracted):
    report = copy.deepcopy(extracted[0])
    for tensor in report["tensors"]:
        if tensor["model"] == "tune-0":
            tensor["model"] = EVIL
            tensor["name"] += EVIL
            tensor["reason"] = EVIL
    report["inputs"][0] |= {"name": EVIL, "path": EVIL}
    report |= {"command": EVIL, "base_path": EVIL, "notes": [EVIL]}
    page = well_formed(render_extraction(report))
    assert markup.visible(EVIL) in "".join(page.text)
