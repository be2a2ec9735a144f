"""report.html: whole, well formed, alone in the world, and deaf to what names say."""

import doctest
import html.parser
import json
import re
import subprocess

import numpy as np
import pytest

from jdetune import pipeline
from jdetune.cli import main as program
from jdetune.errors import InputError, OutputError
from jdetune.pages import markdown, markup, numbers, svg, view
from jdetune.pages.files import write_page
from jdetune.pages.page import render
from tests import pico
from tests.pages import reports

VOID = {"meta", "input", "br", "wbr", "link", "img", "hr"}
#: Elements of the pages; a hostile name would bring others.
KNOWN = {
    *re.findall(
        r"\w+",
        "html head meta title style body header main footer section nav aside div span p a h1 h2 "
        "h3 h4 ul li dl dt dd b i small strong sup code pre br wbr table caption thead tbody tr th "
        "td details summary figure figcaption label input output script svg desc path "
        "text tspan circle",
    )
}


class Page(html.parser.HTMLParser):
    """Elements, their text and what is wrong with their nesting."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.problems, self.elements, self.rows, self.ids = [], [], [], [], []
        self.text, self.cell = [], None
        self.feed(text)
        self.close()
        self.problems += [f"{tag} is not closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        if len({key for key, _ in attrs}) < len(attrs):
            self.problems.append(f"{tag} says an attribute twice")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "th" and dict(attrs).get("scope") == "row":
            self.cell = []

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"{tag} is closed where it is not open, at {self.getpos()}")
        if tag == "th" and self.cell is not None:
            self.rows.append("".join(self.cell))
            self.cell = None

    def handle_data(self, data):
        self.text.append(data)
        if self.cell is not None:
            self.cell.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def broken():
    rng = np.random.default_rng(1)
    tensors = [reports.solved(f"layer.{i}.q.weight", rng) for i in range(5)]
    tensors[1] |= {"code": "NOISE_DOMINATED", "reason": "too small. Add models."}
    tensors += [
        reports.failed(f"layer.{i}.k.weight", "full fine-tuning. Leave it out.") for i in range(3)
    ]
    tensors += [reports.copied("head.bias", status="per_model", reason="differs", base_dtype=None)]
    return reports.report(tensors, warnings=["tune-b is odd"])


ALL = {
    "decoder": lambda: reports.decoder(4),
    "broken": broken,
    "hostile": reports.hostile,
    "nothing": lambda: reports.report([]),
    "equal": lambda: reports.report([reports.copied("a.weight")]),
    "refused": lambda: reports.report([reports.failed("a.weight", "no")], base=None),
}


@pytest.mark.parametrize("name", ALL)
def test_pages_are_well_formed_and_self_contained(name):
    text = render(ALL[name]())
    page = Page(text)
    assert page.problems == []
    assert {tag for tag, _ in page.elements} <= KNOWN
    assert len(set(page.ids)) == len(page.ids)
    assert len(page.named("script")) == 1
    assert not page.named("script")[0]
    assert len(page.named("h1")) == 1
    for _, attributes in page.elements:
        assert not any(key.startswith("on") for key in attributes)
        assert not {"src", "srcset", "action", "data", "background"} & set(attributes)
    links = [a["href"] for a in page.named("a")]
    assert links
    assert all(link.removeprefix("#") in page.ids for link in links)
    # nothing is loaded; text may name addresses, style and script may not
    own = text[: text.index("</style>")] + text[text.rindex("<script>") :]
    assert not re.search(r"https?:|//\w|url\(|@import", own)
    policy = page.named("meta")[1]["content"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_is_in_a_row_and_figures_say_what_they_show(name):
    report = ALL[name]()
    page = Page(render(report))
    for tensor in report["tensors"]:
        assert markup.visible(tensor["name"]) in page.rows
    for picture in page.named("svg"):
        assert picture.get("aria-hidden") == "true" or picture.get("role") == "img"
    titled = sum(1 for picture in page.named("svg") if picture.get("role") == "img")
    assert len(page.named("desc")) == titled
    assert len(page.named("caption")) == len(page.named("table"))
    assert all(th.get("scope") in ("row", "col") for th in page.named("th"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))


def test_hostile_names_stay_text():
    text = render(reports.hostile())
    page = Page(text)
    shown = "".join(page.text)
    for name in reports.HOSTILE:
        assert markup.visible(name) in shown
    assert "<script>alert" not in text
    assert "onerror" not in {key for _, attributes in page.elements for key in attributes}
    for bad in ("\x1b", "\x00", "\x07", "\u202e", "\ud800"):
        assert bad not in text
    text.encode()  # half a pair could not be written


@pytest.mark.slow
def test_a_report_of_three_thousand_tensors_makes_a_small_page():
    report = reports.decoder(330, 5)
    text = render(report)
    assert len(report["tensors"]) > 2900
    assert len(text.encode()) < 3_000_000
    assert len(Page(text).rows) > 2900
    # names without a number in common cannot be grouped by it
    rng = np.random.default_rng(0)
    odd = [
        reports.solved(f"{rng.bytes(6).hex()}x.w{k % 999}", rng, (2, 2, 2, 2)) for k in range(3000)
    ]
    text = render(reports.report(odd))
    assert len(text.encode()) < 4_000_000
    assert text.count("<details") < 60


def test_the_same_report_makes_the_same_page():
    assert render(reports.decoder(3)) == render(json.loads(json.dumps(reports.decoder(3))))


def test_words_fit_the_outcome():
    said = {name: "".join(Page(render(make())).text) for name, make in ALL.items()}
    assert "The base is back" in said["decoder"]
    assert "28 of 28 matrices in which the 4 models differ were recovered" in said["decoder"]
    assert "What is not recovered" not in said["decoder"]
    assert "Most of the base is back" not in said["broken"]
    assert "A part of the base is back" in said["broken"]
    assert "4 of 8 matrices in which the 4 models differ were recovered" in said["broken"]
    assert "Failed: 3 tensors" in said["broken"]
    assert "Full fine-tuning. Leave it out." in said["broken"]
    assert "Recovered, but doubtful: 1 tensor" in said["broken"]
    assert "tune-b is odd." in said["broken"]
    assert "The base could not be recovered" in said["refused"]
    assert "no base was written" in said["refused"]
    assert "Predicted error" not in said["refused"]
    assert "What cannot be known" not in said["refused"]
    assert "What cannot be known" in said["broken"]
    assert "The models differ in no matrix" in said["equal"]


def test_figures_are_those_of_the_report():
    report = reports.decoder(2)
    solved = [t for t in report["tensors"] if t["code"] == "OK"]
    said = "".join(Page(render(report)).text)
    exact = np.mean([t["exact_fraction_est"] for t in solved])
    assert f"{100 * exact:.2f}%" in said
    assert f"10\N{MINUS SIGN}{-np.mean([t['predicted_error'] for t in solved]):.1f}" in said
    counts = np.sum([list(t["ulp_histogram"].values()) for t in solved], axis=0)
    assert f"+1 ulp: {100 * counts[4] / counts.sum():.2f}%" in said
    worst = min(
        v[-1] / e
        for t in solved
        for v, e in zip(t["singular_values"], t["noise_edge"], strict=True)
    )
    assert f"{float(f'{worst:.3g}'):,.0f} times the noise edge" in said


def test_older_reports_and_missing_figures_are_shown():
    report = reports.decoder(2)
    for tensor in report["tensors"]:
        for key in ("ulp_histogram", "singular_values", "noise_edge", "remerge_match"):
            del tensor[key]
    report["tensors"][3] |= {"exact_fraction_est": None, "predicted_error": None}
    page = Page(render(report))
    assert page.problems == []
    assert "noise edge" not in "".join(page.text)


def test_an_exact_base_is_called_so():
    rng = np.random.default_rng(0)
    change = {"predicted_error": -40.0, "exact_fraction_est": 1.0, "verdict": "exact"}
    tensors = [reports.solved(f"h.{i}.w", rng, **change) for i in range(3)]
    said = "".join(Page(render(reports.report(tensors))).text)
    assert "The base is back, bit for bit" in said
    assert "3 exact" in said


@pytest.mark.parametrize(
    "change",
    [{"tensors": None}, {"tensors": [{"name": "a"}]}, {"inputs": [3]}, {"kind": "extract"}],
)
def test_what_is_no_report_of_a_recovery_is_refused(change):
    with pytest.raises(InputError, match=r"not a whole report|`jdetune extract`"):
        render({**reports.decoder(1), **change})


def test_only_a_page_of_ours_is_replaced(tmp_path):
    path = tmp_path / "page.html"
    size = write_page(reports.decoder(1), path)
    assert path.stat().st_size == size == write_page(reports.decoder(1), path)
    path.write_text("<html>mine</html>")
    for where in (path, tmp_path):
        with pytest.raises(OutputError, match="is no page that jdetune wrote"):
            write_page(reports.decoder(1), where)
    assert path.read_text() == "<html>mine</html>"


def test_recover_writes_it_and_report_writes_it_again(tmp_path, capsys):
    family, out = pico.make(tmp_path), tmp_path / "out"
    report = pipeline.run(family.paths, out, recover_fn=pico.truth_teller(family.base))
    first = (out / "report.html").read_text()
    assert first == render(report)
    (out / "report.html").unlink()
    assert program.main(["report", str(out)]) == 0
    assert "4 of 4 differing matrices recovered" in capsys.readouterr().out
    assert (out / "report.html").read_text() == first
    other = tmp_path / "other.html"
    assert program.main(["report", str(out / "report.json"), f"--out={other}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == str(other)
    assert other.read_text() == first
    assert program.main(["report", str(tmp_path)]) == 3
    assert program.main(["report"]) == 2


def test_the_script_parses_where_node_is_installed(tmp_path):
    text = render(reports.decoder(1))
    script = text[text.rindex("<script>") + 8 : text.rindex("</script>")]
    assert len(script) < 4000
    (tmp_path / "a.js").write_text(script)
    try:
        subprocess.run(["node", "--check", tmp_path / "a.js"], check=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("node is not installed")


@pytest.mark.parametrize("module", [markup, numbers, svg, view, markdown])
def test_examples(module):
    assert doctest.testmod(module).failed == 0
