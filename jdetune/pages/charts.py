"""Charts of a report: predicted errors, re-merged ulps."""

import math
from collections.abc import Sequence

from jdetune.metrics import ULP_STEPS
from jdetune.pages import svg
from jdetune.pages.markup import Html, breakable, escape, figure, join, tag
from jdetune.pages.numbers import MINUS, fixed, mean, percent, power, several
from jdetune.pages.view import Kind, Tensor, View, kind_of

WIDTH = 400
_LEFT, _RIGHT, _TOP = 44, 388, 12
_SERIES = len(svg.SHAPES)
_MOST_ROWS = 24


def errors_by_depth(view: View) -> Html | None:
    """Predicted error of every recovered matrix over its layer's number, a series a kind."""
    kinds = [kind for kind in view.kinds if kind.solved or _failed(kind)]
    if not view.solved:
        return None
    series, rest = kinds[:_SERIES], kinds[_SERIES:]
    if rest:
        members = tuple(t for kind in kinds[_SERIES - 1 :] for t in kind.tensors)
        series = [*kinds[: _SERIES - 1], Kind("all other kinds", members)]
    bottom, depths = 240, [_depth(t, i) for kind in kinds for i, t in enumerate(kind.tensors)]
    x = svg.Scale(min(depths), max(depths), _LEFT + 14, _RIGHT - 14)
    exact, failed = [t for t in view.solved if t.is_exact], [t for k in kinds for t in _failed(k)]
    scale, low, high = _error_scale(view, bottom - 14, _TOP + (24 if failed else 8))
    parts = [svg.y_axis(scale, _LEFT, _RIGHT) if low < high else ""]
    parts.append(svg.x_axis(x, bottom + 4, "number of the layer"))
    if exact:
        parts += [svg.line(_LEFT, bottom, _RIGHT, bottom, "grid")]
        parts += [svg.text(_LEFT - 6, bottom + 4, "exact", "tick", "end")]
    if failed:
        parts += [svg.text(_LEFT - 6, _TOP + 2, "none", "tick", "end")]
    legend = []
    for place, kind in enumerate(series):
        points, none = [], []
        for i, tensor in enumerate(kind.tensors):
            if tensor.fate == "failed" and tensor.code is not None:
                none.append((x(_depth(tensor, i)), _TOP - 2.0))
            elif tensor.error is not None and tensor.solved:
                y = bottom if tensor.is_exact else scale(tensor.error)
                points.append((x(_depth(tensor, i)), y))
        shape = svg.SHAPES[place]
        parts += [svg.marks(points, shape, f"s{place}"), svg.marks(none, "cross", "bad", 3)]
        legend.append(tag("li", f"{svg.swatch(shape, f's{place}')}{breakable(kind.name)}"))
    parts.append(_noise_line(view, scale, low < high))
    matrices = several(len(view.solved), "matrix", "matrices")
    described = (
        f"Log10 of the mean squared error predicted for {matrices} against the layer's number; "
        f"from {fixed(low)} to {fixed(high)}, {len(exact)} exact, {len(failed)} without a base."
    )
    chart = svg.picture(WIDTH, bottom + 44, "Predicted error by depth", described, parts)
    note = "Predicted mean squared error of each matrix; lower is better." + _noise_note(view)
    return figure(
        "Predicted error by depth", chart, f"{note}{tag('ul', join(legend), class_='legend')}"
    )


def errors_by_kind(view: View) -> Html | None:
    """Predicted errors of each kind of matrix on one line, worst kinds first."""
    kinds = [kind for kind in view.kinds if any(t.error is not None for t in kind.solved)]
    if not kinds:
        return None
    kinds.sort(key=lambda kind: -max(t.error or -99.0 for t in kind.solved))
    shown = kinds[:_MOST_ROWS]
    step, top = min(72, max(40, 216 // len(shown))), 6
    bottom = top + step * len(shown)
    some_exact = any(t.is_exact for t in view.solved)
    scale, low, high = _error_scale(view, 52 if some_exact else 12, _RIGHT - 4)
    parts = [svg.x_powers(scale, top, bottom) if low < high else ""]
    if some_exact:
        parts += [svg.text(16, bottom + 16, "exact", "tick", "middle")]
        parts += [svg.line(16, top, 16, bottom, "grid")]
    for place, kind in enumerate(shown):
        y = top + step * (place + 0.5) + 8
        known = [t for t in kind.solved if t.error is not None]
        points = [(16.0 if t.is_exact else scale(t.error or 0.0), y) for t in known]
        parts += [svg.text(8, y - 11, _short(kind.name), "name")]
        parts += [svg.marks(points, "circle", "dots", 4)]
        middle = mean([x for x, _ in points]) or 0.0
        parts += [svg.line(middle, y - 7, middle, y + 7, "mean")]
    described = "; ".join(
        f"{kind.name}: {several(len(kind.solved), 'matrix', 'matrices')}, mean "
        f"{fixed(mean([t.error for t in kind.solved]))}"
        for kind in shown
    )
    chart = svg.picture(WIDTH, bottom + 26, "Predicted error by type", described, parts)
    more = len(kinds) - len(shown)
    note = "The same by type of matrix, the worst first; a bar marks the mean." + (
        f" {several(more, 'more type')} in the table below." if more else ""
    )
    return figure("Predicted error by type", chart, escape(note))


def remerged_ulps(view: View) -> Html | None:
    """How far re-merged weights are from the stored ones, in all matrices together."""
    counts = total_steps(view.solved)
    total = sum(counts.values())
    if not total:
        return None
    shares = [counts.get(step, 0) / total for step in ULP_STEPS]
    bottom, wide = 230, (_RIGHT - 8) / len(ULP_STEPS)
    top = max(shares)
    parts = []
    for place, (step, share) in enumerate(zip(ULP_STEPS, shares, strict=True)):
        height = share / top * (bottom - 34)
        x = 8 + place * wide
        kind = "bar0" if step == "0" else "bar1"
        box = f"M{svg.px(x + 3)} {bottom}h{svg.px(wide - 6)}v-{svg.px(height)}h-{svg.px(wide - 6)}z"
        parts.append(f'<path class="{kind}" d="{box}"/>')
        label = percent(share, 1 if share >= 0.1 else 2)
        parts.append(svg.text(x + wide / 2, bottom - height - 6, label, "value", "middle"))
        parts.append(svg.text(x + wide / 2, bottom + 16, _signed(step), "tick", "middle"))
    parts += [svg.line(4, bottom, _RIGHT, bottom, "axis")]
    parts += [svg.text(_RIGHT / 2, bottom + 34, "ulp from the stored weight", "label", "middle")]
    described = ", ".join(
        f"{_signed(step)} ulp: {percent(share)}"
        for step, share in zip(ULP_STEPS, shares, strict=True)
    )
    chart = svg.picture(WIDTH, bottom + 42, "Distance of re-merged weights", described, parts)
    bad = counts.get("not finite", 0)
    note = (
        "Each recovered adapter merged into the recovered base again, against the model as it was "
        "published. The matrix product's own rounding moves some weights by an ulp."
    ) + (f" {several(bad, 'weight')} of damaged models left out." if bad else "")
    return figure("Merged again: distance in ulp", chart, escape(note))


def total_steps(tensors: Sequence[Tensor]) -> dict[str, int]:
    """Ulp histograms of several tensors added up."""
    total: dict[str, int] = {}
    for tensor in tensors:
        for step, count in tensor.steps.items():
            total[step] = total.get(step, 0) + count
    return total


def noise_level(view: View) -> float | None:
    """Mean log10 of the squared rounding error of a single model."""
    return mean([2 * math.log10(t.noise) for t in view.solved if t.noise])


def _error_scale(view: View, start: svg.Number, end: svg.Number) -> tuple[svg.Scale, float, float]:
    """Scale of the errors that are not exact, with the least and largest of them."""
    known = [t.error for t in view.solved if t.error is not None and not t.is_exact]
    noise = noise_level(view)
    marked = [*known, noise] if known and noise is not None else known
    low, high = min(marked, default=0.0), max(marked, default=0.0)
    return (
        svg.Scale(math.floor(low - 0.2), math.ceil(high + 0.2), start, end),
        min(known, default=0.0),
        max(known, default=0.0) + (1e-9 if known else 0.0),
    )


def _noise_line(view: View, scale: svg.Scale, drawn: bool) -> Html:
    noise = noise_level(view)
    if noise is None or not drawn:
        return Html("")
    y = scale(noise)
    return join(
        [
            svg.line(_LEFT, y, _RIGHT, y, "noise"),
            svg.text(_RIGHT, y - 5, "rounding of one model", "noise", "end"),
        ]
    )


def _noise_note(view: View) -> str:
    noise = noise_level(view)
    if noise is None:
        return ""
    return f" Dashed: the rounding error of a single model, {power(noise)}."


def _failed(kind: Kind) -> list[Tensor]:
    return [t for t in kind.tensors if t.fate == "failed" and t.code is not None]


def _depth(tensor: Tensor, place: int) -> int:
    numbers = kind_of(tensor.name)[1]
    return numbers[0] if numbers else place


def _short(name: str, most: int = 54) -> str:
    """A long name without its middle."""
    if len(name) <= most:
        return name
    half = (most - 1) // 2
    return f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def _signed(step: str) -> str:
    return step.replace("-", MINUS) if step.startswith(("-", "<", ">", "0")) else f"+{step}"
