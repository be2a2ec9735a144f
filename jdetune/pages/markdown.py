"""Markdown and YAML from text that nobody can trust."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from jdetune.pages.markup import visible

_ESCAPED = {'"': '\\"', "\\": "\\\\"}
_SIMPLE = re.compile(r"(\.\./)*[A-Za-z][A-Za-z0-9_./-]*(:[a-z]+)?")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
_ACTIVE = re.compile(r"([\\`*_{}\[\]<>()#!|~&$])")


def yaml_text(text: object) -> str:
    r"""A text as YAML's scalar on one line, in double quotes unless it is a plain word or path.

    Example:
      >>> yaml_text("../../base"), yaml_text("no")
      ('../../base', '"no"')
      >>> print(yaml_text('say: "hi"\n# no'))
      "say: \"hi\"\n# no"
    """
    said = str(text)
    if _SIMPLE.fullmatch(said) and said.lower() not in _WORDS:
        return said
    return f'"{"".join(_yaml_char(c) for c in said)}"'


def front_matter(values: Mapping[str, str | Sequence[str] | None]) -> str:
    """The head of a model card; what is None is left out."""
    lines = ["---"]
    for key, value in values.items():
        if isinstance(value, str):
            lines.append(f"{key}: {yaml_text(value)}")
        elif value is not None:
            lines += [f"{key}:", *(f"- {yaml_text(item)}" for item in value)]
    return "\n".join([*lines, "---", ""])


def plain(text: object) -> str:
    r"""Text that Markdown shows as it is, on one line.

    Example:
      >>> print(plain("a_b <i>"))
      a\_b \<i\>
    """
    return _ACTIVE.sub(r"\\\1", visible(text))


def code(text: object) -> str:
    """A name between backticks, more of them than it holds.

    Example:
      >>> code("a.b"), code("a`b")
      ('`a.b`', '`` a`b ``')
    """
    said = visible(text).replace("|", "\N{BROKEN BAR}")  # a bar would end a table's cell
    if "`" not in said:
        return f"`{said}`" if said.strip() else "`?`"
    fence = "`" * (_longest_run(said) + 1)
    return f"{fence} {said} {fence}"


def code_block(text: str, language: str = "") -> str:
    """Lines as they are, fenced."""
    shown = "\n".join(visible(line) for line in text.split("\n"))
    fence = "`" * max(3, _longest_run(shown) + 1)
    return f"{fence}{language}\n{shown}\n{fence}\n"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are Markdown already."""
    lines = [f"| {' | '.join(headers)} |", f"|{'|'.join('---' for _ in headers)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def names(values: Sequence[str], most: int = 20) -> str:
    """A list of names in code, the first of them where there are many."""
    shown = ", ".join(code(name) for name in values[:most])
    return shown + (f" and {len(values) - most:,} more" if len(values) > most else "")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _yaml_char(c: str) -> str:
    number = ord(c)
    if c in _ESCAPED:
        return _ESCAPED[c]
    if unicodedata.category(c) in ("Cc", "Cf", "Cn", "Co", "Zl", "Zp") or number == 0x85:
        short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(c)
        wide = f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
        return short or (wide if number < 65536 else f"\\U{number:08x}")
    # half of a pair cannot be written in UTF-8
    return "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cs" else c
