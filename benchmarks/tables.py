"""Markdown tables and checks against targets, as the benchmarks print them."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Check:
    """A measured figure beside its target.

    Attributes:
      what: what was measured.
      figure: as measured.
      target: what it should be, in words.
      passed: whether it is.
    """

    what: str
    figure: str
    target: str
    passed: bool

    @property
    def verdict(self) -> str:
        """PASS or FAIL."""
        return "PASS" if self.passed else "FAIL"


def at_least(what: str, figure: float, target: float, digits: int = 4) -> Check:
    """A figure that should not be below its target; NaN fails.

    Example:
      >>> at_least("exact", 0.97, 0.96).verdict
      'PASS'
    """
    return Check(what, f"{figure:.{digits}f}", f">= {target:g}", bool(figure >= target))


def at_most(what: str, figure: float, target: float, digits: int = 4) -> Check:
    """A figure that should not be above its target; NaN fails."""
    return Check(what, f"{figure:.{digits}f}", f"<= {target:g}", bool(figure <= target))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Example:
      >>> print(table(["a", "b"], [["1", "2"]]))
      | a | b |
      |---|---|
      | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    ruled = ["|" + "|".join(line) + "|" if line[0] == "---" else _row(line) for line in lines]
    return "\n".join(ruled)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def checks_table(checks: Sequence[Check]) -> str:
    """The checks as a table with their verdicts."""
    rows = [[one.what, one.figure, one.target, one.verdict] for one in checks]
    return table(["check", "figure", "target", "verdict"], rows)


def put_between(page: str, name: str, text: str) -> str:
    """A page with what stands between two markers replaced.

    Args:
      page: its text, with ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.
      name: of the markers.
      text: what comes between them; may be empty.

    Raises:
      ValueError: there is no single pair of markers.

    Example:
      >>> put_between("<!-- x: begin -->old<!-- x: end -->.", "x", "new").splitlines()
      ['<!-- x: begin -->', 'new', '<!-- x: end -->.']
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page has no single pair of markers {begin} and {end}")
    head, _, rest = page.partition(begin)
    body = f"{text}\n" if text else ""
    return f"{head}{begin}\n{body}{end}{rest.partition(end)[2]}"


def exit_code(checks: Sequence[Check]) -> int:
    """0 if all checks passed, else 1."""
    return int(not all(check.passed for check in checks))
