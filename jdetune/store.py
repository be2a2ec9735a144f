"""Results on disk while a recovery runs, where every process of the run finds them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdetune.checkpoint.stream import open_tensors
from jdetune.checkpoint.writer import save_safetensors
from jdetune.explain import Note
from jdetune.remerge import Remerged
from jdetune.report import TensorResult
from jdetune.result import Adapters, Recovery

_FIELDS = ("base", "ranks", "status", "predicted_error", "exact_fraction", "amplification")
_LARGE = ("base", "certain", "left", "right")
_STATS = "stats/"
_SAID = ("status", "method", "remerged", "seconds", "reason", "base_dtype")


def save_results(
    path: str | Path, results: Mapping[str, TensorResult], notes: Sequence[Note]
) -> None:
    """Writes what came of some tensors; each result has a recovery.

    Args:
      path: a file that is not there yet.
      results: tensor name to result.
      notes: what was repaired in them.
    """
    arrays: dict[str, np.ndarray] = {}
    said = {}
    for place, (name, result) in enumerate(results.items()):
        assert result.recovery is not None
        for field, value in _parts(result.recovery).items():
            arrays[f"{place}/{field}"] = np.asarray(value)
        said[name] = {field: getattr(result, field) for field in _SAID}
    content = {"results": said, "notes": [list(note) for note in notes]}
    save_safetensors(path, arrays, {"jdetune": json.dumps(content)})


def load_results(
    path: str | Path, plans: Mapping[str, Any]
) -> tuple[dict[str, TensorResult], list[Note]]:
    """What ``save_results`` wrote; arrays stay on disk until they are looked at.

    Args:
      path: the file.
      plans: tensor name to its plan.
    """
    arrays, metadata = open_tensors(path)
    content = json.loads(metadata["jdetune"])
    parts: list[dict[str, Any]] = [{} for _ in content["results"]]
    for name, array in arrays.items():
        place, _, field = name.partition("/")
        # what is small is read now
        parts[int(place)][field] = array if field in _LARGE else np.asarray(array)
    results = {}
    for fields, (name, said) in zip(parts, content["results"].items(), strict=True):
        again = said.pop("remerged")
        results[name] = TensorResult(
            plan=plans[name],
            recovery=_recovery(fields),
            remerged=None if again is None else tuple(Remerged(*figure) for figure in again),
            **said,
        )
    return results, [Note(*note) for note in content["notes"]]


def _parts(found: Recovery) -> dict[str, Any]:
    """Every array of a recovery by a name of its own."""
    parts = {field: getattr(found, field) for field in (*_FIELDS, "certain")}
    parts |= {"left": found.adapters.left, "right": found.adapters.right}
    return parts | {_STATS + name: value for name, value in found.stats.items()}


def _recovery(parts: Mapping[str, Any]) -> Recovery:
    stats = {n.removeprefix(_STATS): v for n, v in parts.items() if n.startswith(_STATS)}
    return Recovery(
        **{field: parts[field] for field in (*_FIELDS, "certain")},
        adapters=Adapters(left=parts["left"], right=parts["right"]),
        stats=stats,
    )
