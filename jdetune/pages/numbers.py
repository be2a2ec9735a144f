"""Figures of a report in words, the same on every page."""

from collections.abc import Sequence

from jdetune.pages.markup import Html

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


def fixed(value: float | int | None, digits: int = 2) -> str:
    """A number with fixed digits, a dash where it is not known.

    Example:
      >>> fixed(1.234), fixed(None)
      ('1.23', '–')
    """
    return NONE if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def percent(share: float | int | None, digits: int = 2) -> str:
    """A share; only what is all of it is called 100%.

    Example:
      >>> percent(0.97631), percent(0.999999), percent(1.0), percent(1e-9), percent(None)
      ('97.63%', '>99.99%', '100%', '<0.01%', '–')
    """
    if share is None:
        return NONE
    if share >= 1 - 1e-12 or share <= 0:
        return "100%" if share > 0 else "0%"
    least = 10.0**-digits
    text = f"{100 * share:.{digits}f}"
    if float(text) >= 100:
        return f">{100 - least:.{digits}f}%"
    return f"{text}%" if float(text) > 0 else f"<{least:.{digits}f}%"


def power(exponent: float | int | None, digits: int = 1) -> Html:
    """Ten to a power."""
    return Html(NONE if exponent is None else f"10<sup>{fixed(exponent, digits)}</sup>")


def span(values: Sequence[int]) -> str:
    """``4`` or ``4-32``, with a dash for none.

    Example:
      >>> span([4, 32, 8]), span([4, 4]), span([])
      ('4–32', '4', '–')
    """
    if not values:
        return NONE
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}\N{EN DASH}{high}"


def several(count: int, one: str, many: str | None = None) -> str:
    """A count and its noun.

    Example:
      >>> several(1, "matrix", "matrices"), several(1200, "model")
      ('1 matrix', '1,200 models')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def duration(seconds: float | int | None) -> str:
    """A time in the unit that fits.

    Example:
      >>> duration(48.83), duration(754), duration(9000)
      ('48.8 s', '12.6 min', '2.5 h')
    """
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def factor(value: float | int | None) -> str:
    """How many times something is; dash where it is not known.

    Example:
      >>> factor(286300.0), factor(3.14159)
      ('286,000', '3.1')
    """
    if value is None:
        return NONE
    if value < 10:
        return f"{value:.1f}"
    return f"{float(f'{value:.3g}'):,.0f}"


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the known values, None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def largest(values: Sequence[float | None]) -> float | None:
    """Largest of the known values, None if there are none."""
    return max((value for value in values if value is not None), default=None)
