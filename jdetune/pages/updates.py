"""What is known of the models' updates: ranks as a heat map, singular values and the noise."""

import math
from collections.abc import Iterator, Sequence

from jdetune.pages import svg
from jdetune.pages.charts import WIDTH
from jdetune.pages.markup import Html, breakable, escape, folded, join, table, tag
from jdetune.pages.numbers import factor, several, span
from jdetune.pages.view import Kind, Model, Tensor, View

_MOST_CHARTS = 24
_OPEN_CHARTS = 6
_MOST_LINES = 48
#: Values that single charts of every matrix may draw in all; a page stays small.
_BUDGET = 30_000


def rank_map(view: View) -> Html | None:
    """Ranks as a heat map: a row a kind, a column a model, a sliver a matrix of that kind."""
    kinds = [kind for kind in view.kinds if any(t.ranks for t in kind.solved)]
    models = view.solved_models
    if not kinds or not models:
        return None
    top = max((rank for t in view.solved for rank in t.ranks), default=0)

    def cell(kind: Kind, place: int) -> Html:
        ranks = [t.ranks[place] if place < len(t.ranks) else None for t in kind.solved]
        known = [rank for rank in ranks if rank is not None]
        return Html(f"{_strip(ranks, top)}{tag('span', escape(span(known)))}")

    rows = [
        (
            Html(f"{breakable(kind.name)} <small>{_matrices(kind)}</small>"),
            [cell(kind, model.index or 0) for model in models],
        )
        for kind in kinds
    ]
    headers = ["type of matrix", *(_brief(model) for model in models)]
    scale = join(
        f'<svg viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="heat" fill-opacity="{_shade(rank, top)}" d="M0 0h1v1h-1z"/></svg>'
        f"<span>{rank}</span>"
        for rank in sorted({0, *(math.ceil(top * k / 4) for k in (1, 2, 3, 4))})
    )
    note = (
        "Rank of every model's update, found from the data. Each cell runs through the matrices of "
        "its type in the order of the checkpoint; the fuller the colour, the higher the rank."
    )
    content = table("Rank of every update", headers, rows, "ranks")
    return Html(f"{content}<p class=note>{escape(note)}</p><p class=scale>rank {scale}</p>")


def spectra(view: View) -> Html | None:
    """Singular values of the updates and the noise edge, a chart a kind, clearest last."""
    kinds = [kind for kind in view.kinds if any(any(t.values) for t in kind.solved)]
    if not kinds:
        return None
    kinds.sort(key=lambda kind: _clearance(kind.solved) or math.inf)
    charts = [_kind_chart(kind) for kind in kinds[:_MOST_CHARTS]]
    parts = [tag("div", join(charts[:_OPEN_CHARTS]), class_="charts")]
    if charts[_OPEN_CHARTS:]:
        more = tag("div", join(charts[_OPEN_CHARTS:]), class_="charts")
        label = several(len(charts) - _OPEN_CHARTS, "more type")
        parts.append(folded(escape(f"{label} of matrix"), more))
    unseen = len(kinds) - len(charts)
    if unseen:
        parts.append(
            tag("p", escape(f"{several(unseen, 'more type')} in report.json."), class_="note")
        )
    parts.append(_single_charts(kinds, view.solved_models))
    return join(parts)


def _kind_chart(kind: Kind) -> Html:
    lines = [values for t in kind.solved for values in t.values if values]
    chart = _chart(kind.name, kind.solved, lines, None, WIDTH, 210)
    clear = _clearance(kind.solved)
    said = "" if clear is None else f"The smallest kept is {factor(clear)} times the noise edge."
    inner = f"{_matrices(kind)}, {several(len(lines), 'update')}. {escape(said)}"
    return Html(
        f"<figure><h3 class=name>{breakable(kind.name)}</h3>{chart}"
        f"<figcaption>{inner}</figcaption></figure>"
    )


def _matrices(kind: Kind) -> str:
    return several(len(kind.solved), "matrix", "matrices")


def _single_charts(kinds: Sequence[Kind], models: Sequence[Model]) -> Html:
    """A small chart of every matrix, as many as a page can hold."""
    names = [model.name for model in models]
    cost, shown, total, blocks = 0, 0, 0, []
    for kind in kinds:
        charts = []
        for tensor in kind.solved:
            total += 1
            cost += sum(map(len, tensor.values)) + 40
            if cost > _BUDGET or not any(tensor.values):
                continue
            shown += 1
            lines = [values for values in tensor.values if values]
            picture = _chart(tensor.name, [tensor], lines, names, 240, 130)
            clear = tensor.clearance
            label = "" if clear is None else f"{factor(clear)} times the edge"
            charts.append(
                f"<figure><h4 class=name>{breakable(tensor.name)}</h4>{picture}"
                f"<figcaption>{escape(label)}</figcaption></figure>"
            )
        if charts:
            blocks.append(tag("div", join(charts), class_="charts small"))
    if not blocks:
        return Html("")
    some = (
        "every matrix" if shown == total else f"{shown:,} of {total:,} matrices, worst types first"
    )
    return folded(escape(f"One chart for {some}"), join(blocks))


def _chart(
    name: str,
    tensors: Sequence[Tensor],
    lines: Sequence[Sequence[float]],
    names: Sequence[str] | None,
    width: int,
    height: int,
) -> Html:
    """Singular values over their number, the noise below its edge shaded."""
    left, right, top, bottom = 44, width - 10, 10, height - 40
    edge = max((e for t in tensors for e in t.edges), default=None)
    seen = [value for values in lines for value in values]
    low = min(seen) if edge is None else min(*seen, edge)
    y = svg.Scale(math.floor(math.log10(low) - 0.3), math.ceil(math.log10(max(seen))), bottom, top)
    x = svg.Scale(1, max(map(len, lines)), left + 6, right - 6)
    parts: list[str] = [svg.y_axis(y, left, right)]
    if edge:
        at = y(math.log10(edge))
        box = f"M{left} {svg.px(at)}H{right}V{bottom}H{left}z"
        parts.append(f'<path class="lost" d="{box}"/>')
        parts.append(svg.line(left, at, right, at, "noise"))
        parts.append(svg.text(right - 2, at - 5, "noise edge", "noise", "end"))

    def path(values: Sequence[float]) -> list[tuple[float, float]]:
        return [(x(i + 1), y(math.log10(value))) for i, value in enumerate(values)]

    if len(lines) <= _MOST_LINES:
        titles = names if names and len(names) == len(lines) else [None] * len(lines)
        for values, title in zip(lines, titles, strict=True):
            parts.append(svg.polyline(path(values), "value", title))
    else:
        lows, middles, highs = zip(*_bands(lines), strict=True)
        around = [*path(highs), *reversed(path(lows))]
        parts.append(svg.polyline(around, "band"))
        parts.append(svg.polyline(path(middles), "value middle"))
    parts.append(svg.x_axis(x, bottom, "number of the singular value"))
    described = (
        f"{name}: {several(len(lines), 'update')}, singular values from {max(seen):.2g} down to "
        f"{min(seen):.2g}" + (f"; the noise edge is {edge:.2g}." if edge else ".")
    )
    return svg.picture(width, height, "Singular values", described, parts)


def _bands(lines: Sequence[Sequence[float]]) -> Iterator[tuple[float, float, float]]:
    """Least, middle and largest of the values of every number."""
    for place in range(max(map(len, lines))):
        there = sorted(values[place] for values in lines if place < len(values))
        yield there[0], there[len(there) // 2], there[-1]


def _clearance(tensors: Sequence[Tensor]) -> float | None:
    known = [t.clearance for t in tensors]
    return min((value for value in known if value is not None), default=None)


def _strip(ranks: Sequence[int | None], top: int) -> Html:
    """Slivers side by side, equal neighbours as one."""
    parts, start = [], 0
    for place in range(1, len(ranks) + 1):
        if place < len(ranks) and ranks[place] == ranks[start]:
            continue
        rank, wide = ranks[start], place - start
        if rank is not None:
            shade = f'fill-opacity="{_shade(rank, top)}"'
            parts.append(f'<path class="heat" {shade} d="M{start} 0h{wide}v1h-{wide}z"/>')
        start = place
    box = f"0 0 {max(1, len(ranks))} 1"
    return Html(
        f'<svg viewBox="{box}" preserveAspectRatio="none" aria-hidden="true">{join(parts)}</svg>'
    )


def _shade(rank: int, top: int) -> str:
    return f"{0.12 + 0.88 * rank / top:.2f}" if rank and top else "0"


def _brief(model: Model, most: int = 24) -> str:
    name = model.name
    return name if len(name) <= most else f"{name[: most - 9]}\N{HORIZONTAL ELLIPSIS}{name[-8:]}"
