"""The whole page: one self-contained HTML file made from a report alone."""

import base64
import hashlib
import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jdetune.pages import charts, tables, updates, words
from jdetune.pages.markup import Html, escape, join, tag
from jdetune.pages.numbers import duration, several
from jdetune.pages.view import View, read_view

#: By which a page is known as one of ours.
GENERATOR = "jdetune report"
_MARKS = {
    "good": "M5 12.5l4.5 4.5L19 7",
    "part": "M12 6v7.5m0 4v.1",
    "bad": "M6.5 6.5l11 11m0-11l-11 11",
}
_ABOUT = (
    "Recovering a base that its owner withheld may break a licence or the law; use it for "
    "research, audit and repair of models that you have the right to examine."
)


def render(report: Mapping[str, Any]) -> str:
    """The page of a report of ``jdetune recover``.

    Args:
      report: contents of report.json.

    Returns:
      A HTML document that loads nothing from anywhere: the same text for the same report.

    Raises:
      InputError: it is no report of ``jdetune recover``.
    """
    view = read_view(report)
    title = f"{words.headline(view)} \N{MIDDLE DOT} jdetune"
    sections = [
        section("figures", "What became of the weights", tables.coverage(view)),
        words.to_do(view),
        _exactness(view),
        _updates(view),
        section("models", "The models", tables.models(view)),
        section("tensors", "Every tensor", f"{tools(len(view.tensors))}{tables.tensors(view)}"),
        section("made", "How this was made", _made(view)),
    ]
    links = {
        "figures": "Weights",
        "exactness": "Exactness",
        "updates": "Updates",
        "models": "Models",
        "tensors": "Every tensor",
        "made": "How this was made",
    }
    shown = {k: v for k, v in links.items() if view.solved or k not in ("exactness", "updates")}
    tone = words.tone(view)
    head = header(
        tone,
        {"good": "recovered", "part": "partly recovered", "bad": "not recovered"}[tone],
        words.headline(view),
        words.paragraphs(view),
        Html(f"{tables.cards(view)}</div>{words.cautions(view)}"),
        shown,
    )
    return document(title, head, sections, footer(view.said("jdetune_version")))


def document(
    title: str, head: Html, sections: Sequence[str], foot: Html, generator: str = GENERATOR
) -> str:
    """A whole document that loads nothing from anywhere.

    Args:
      title: of the page, in text.
      head: its first part.
      sections: the others; empty ones are left out.
      foot: below them all.
      generator: by which the page is known.
    """
    body, script = join(f"{part}\n" for part in sections if part), _asset("report.js")
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_digest(script)}'"
        "; base-uri 'none'; form-action 'none'"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="{escape(generator)}">\n'
        f'<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_asset('report.css')}</style>\n</head>\n<body>\n"
        f"{head}\n<main>\n{body}</main>\n"
        f"{foot}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def footer(version: str | None) -> Html:
    """What made a page of a report."""
    return tag("footer", f"Made by jdetune {escape(version or '')} from report.json alone.")


def header(
    tone: str,
    verdict: str,
    headline: str,
    paragraphs: Iterable[Html],
    beside: Html,
    links: Mapping[str, str],
) -> Html:
    """The first part of a page: verdict, what it means, key figures, links to the sections.

    Args:
      tone: ``good``, ``part`` or ``bad``.
      verdict: in a word.
      headline: in a few words.
      paragraphs: what it means.
      beside: key figures, then an end of the box around both, and what goes below it.
      links: section to its label.
    """
    mark = (
        '<svg viewBox="0 0 24 24" aria-hidden="true"><circle class="mark" cx="12" cy="12" '
        f'r="10.5"/><path class="mark" d="{_MARKS[tone]}"/></svg>'
    )
    lede = join(tag("p", text, class_="lede") for text in paragraphs)
    nav = join(f'<li><a href="#{key}">{label}</a></li>' for key, label in links.items())
    return Html(
        f'<header class="{tone}"><p class=brand>{mark} jdetune report \N{MIDDLE DOT} {verdict}</p>'
        f"<div class=hero><div><h1>{escape(headline)}</h1>{lede}</div>"
        f"{beside}"
        f'<nav aria-label="Sections"><ul>{nav}</ul></nav></header>'
    )


def _exactness(view: View) -> Html:
    found = (charts.errors_by_depth(view), charts.errors_by_kind(view), charts.remerged_ulps(view))
    shown = [chart for chart in found if chart is not None]
    if not shown:
        return Html("")
    content = f"{tag('div', join(shown), class_='charts')}{tables.ulps(view)}"
    return section("exactness", "How exact it is", content)


def _updates(view: View) -> Html:
    ranks, spectra = updates.rank_map(view), updates.spectra(view)
    parts = [] if ranks is None else [f"<h3>Ranks</h3>{ranks}"]
    if spectra is not None:
        note = (
            "Singular values of the recovered updates, a line for each model. What lies below the "
            "noise edge is lost in the rounding of the stored weights; the further the lines stay "
            "above it, the surer the ranks."
        )
        parts.append(f"<h3>Singular values</h3><p class=note>{escape(note)}</p>{spectra}")
    return section("updates", "What the models changed", join(parts)) if parts else Html("")


def tools(count: int) -> Html:
    """A box to find tensors with, where there are many."""
    if count < 8:
        return Html("")
    return Html(
        "<div class=tools hidden><label>Find <input type=search "
        'placeholder="name, status, shape" aria-label="Find tensors"></label> '
        "<output aria-live=polite></output></div>"
    )


def _made(view: View) -> Html:
    timing = view.said("timing")
    stages = ""
    if isinstance(timing, Mapping):
        laps = [(k, timing.get(k)) for k in ("compare", "recover", "write")]
        known = [f"{name} {duration(t)}" for name, t in laps if isinstance(t, int | float)]
        stages = f" ({', '.join(known)})" if known else ""
    facts = {
        "started": view.said("started_at"),
        "time": f"{duration(view.said('seconds'))}{stages}",
        "device": view.said("device"),
        "jdetune": view.said("jdetune_version"),
        "base": _base(view),
        "solver": ", ".join(
            sorted({str(e.get("method")) for e in view.raw["tensors"] if e.get("method")})
        ),
    }
    items = join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v)
    again = (
        "This page can be made again from report.json: <code class=cmd>jdetune report OUT</code>."
    )
    if view.solved:
        limits = f"<p><strong>What cannot be known.</strong> {escape(words.SHARED)}</p>"
        again = (
            "To compare with the models again, or with the true base where there is one: "
            f"<code class=cmd>jdetune verify OUT --reference=DIR</code>. {again}"
        )
    else:
        limits = ""
    return Html(
        f"<pre><code>{escape(view.said('command') or '')}</code></pre>"
        f"<dl class=facts-list>{items}</dl>{limits}"
        f"<p>{again}</p><p class=note>{escape(_ABOUT)}</p>"
    )


def _base(view: View) -> str | None:
    count, dtype = view.said("base", "n_parameters"), view.said("base", "dtype")
    if not isinstance(count, int):
        return "none was written"
    return (
        f"{several(count, 'weight')}, recovered ones in {dtype}"
        if dtype
        else several(count, "weight")
    )


def section(name: str, heading: str, content: str) -> Html:
    """A part of a page that links lead to."""
    return Html(f'<section id="{name}"><h2>{escape(heading)}</h2>{content}</section>')


def _asset(name: str) -> str:
    """A text file of this package."""
    return importlib.resources.files("jdetune.pages").joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
