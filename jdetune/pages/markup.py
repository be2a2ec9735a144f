"""HTML from text that nobody can trust: escaping, and a few elements."""

import html
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NewType

#: Text that is HTML already; everything else goes through ``escape``.
Html = NewType("Html", str)
#: Controls, marks that turn the direction of text, lone surrogates, separators of lines.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(text: object) -> str:
    r"""Text on one line in which every character can be seen; the others as Python escapes them.

    Example:
      >>> visible("a\x1b[2J\u202eb")
      'a\\x1b[2J\\u202eb'
    """
    return "".join(
        c if unicodedata.category(c) not in _UNSEEN else ascii(c)[1:-1] for c in str(text)
    )


def escape(text: object) -> Html:
    """Text for elements and quoted attributes.

    Example:
      >>> escape('<b title="x">')
      '&lt;b title=&quot;x&quot;&gt;'
    """
    return Html(html.escape(visible(text), quote=True))


def breakable(name: str) -> Html:
    """A dotted name that may break after its dots."""
    return Html(escape(name).replace(".", ".<wbr>"))


def join(parts: Iterable[str]) -> Html:
    """Pieces of HTML, one after another."""
    return Html("".join(parts))


def tag(name: str, content: Html | str = "", **attributes: object) -> Html:
    """An element; ``content`` is HTML, attributes are escaped, ``_`` in their names is ``-``.

    Example:
      >>> tag("p", escape("a < b"), class_="note")
      '<p class="note">a &lt; b</p>'
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{said}>{content}</{name}>")


def table(
    caption: str,
    headers: Sequence[str],
    rows: Iterable[tuple[Html, Sequence[Html]]],
    kind: str = "",
) -> Html:
    """A table whose first column heads its rows, in a box that scrolls sideways.

    Args:
      caption: what it shows, in text.
      headers: of the columns, in text.
      rows: the head of each row and its cells, in HTML.
      kind: class of the table.
    """
    head = join(tag("th", escape(text), scope="col") for text in headers)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
        for first, cells in rows
    )
    inner = f"{tag('caption', escape(caption))}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    whole = tag("table", inner, class_=kind or None)
    return tag("div", whole, class_="scroll", role="region", tabindex=0, aria_label=caption)


def figure(title: str, picture: Html, note: Html | str = "") -> Html:
    """A chart with its heading and a line below."""
    return tag("figure", f"{tag('h3', escape(title))}{picture}{tag('figcaption', note)}")


def folded(summary: Html, content: Html, is_open: bool = False, kind: str | None = None) -> Html:
    """Content that a click shows."""
    opened = " open" if is_open else ""
    label = "" if kind is None else f' class="{escape(kind)}"'
    return Html(f"<details{label}{opened}><summary>{summary}</summary>{content}</details>\n")
