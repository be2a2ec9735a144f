"""Tables of a report: key figures, models, and every tensor, folded by kind."""

from collections import Counter
from collections.abc import Sequence

from jdetune.metrics import ULP_STEPS
from jdetune.pages import words
from jdetune.pages.charts import total_steps
from jdetune.pages.markup import Html, breakable, escape, folded, join, table, tag
from jdetune.pages.numbers import (
    NONE,
    TIMES,
    duration,
    factor,
    fixed,
    largest,
    mean,
    percent,
    power,
    several,
    span,
)
from jdetune.pages.view import FATES, Kind, Tensor, View

_MATRICES = ("matrix", "matrices")
_HEADS = ("tensor", "shape", "status")
_FIGURES = ("ranks", "predicted error", "exact (est.)", "residual / noise", "noise amplified")
#: Groups of so few tensors are shown open, as long as they are few in all.
_OPEN_ROWS = 24


def cards(view: View) -> Html:
    """Key figures."""
    bottom = words.worst(view)
    n_parameters = view.said("base", "n_parameters")
    worst_note = "" if bottom is None else f"in <span class=name>{breakable(bottom.name)}</span>"
    shown = [
        ("models", f"{len(view.solved_models):,}", _left_out(view)),
        ("tensors", f"{len(view.tensors):,}", _parameters(n_parameters)),
        ("exact weights (est.)", percent(mean([t.exact for t in view.solved])), "of the recovered"),
        ("mean predicted error", power(mean([t.error for t in view.solved])), "mean squared"),
        ("largest predicted error", power(largest([t.error for t in view.solved])), worst_note),
        ("time", duration(view.said("seconds")), escape(view.said("device") or "")),
    ]
    return tag(
        "dl",
        join(
            f"<div><dt>{escape(label)}</dt><dd>{value}<small>{note}</small></dd></div>"
            for label, value, note in shown
            if value != NONE
        ),
        class_="cards",
    )


def coverage(view: View) -> Html:
    """What became of the tensors, as a bar and in numbers."""
    sizes = {fate: sum(t.size for t in view.tensors if t.fate == fate) for fate in FATES}
    total = sum(sizes.values()) or 1
    bar, legend, start = [], [], 0.0
    for fate, label in FATES.items():
        count = view.count(fate)
        if not count and fate == "doubtful":
            continue
        wide = 100 * sizes[fate] / total
        if wide:
            bar.append(f'<path class="{fate}" d="M{start:.3f} 0h{wide:.3f}v1h-{wide:.3f}z"/>')
        start += wide
        share = percent(sizes[fate] / total, 1) if count else ""
        legend.append(
            f'<li class="{fate}{"" if count else " none"}"><i></i><b>{count:,}</b> {escape(label)}'
            f"{f' <small>{share} of the weights</small>' if share else ''}</li>"
        )
    described = ", ".join(
        f"{label}: {percent(sizes[fate] / total, 1)}"
        for fate, label in FATES.items()
        if sizes[fate]
    )
    return Html(
        '<svg class="coverage" viewBox="0 0 100 1" preserveAspectRatio="none" role="img">'
        f"<title>Share of the weights by what became of their tensors</title>"
        f"<desc>{escape(described)}</desc>{join(bar)}</svg><ul class=fates>{join(legend)}</ul>"
    )


def models(view: View) -> Html:
    """The models that were given, and what became of each."""
    rows = []
    for model in view.models:
        place = model.index
        note = f"equals {model.duplicate_of}, dropped" if model.duplicate_of else model.left_out
        ranks = [t.ranks[place] for t in view.solved if place is not None and place < len(t.ranks)]
        head = Html(f"{escape(model.name)}<small class=path>{_path(model.path)}</small>")
        cells = [model.dtype or NONE, span(ranks), percent(_matches(view, place))]
        rows.append((head, [*(escape(cell) for cell in cells), escape(note or "took part")]))
    headers = ("model", "dtype", "ranks", "back when merged again", "part in it")
    return table("The models", headers, rows)


def ulps(view: View) -> Html:
    """Distances of re-merged weights by kind of matrix."""
    kinds = [(kind, total_steps(kind.solved)) for kind in view.kinds]
    rows = []
    for kind, counts in kinds:
        total = sum(counts.get(step, 0) for step in ULP_STEPS)
        if total:
            bins = (("0",), ("-1", "1"), ("-2", "2"), ("<-2", ">2"))
            shares = [sum(counts.get(s, 0) for s in steps) / total for steps in bins]
            cells = [escape(percent(share)) for share in shares]
            rows.append((breakable(kind.name), cells))
    if not rows:
        return Html("")
    headers = ("type of matrix", "equal", "1 ulp", "2 ulp", "more")
    label = escape("Distance in ulp by type of matrix")
    return folded(label, table("Merged again: distance in ulp by type", headers, rows))


def tensors(view: View) -> Html:
    """Every tensor, in a fold for each kind."""
    plain = tuple(t for kind in view.kinds if _is_plain(kind) for t in kind.tensors)
    kinds = [kind for kind in view.kinds if not _is_plain(kind)]
    kinds.sort(key=lambda kind: (not _is_bad(kind), not kind.solved))
    short = sum(len(kind.tensors) for kind in kinds) <= _OPEN_ROWS
    folds = [_kind(kind, short or _is_bad(kind)) for kind in kinds]
    if plain:
        copied = Kind("equal in all models, and copied", plain)
        folds.append(_kind(copied, len(plain) <= _OPEN_ROWS))
    return join(folds)


def _kind(kind: Kind, is_open: bool) -> Html:
    counts = Counter(t.fate for t in kind.tensors)
    dots = join(
        f'<span class="{fate}"><i></i>{count:,} {escape(FATES[fate])}</span>'
        for fate, count in counts.items()
    )
    figures = ""
    if kind.solved:
        exact = percent(mean([t.exact for t in kind.solved]))
        error = power(mean([t.error for t in kind.solved]))
        figures = f"<span>exact {exact}</span><span>error {error}</span>"
    summary = Html(
        f"<b class=name>{breakable(kind.name)}</b><span class=facts>"
        f"<span>{several(len(kind.tensors), 'tensor')}</span>{dots}{figures}</span>"
    )
    return folded(
        summary, _kind_table(kind), is_open and len(kind.tensors) <= 4 * _OPEN_ROWS, "kind"
    )


def _kind_table(kind: Kind) -> Html:
    reasons = {t.reason for t in kind.tensors}
    common = reasons.pop() if len(reasons) == 1 and len(kind.tensors) > 1 else None
    said = Html("") if common is None else tag("p", escape(common), class_="note")
    solved = any(t.code is not None for t in kind.tensors)
    with_reason = common is None and any(t.reason for t in kind.tensors)
    last = ("verdict and reason" if with_reason else "verdict",) if solved else ()
    headers = (*_HEADS, *(_FIGURES if solved else ()), *last)
    headers += ("reason",) if with_reason and not solved else ()
    rows = []
    for t in kind.tensors:
        cells = [Html(f"{escape(t.shape_text)}<small>{escape(t.dtype)}</small>"), _fate(t)]
        why = escape(t.reason or "") if with_reason else Html("")
        if solved:
            small = tag("small", why, class_="why") if why else ""
            cells += [*_figures(t), Html(f"{escape(t.verdict or NONE)}{small}")]
        elif with_reason:
            cells.append(why)
        rows.append((breakable(t.name), cells))
    inner = table(f"Tensors named {kind.name}", headers, rows, "tensors")
    return Html(f"{said}{inner}")


def _figures(t: Tensor) -> list[Html]:
    ranks = ", ".join(map(str, t.ranks)) if len(set(t.ranks)) > 1 and len(t.ranks) <= 12 else None
    return [
        escape(ranks or span(t.ranks)),
        Html("exact") if t.is_exact else power(t.error),
        escape(percent(t.exact)),
        escape(fixed(t.ratio)),
        escape(NONE if t.amplification is None else f"{TIMES}{factor(t.amplification)}"),
    ]


def _fate(t: Tensor) -> Html:
    code = f"<small>{escape(t.code)}</small>" if t.code not in (None, "OK") else ""
    return Html(f'<span class="fate {t.fate}"><i></i>{escape(FATES[t.fate])}</span>{code}')


def _is_plain(kind: Kind) -> bool:
    """Whether there is nothing to say of it."""
    return all(t.fate == "identical" and t.reason is None for t in kind.tensors)


def _is_bad(kind: Kind) -> bool:
    return any(t.fate in ("failed", "doubtful") for t in kind.tensors)


def _left_out(view: View) -> str:
    out = len(view.models) - len(view.solved_models)
    return f"{out} more given, but left out" if out else "all that were given"


def _parameters(count: object) -> str:
    return f"{count:,} weights in the base" if isinstance(count, int) else "no base was written"


def _matches(view: View, place: int | None) -> float | None:
    """Share of one model's weights that come back, over all matrices."""
    if place is None:
        return None
    raw: Sequence[dict] = view.raw["tensors"]
    equal = total = 0.0
    for tensor, entry in zip(view.tensors, raw, strict=True):
        match = entry.get("remerge_match")
        if isinstance(match, list) and place < len(match) and isinstance(match[place], float | int):
            equal, total = equal + match[place] * tensor.size, total + tensor.size
    return equal / total if total else None


def _path(path: str) -> Html:
    return Html(escape(path).replace("/", "/<wbr>"))
