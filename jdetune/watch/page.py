"""The page of a watched model: what its directions answer to, false positives, flagged inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

from jdetune.pages.markup import Html, escape, folded, join, table, tag
from jdetune.pages.page import document, section
from jdetune.watch.texts import Text

GENERATOR = "jdetune watch"
#: Characters of an input that are shown, and directions that are not folded away.
_SHOWN, _OPEN = 300, 8
_ABOUT = (
    "Directions are the leading left singular vectors of the fine-tune's update in the matrices "
    "that write to the residual stream. An input is flagged if the cosine of any of its tokens "
    "with any direction lies outside of the range of the calibration by more than the margin."
)
_CAUTION = (
    "The bound holds for inputs that are drawn as the calibration was. A fine-tune that changes "
    "only other matrices, or hides in noise, is not seen; an input that is flagged is new to the "
    "monitor, which is not yet a proof of anything."
)


def render(value: Mapping[str, Any], texts: Sequence[Text], checked: Sequence[Text]) -> str:
    """The page of a report of `jdetune watch`.

    Args:
      value: the report.
      texts: inputs of the calibration and audit.
      checked: inputs that were tested.

    Returns:
      A HTML document that loads nothing from anywhere.
    """
    head = f"{value['model']}: {value['directions']['count']} directions watched"
    header = Html(
        f"<header><p class=brand>jdetune watch</p><h1>{escape(head)}</h1>"
        f'<p class="lede">{escape(_ABOUT)}</p></header>'
    )
    sections = [
        section("rates", "False positives", _rates(value)),
        _flagged(value, checked),
        _audit(value, texts),
        section("made", "How this was made", _made(value)),
    ]
    footer = Html(f"<footer>Made by jdetune {escape(value['jdetune_version'])}.</footer>")
    title = f"{head} \N{MIDDLE DOT} jdetune"
    return document(title, header, sections, footer, GENERATOR)


def rate_words(rate: Mapping[str, Any] | None) -> str:
    """A measured share with its interval, in words."""
    if rate is None:
        return "not measured"
    ends = f"95% interval {rate['low']:.2%} to {rate['high']:.2%}"
    return f"{rate['share']:.2%} ({rate['flagged']} of {rate['of']}; {ends})"


def calibration_facts(value: Mapping[str, Any]) -> dict[str, str]:
    """What is known of false positives, name to words."""
    found = value["calibration"]
    samples = ", ".join(f"{n} {role}" for role, n in found["samples"].items())
    return {
        "calibrated on": f"{samples} inputs",
        "margin": f"{found['margin']:g}",
        "bound 2t/n": f"{found['bound']:.2%}",
        "measured on the last tenth": rate_words(found["held_out"]),
        "measured while streaming": rate_words(found["online"]),
    }


def _rates(value: Mapping[str, Any]) -> Html:
    rows = [(escape(key), [escape(text)]) for key, text in calibration_facts(value).items()]
    shown = table("Harmless inputs that are flagged", ["", ""], rows)
    return Html(f"{shown}<p class=note>{escape(_CAUTION)}</p>")


def _flagged(value: Mapping[str, Any], checked: Sequence[Text]) -> Html:
    found = value["checked"]
    if found is None:
        return Html("")
    lines = []
    for row in found["rows"]:
        tokens = {firing["token"] for firing in row["firings"]}
        words = checked[row["input"]].words
        marked = join(
            tag("mark", escape(word)) if place in tokens else escape(word)
            for place, word in enumerate(words[:_SHOWN])
        )
        fired = join(
            f"<li>{escape(f['direction'])} on {tag('code', escape(f['word']))} "
            f"({escape(f['role'])}), {f['excess']:.3f} outside</li>"
            for f in row["firings"]
        )
        summary = Html(f"input {row['input']}: {marked}")
        lines.append(folded(summary, Html(f"<ul>{fired}</ul>"), is_open=len(lines) < _OPEN))
    words = f"{found['flagged']} of {found['inputs']} inputs are flagged"
    interval = f"95% interval {found['low']:.2%} to {found['high']:.2%}"
    return section("flagged", words, f"<p>{escape(interval)}</p>{join(lines)}")


def _audit(value: Mapping[str, Any], texts: Sequence[Text]) -> Html:
    if not value["audit"]:
        return Html("")
    parts, ends = [], value["audit"]
    for number in range(0, len(ends), 2):
        pair = ends[number : number + 2]
        lists = join(_end(end, texts) for end in pair)
        summary = escape(pair[0]["direction"])
        content = tag("div", lists, class_="charts")
        parts.append(folded(summary, content, is_open=number // 2 < _OPEN))
    note = "The strongest directions of the update first; at each end the inputs furthest out."
    return section("audit", "What the directions answer to", f"<p>{note}</p>{join(parts)}")


def _end(end: Mapping[str, Any], texts: Sequence[Text]) -> Html:
    items = join(
        f"<li>{cosine:+.3f} {escape(texts[sample].text[:_SHOWN])}</li>"
        for sample, cosine in zip(end["samples"], end["cosines"], strict=True)
    )
    topic = ""
    if end["topic"]:
        topic = f" \N{MIDDLE DOT} {end['topic_share']:.0%} {end['topic']}"
    return Html(f"<div><h4>{escape(end['end'] + topic)}</h4><ol>{items}</ol></div>")


def _made(value: Mapping[str, Any]) -> Html:
    facts = {
        "started": value["started_at"],
        "seconds": value["seconds"],
        "device": value["device"],
        "monitor": value["saved"],
        "not recovered, so not watched": ", ".join(value["missing"]) or None,
    }
    items = join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v)
    return Html(
        f"<pre><code>{escape(value['command'])}</code></pre><dl class=facts-list>{items}</dl>"
    )
