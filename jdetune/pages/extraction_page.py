"""The page of ``jdetune extract``: which adapters came out, and how exact they are."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jdetune.pages.markup import Html, breakable, escape, folded, join, table, tag
from jdetune.pages.numbers import NONE, duration, fixed, largest, percent, several, span
from jdetune.pages.page import document, footer, header, section, tools

Entry: TypeAlias = Mapping[str, Any]
#: Statuses with their colour and what they are called.
_FATES = {
    "extracted": ("recovered", "extracted"),
    "identical": ("identical", "equal to the base"),
    "kept_whole": ("per_model", "kept whole"),
    "not_low_rank": ("failed", "not low rank"),
    "failed": ("failed", "failed"),
    "skipped": ("skipped", "skipped"),
}
_HEADLINES = {
    "good": "The adapters are out",
    "part": "A part of the adapters is out",
    "bad": "No adapter could be extracted",
}
_ABOUT = (
    "An adapter tells what a model was trained for. Use this for research, audit and repair of "
    "models that you have the right to examine; their licences still hold."
)
#: Tensors of a model that are shown without a click.
_OPEN_ROWS = 24


def render_extraction(report: Entry) -> str:
    """The page of a report of ``jdetune extract``.

    Args:
      report: contents of report.json.

    Returns:
      A HTML document that loads nothing from anywhere: the same text for the same report.
    """
    tone = {0: "good", 5: "part"}.get(report["summary"]["exit_code"], "bad")
    written = [entry for entry in report["inputs"] if entry["written"]]
    headline = _HEADLINES[tone]
    if tone == "good" and len(written) == 1:
        headline = "The adapter is out"
    links = {"models": "Models", "tensors": "Every tensor", "made": "How this was made"}
    verdict = {"good": "extracted", "part": "partly extracted", "bad": "not extracted"}[tone]
    notes = join(tag("p", escape(note), class_="note") for note in report["notes"])
    head = header(
        tone, verdict, headline, _paragraphs(report), Html(f"{_cards(report)}</div>{notes}"), links
    )
    sections = [
        section("models", "The models", _models(report)),
        section("tensors", "Every tensor", f"{tools(len(report['tensors']))}{_tensors(report)}"),
        section("made", "How this was made", _made(report)),
    ]
    title = f"{headline} \N{MIDDLE DOT} jdetune"
    return document(title, head, sections, footer(report["jdetune_version"]))


def _of(report: Entry, model: str) -> list[Entry]:
    return [entry for entry in report["tensors"] if entry["model"] == model]


def _good(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry["status"] == "extracted"]


def match_of(entries: Sequence[Entry]) -> float | None:
    """Share of the weights of extracted matrices that come back bit for bit."""
    sizes = [math.prod(entry["shape"]) for entry in entries]
    equal = sum(e["remerge_match"] * size for e, size in zip(entries, sizes, strict=True))
    return equal / sum(sizes) if sizes else None


def _paragraphs(report: Entry) -> list[Html]:
    good, summary = _good(report["tensors"]), report["summary"]
    count = several(len(report["inputs"]), "model")
    said = f"{several(len(good), 'matrix', 'matrices')} of {count} differ from the base by a "
    said += f"low-rank update, of rank {span([e['rank'] for e in good])}."
    if not good:
        said = f"No matrix of {count} differs from the base by a low-rank update."
    said += f" {several(summary['identical'], 'tensor')} equal the base's."
    bad = summary["not_low_rank"] + summary["failed"] + summary["skipped"]
    said += f" {several(bad, 'tensor')} could not be extracted: the reasons stand below." * bool(
        bad
    )
    if not good:
        return [escape(said)]
    again = (
        f"Merging the adapters into the base again gives back <strong>{percent(match_of(good))}"
        "</strong> of the weights in these matrices bit for bit; the rest is off by an ulp or so, "
        "since a matrix product rounds differently in every order of its sums."
    )
    return [escape(said), Html(again)]


def _cards(report: Entry) -> Html:
    good = _good(report["tensors"])
    worst = largest([entry["residual_ratio"] for entry in good])
    written = sum(entry["written"] for entry in report["inputs"])
    shown = [
        ("models", f"{len(report['inputs']):,}", f"{several(written, 'adapter')} written"),
        ("matrices", f"{len(good):,}", "extracted, all models together"),
        ("ranks", span([entry["rank"] for entry in good]), ""),
        ("back when merged again", percent(match_of(good)), "bit for bit"),
        ("worst residual", fixed(worst), "rms left over, in rounding errors"),
        ("time", duration(report["seconds"]), report["device"]),
    ]
    boxes = (
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for label, value, note in shown
        if value != NONE
    )
    return tag("dl", join(boxes), class_="cards")


def _models(report: Entry) -> Html:
    rows = []
    for entry in report["inputs"]:
        own = _of(report, entry["name"])
        good, count = _good(own), Counter(e["status"] for e in own)
        path = escape(entry["path"]).replace("/", "/<wbr>")
        rest = sum(count[status] for status in ("not_low_rank", "failed", "skipped"))
        cells = [
            f"{len(good):,}",
            span([e["rank"] for e in good]),
            fixed(largest([e["residual_ratio"] for e in good])),
            percent(match_of(good)),
            f"{count['identical']:,}",
            f"{count['kept_whole']:,}",
            f"{rest:,}",
            "written" if entry["written"] else "not written",
        ]
        head = Html(f"{escape(entry['name'])}<small class=path>{path}</small>")
        rows.append((head, [escape(cell) for cell in cells]))
    headers = ("model", "extracted", "ranks", "worst residual", "back when merged again")
    return table("The models", (*headers, "equal", "kept whole", "other", "adapter"), rows)


def _tensors(report: Entry) -> Html:
    """What differs, in a fold for each model; what is equal to the base is counted only."""
    folds = []
    for entry in report["inputs"]:
        own = _of(report, entry["name"])
        told = [e for e in own if e["status"] != "identical" or e["reason"]]
        dots = join(
            f'<span class="{_FATES[status][0]}"><i></i>{count:,} {_FATES[status][1]}</span>'
            for status, count in Counter(e["status"] for e in own).items()
        )
        summary = Html(
            f"<b class=name>{escape(entry['name'])}</b><span class=facts>"
            f"<span>{several(len(own), 'tensor')}</span>{dots}</span>"
        )
        bad = any(e["status"] in ("not_low_rank", "failed", "skipped") for e in own)
        headers = ["tensor", "shape", "status", "rank", "residual / noise", "back"]
        why = any(e["reason"] for e in told)
        rows = [_row(e, why) for e in told]
        headers += ["reason"] if why else []
        inner = table(f"Tensors of {entry['name']}", headers, rows, "tensors") if rows else ""
        folds.append(folded(summary, Html(inner), bad or len(told) <= _OPEN_ROWS, "kind"))
    return join(folds)


def _row(entry: Entry, why: bool) -> tuple[Html, list[Html]]:
    colour, called = _FATES[entry["status"]]
    shape = " \N{MULTIPLICATION SIGN} ".join(map(str, entry["shape"])) or "scalar"
    rank = NONE if entry["rank"] is None else str(entry["rank"])
    figures = (rank, fixed(entry["residual_ratio"]), percent(entry["remerge_match"]))
    cells = [
        Html(f"{escape(shape)}<small>{escape(entry['dtype'])}</small>"),
        Html(f'<span class="fate {colour}"><i></i>{called}</span>'),
        *map(escape, figures),
    ]
    if why:
        cells.append(tag("small", escape(entry["reason"] or ""), class_="why"))
    return breakable(entry["name"]), cells


def _made(report: Entry) -> Html:
    facts = {
        "base": report["base_path"],
        "started": report["started_at"],
        "time": duration(report["seconds"]),
        "device": report["device"],
        "jdetune": report["jdetune_version"],
        "adapters": report["adapter_format"],
    }
    items = join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return Html(
        f"<pre><code>{escape(report['command'])}</code></pre><dl class=facts-list>{items}</dl>"
        f"<p class=note>{escape(_ABOUT)}</p>"
    )
