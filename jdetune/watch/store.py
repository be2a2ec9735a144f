"""Monitors on disk: one safetensors file; what is not an array is JSON in its header."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jdetune.checkpoint import open_checkpoint, read_tensor, save_safetensors
from jdetune.checkpoint.header import read_header
from jdetune.checkpoint.strict_json import parse_object
from jdetune.errors import InputError
from jdetune.watch.directions import Directions
from jdetune.watch.monitor import ROLES, Monitor

FORMAT = "jdetune.monitor/1"
_KEY = "jdetune"
_DIRECTIONS = ("vectors", "values")
_RANGES = ("low", "high")
_COUNTS = ("samples", "left_out", "tested", "alarms")


def save_monitor(path: str | Path, monitor: Monitor) -> None:
    """Writes a monitor to a ``.safetensors`` file.

    Args:
      path: the file.
      monitor: to write.

    Raises:
      WriteError: it cannot be written.
    """
    directions = monitor.directions
    arrays = {name: np.asarray(getattr(directions, name)) for name in _DIRECTIONS}
    arrays |= {name: np.asarray(getattr(monitor, name)) for name in (*_RANGES, *_COUNTS, "margin")}
    arrays = {name: np.atleast_1d(array) for name, array in arrays.items()}
    about = {"places": directions.places, "slots": directions.slots, "roles": ROLES}
    save_safetensors(path, arrays, {"format": FORMAT, _KEY: json.dumps(about)})


def load_monitor(path: str | Path) -> Monitor:
    """Reads a monitor that `save_monitor` wrote.

    Args:
      path: the file.

    Raises:
      InputError: it is none, or damaged.
    """
    checkpoint = open_checkpoint(path)
    header = read_header(checkpoint.path)
    if header.metadata.get("format") != FORMAT:
        raise InputError(f"{path}: is no monitor ({FORMAT}). Give a file of jdetune watch --save.")
    about = parse_object(header.metadata.get(_KEY, "").encode(), path)
    wanted = (*_DIRECTIONS, *_RANGES, *_COUNTS, "margin")
    missing = [name for name in wanted if name not in checkpoint.tensors]
    if missing:
        raise InputError(f"{path}: lacks {', '.join(missing)}. Write the monitor again.")
    arrays: dict[str, Any] = {name: jnp.asarray(read_tensor(checkpoint, name)) for name in wanted}
    directions = Directions(
        arrays["vectors"],
        arrays["values"],
        _pairs(about, "places", path),
        _pairs(about, "slots", path),
    )
    shape = directions.values.shape
    if (
        directions.vectors.shape[:-1] != shape
        or shape != (len(directions.places), len(directions.slots))
        or any(arrays[name].shape != (len(ROLES), *shape) for name in _RANGES)
        or any(arrays[name].shape not in ((1,), (len(ROLES),)) for name in _COUNTS)
        or about.get("roles") != list(ROLES)
    ):
        raise InputError(f"{path}: shapes do not fit together. Write the monitor again.")
    counts = {name: arrays[name] for name in _COUNTS}
    for name in ("tested", "alarms"):
        counts[name] = counts[name][0]
    return Monitor(directions, arrays["low"], arrays["high"], **counts, margin=arrays["margin"][0])


def _pairs(about: dict[str, Any], key: str, path: object) -> tuple[tuple[str, int], ...]:
    found = about.get(key)
    if not isinstance(found, list) or not all(
        isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) and isinstance(p[1], int)
        for p in found
    ):
        raise InputError(f"{path}: its {key} cannot be read. Write the monitor again.")
    return tuple((kind, number) for kind, number in found)
