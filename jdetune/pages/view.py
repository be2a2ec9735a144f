"""What the pages show of a report: read leniently, since older or foreign reports lack keys."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jdetune.errors import InputError

#: Fates of a tensor in the order they are shown; ``doubtful`` is recovered with a bad status.
FATES = {
    "recovered": "recovered",
    "doubtful": "recovered, but doubtful",
    "identical": "equal in all models",
    "consensus": "majority's copy",
    "per_model": "kept with each adapter",
    "failed": "failed",
    "skipped": "skipped",
}
_MOST_KINDS = 48
_EXACT = -39.5


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One entry of ``tensors``; None and empty for what is not known."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    fate: str
    ranks: tuple[int, ...]
    error: float | None
    exact: float | None
    ratio: float | None
    amplification: float | None
    noise: float | None
    match: float | None
    verdict: str | None
    reason: str | None
    code: str | None
    values: tuple[tuple[float, ...], ...]
    edges: tuple[float, ...]
    steps: Mapping[str, int]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def shape_text(self) -> str:
        """The shape for people."""
        return " \N{MULTIPLICATION SIGN} ".join(map(str, self.shape)) or "scalar"

    @property
    def solved(self) -> bool:
        """Whether there is a base from the solver."""
        return self.fate in ("recovered", "doubtful")

    @property
    def is_exact(self) -> bool:
        """Whether no error at all is predicted."""
        return self.error is not None and self.error <= _EXACT

    @property
    def clearance(self) -> float | None:
        """Least singular value kept, over the noise edge, of the worst model."""
        pairs = zip(self.values, self.edges, strict=False)
        ratios = [values[-1] / edge for values, edge in pairs if values and edge > 0]
        return min(ratios, default=None)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Tensors whose names differ by numbers only, in the order of the checkpoint."""

    name: str
    tensors: tuple[Tensor, ...]

    @property
    def solved(self) -> tuple[Tensor, ...]:
        """Those with a base from the solver."""
        return tuple(t for t in self.tensors if t.solved)


@dataclasses.dataclass(frozen=True)
class Model:
    """One entry of ``inputs``; ``index`` is its place among the models that were solved."""

    name: str
    path: str
    dtype: str
    duplicate_of: str | None
    left_out: str | None
    index: int | None


@dataclasses.dataclass(frozen=True)
class View:
    """A report as the pages show it."""

    raw: Mapping[str, Any]
    models: tuple[Model, ...]
    tensors: tuple[Tensor, ...]
    warnings: tuple[str, ...]

    @functools.cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """The tensors by kind, in the order that kinds appear."""
        return group(self.tensors)

    @functools.cached_property
    def solved_models(self) -> tuple[Model, ...]:
        """Models that the ranks are of."""
        return tuple(m for m in self.models if m.index is not None)

    @property
    def solved(self) -> tuple[Tensor, ...]:
        """Tensors with a base from the solver."""
        return tuple(t for t in self.tensors if t.solved)

    @property
    def differing(self) -> tuple[Tensor, ...]:
        """Matrices that the solver saw."""
        return tuple(t for t in self.tensors if t.code is not None)

    def count(self, fate: str) -> int:
        """How many tensors had this fate."""
        return sum(t.fate == fate for t in self.tensors)

    def said(self, *keys: str) -> Any:
        """A value of the report by its path of keys; None where it lacks one."""
        value: Any = self.raw
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def read_view(report: Mapping[str, Any]) -> View:
    """Takes what the pages show from a report.

    Raises:
      InputError: it is no report of ``jdetune recover``.
    """
    if "kind" in report:
        raise InputError(
            f"a report of `jdetune {report['kind']}`. Give one that `jdetune recover` wrote."
        )
    try:
        entries = [dict(entry) for entry in report["inputs"]]
        tensors = tuple(_tensor(dict(entry)) for entry in report["tensors"])
        models, index = [], 0
        for entry in entries:
            twin, left = _text(entry.get("duplicate_of")), _text(entry.get("left_out"))
            place = index if twin is None and left is None else None
            index += place is not None
            name, path = str(entry["name"]), str(entry.get("path", ""))
            models.append(Model(name, path, str(entry.get("dtype") or ""), twin, left, place))
        warnings = tuple(str(text) for text in report.get("warnings") or ())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"not a whole report ({error}). Recover again.") from error
    return View(report, tuple(models), tensors, warnings)


def kind_of(name: str) -> tuple[str, tuple[int, ...]]:
    """A tensor's name with stars for its numbers, and the numbers.

    Example:
      >>> kind_of("layer.11.q.weight")
      ('layer.*.q.weight', (11,))
    """
    parts = name.split(".")
    digits = [part.isascii() and part.isdigit() and len(part) < 10 for part in parts]
    kind = ".".join("*" if yes else part for part, yes in zip(parts, digits, strict=True))
    return kind, tuple(int(part) for part, yes in zip(parts, digits, strict=True) if yes)


def group(tensors: Sequence[Tensor]) -> tuple[Kind, ...]:
    """Tensors by kind; where there are too many kinds, by the ends of their names."""
    for depth in (None, 2, 1):
        kinds: dict[str, list[Tensor]] = {}
        for tensor in tensors:
            kind = kind_of(tensor.name)[0]
            if depth is not None:
                kind = "\N{HORIZONTAL ELLIPSIS}" + ".".join(kind.split(".")[-depth:])
            kinds.setdefault(kind, []).append(tensor)
        if len(kinds) <= _MOST_KINDS:
            return tuple(Kind(name, tuple(members)) for name, members in kinds.items())
    first = dict(list(kinds.items())[: _MOST_KINDS - 1])
    rest = [tensor for name, members in kinds.items() if name not in first for tensor in members]
    return (
        *(Kind(name, tuple(members)) for name, members in first.items()),
        Kind("other names", tuple(rest)),
    )


def _tensor(entry: Mapping[str, Any]) -> Tensor:
    status, code = str(entry["status"]), _text(entry.get("code"))
    fate = status if status in FATES else "skipped"
    if status == "recovered" and code not in (None, "OK"):
        fate = "doubtful"
    matches = [_number(value) for value in _list(entry.get("remerge_match"))]
    known = [value for value in matches if value is not None]
    values = [_numbers(model) for model in _list(entry.get("singular_values"))]
    steps = entry.get("ulp_histogram")
    return Tensor(
        name=str(entry["name"]),
        shape=tuple(int(side) for side in entry["shape"]),
        dtype=str(entry.get("base_dtype") or entry.get("dtype") or ""),
        fate=fate,
        ranks=tuple(int(rank) for rank in _list(entry.get("ranks"))),
        error=_number(entry.get("predicted_error")),
        exact=_number(entry.get("exact_fraction_est")),
        ratio=_number(entry.get("residual_ratio")),
        amplification=_number(entry.get("amplification")),
        noise=_number(entry.get("noise_rms_expected")),
        match=sum(known) / len(known) if known else None,
        verdict=_text(entry.get("verdict")),
        reason=_text(entry.get("reason")),
        code=code,
        values=tuple(values),
        edges=_numbers(entry.get("noise_edge")),
        steps={str(k): int(v) for k, v in steps.items()} if isinstance(steps, dict) else {},
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(v for v in map(_number, _list(value)) if v is not None and v > 0)
