"""Drawing: scales, axes and marks as SVG text, coloured by the page's style sheet."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from jdetune.pages.markup import Html, escape, join
from jdetune.pages.numbers import MINUS

Number: TypeAlias = float | int
#: Series are told apart by colour and shape; more than these are drawn as one.
SHAPES = ("circle", "square", "diamond", "triangle", "cross", "ring", "bar", "flag")


@dataclasses.dataclass(frozen=True)
class Scale:
    """Values to pixels; both may run either way."""

    low: Number
    high: Number
    start: Number
    end: Number

    def __call__(self, value: Number) -> float:
        """Pixel of a value, those outside at the ends."""
        wide = self.high - self.low
        share = (min(max(value, self.low), self.high) - self.low) / wide if wide else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Whole numbers in the range, at most so many."""
        step = max(1, math.ceil((self.high - self.low) / most))
        first = math.ceil(self.low / step) * step
        return [float(t) for t in range(int(first), math.floor(self.high) + 1, step)]


def px(value: Number) -> str:
    """A coordinate, to a tenth of a pixel.

    Example:
      >>> px(3.0), px(0.25)
      ('3', '0.2')
    """
    return f"{value:.1f}".removesuffix(".0")


def picture(width: int, height: int, title: str, description: str, content: Iterable[str]) -> Html:
    """An SVG that says in words what it shows."""
    return Html(
        f'<svg viewBox="0 0 {width} {height}" role="img"><title>{escape(title)}</title>'
        f"<desc>{escape(description)}</desc>{join(content)}</svg>"
    )


def line(x1: Number, y1: Number, x2: Number, y2: Number, kind: str) -> Html:
    """A straight line."""
    return Html(f'<path class="{kind}" d="M{px(x1)} {px(y1)}L{px(x2)} {px(y2)}"/>')


def text(x: Number, y: Number, said: str, kind: str = "", anchor: str = "start") -> Html:
    """A word or two."""
    where = f'x="{px(x)}" y="{px(y)}" text-anchor="{anchor}"'
    label = f' class="{kind}"' if kind else ""
    return Html(f"<text {where}{label}>{escape(said)}</text>")


def polyline(points: Sequence[tuple[Number, Number]], kind: str, title: str | None = None) -> Html:
    """A line through points; a hovering pointer shows the title."""
    path = "L".join(f"{px(x)} {px(y)}" for x, y in points)
    if len(points) == 1:
        path += "h.1"
    inner = "" if title is None else f"<title>{escape(title)}</title>"
    return Html(f'<path class="{kind}" d="M{path}">{inner}</path>')


def marks(
    points: Iterable[tuple[Number, Number]], shape: str, kind: str, size: Number = 3.5
) -> Html:
    """Many marks of one shape as one path."""
    path = "".join(f"M{px(x)} {px(y)}{_outline(shape, size)}" for x, y in points)
    return Html(f'<path class="{kind} {shape}" d="{path}"/>' if path else "")


def swatch(shape: str, kind: str) -> Html:
    """A mark for a legend."""
    mark = marks([(7, 7)], shape, kind, 4)
    return Html(f'<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true">{mark}</svg>')


def y_axis(scale: Scale, left: Number, right: Number) -> Html:
    """Grid lines with powers of ten at the left."""
    parts = []
    for tick in scale.ticks():
        parts += [line(left, scale(tick), right, scale(tick), "grid")]
        parts += [_power(left - 6, scale(tick) + 4, tick, "end")]
    return join(parts)


def x_powers(scale: Scale, top: Number, bottom: Number) -> Html:
    """Grid lines with powers of ten below."""
    parts = []
    for tick in scale.ticks():
        parts += [line(scale(tick), top, scale(tick), bottom, "grid")]
        parts += [_power(scale(tick), bottom + 16, tick, "middle")]
    return join(parts)


def x_axis(scale: Scale, bottom: Number, label: str) -> Html:
    """Whole numbers below, and what they count."""
    numbers = [text(scale(t), bottom + 16, f"{t:.0f}", "tick", "middle") for t in scale.ticks(8)]
    middle = (scale.start + scale.end) / 2
    return join([*numbers, text(middle, bottom + 33, label, "label", "middle")])


def _power(x: Number, y: Number, exponent: Number, anchor: str) -> Html:
    said = f"{exponent:.0f}".replace("-", MINUS)
    where = f'x="{px(x)}" y="{px(y)}" text-anchor="{anchor}"'
    return Html(
        f'<text {where} class="tick">10<tspan dy="-4" class="exponent">{said}</tspan></text>'
    )


def _outline(shape: str, r: Number) -> str:
    a, b = px(r), px(2 * r)
    return {
        "square": f"m-{a} -{a}h{b}v{b}h-{b}z",
        "diamond": f"m0 -{px(1.3 * r)}l{px(1.3 * r)} {px(1.3 * r)}l-{px(1.3 * r)} {px(1.3 * r)}"
        f"l-{px(1.3 * r)} -{px(1.3 * r)}z",
        "triangle": f"m0 -{px(1.2 * r)}l{px(1.2 * r)} {px(2.1 * r)}h-{px(2.4 * r)}z",
        "cross": f"m-{a} -{a}l{b} {b}m-{b} 0l{b} -{b}",
        "bar": f"m-{a} -{px(r / 2)}h{b}v{a}h-{b}z",
        "flag": f"m-{a} -{a}v{b}l{b} -{a}z",
    }.get(shape, f"m-{a} 0a{a} {a} 0 1 0 {b} 0a{a} {a} 0 1 0 -{b} 0")
