"""Reads a local copy of the published LoWRA Bench: parquet, one row a layer.

A row has ``layer_model``, ``layer_name``, ``pre_ft_name``, ``pre_ft_weight`` and for every LoRA i
``lora_{i}_name``, ``_rank``, ``_alpha``, ``_A_weight`` and ``_B_weight``. One row is in memory at a
time, whatever the size of the file and of its row groups.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jdetune.bench import columns
from jdetune.bench.layers import Layer, Lora, Source
from jdetune.bench.subsets import HUB_ID
from jdetune.checkpoint.files import Stamp, check_inside, opened
from jdetune.errors import InputError, printable

COMMON = ("layer_model", "layer_name", "pre_ft_name", "pre_ft_weight")
FIELDS = ("name", "rank", "alpha", "A_weight", "B_weight")
_LORA = re.compile(r"lora_(\d{1,6})_(.+)")
#: Lengths of text and lists in a file's own description at most.
_THRIFT = {"thrift_string_size_limit": 100_000_000, "thrift_container_size_limit": 1_000_000}
_MAX_FILES = 10_000


class _File(NamedTuple):
    """One parquet file and the layers in it, in order."""

    path: Path
    stamp: Stamp
    names: tuple[str, ...]


def open_dataset(data: str | Path, subset: str) -> Source:
    """Opens a local copy; reads names only.

    Args:
      data: folder of the copy: the whole data set, or the parquet files of one subset alone.
      subset: which subset.

    Raises:
      InputError: not there, not parquet, or not of the published schema.
    """
    paths = _find(Path(data), subset)
    found = [_survey(path) for path in paths]
    loras = _agree(paths, [each for _, each in found])
    files = [file for file, _ in found]
    names = [name for file in files for name in file.names]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"{data}: the layer {printable(twice)} is there twice. Give a folder that holds one "
            "subset once."
        )
    models = tuple(f"lora_{index}" for index in loras)

    def read(wanted: Sequence[str]) -> Iterator[Layer]:
        chosen = set(wanted)
        for file in files:
            if chosen & set(file.names):
                yield from _rows(file, chosen, loras)

    size = sum(file.stamp.size for file in files)
    origin = {
        "data": "LoWRA Bench, local copy",
        "subset": subset,
        "files": [file.path.name for file in files],
        "bytes": size,
    }
    return Source(tuple(names), models, read, origin)


def _find(data: Path, subset: str) -> list[Path]:
    """The parquet files of a subset: below a folder of its name, or all if there is none."""
    if not data.is_dir():
        raise InputError(f"{data}: no folder. {_download(subset)}")
    every = []
    for path in data.rglob("*.parquet"):
        every.append(path)
        if len(every) > _MAX_FILES:
            raise InputError(
                f"{data}: more than {_MAX_FILES} parquet files. Give a smaller folder."
            )
    own = [path for path in every if subset in path.relative_to(data).parts[:-1]]
    beside = [path for path in every if path.parent == data]
    found = sorted(own or beside)
    if not found:
        raise InputError(
            f"{data}: no parquet file in it, nor in a folder {subset} below it. {_download(subset)}"
        )
    for path in found:
        check_inside(path, data)
    return found


def _download(subset: str) -> str:
    return (
        f"Download the subset: hf download {HUB_ID} --repo-type dataset --include '*{subset}*' "
        "--local-dir DIR, then give --data=DIR."
    )


def _parquet(path: Path) -> Any:
    """An open file with bounds on what its description may claim."""
    pq, arrow = columns.library("pyarrow.parquet"), columns.library()
    try:
        return pq.ParquetFile(path, memory_map=False, pre_buffer=False, **_THRIFT)
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise _not_whole(path, error) from error


def _survey(path: Path) -> tuple[_File, tuple[int, ...]]:
    """Layers and LoRAs of a file, from its schema and its names."""
    with opened(path) as source:
        stamp = source.stamp
    arrow = columns.library()
    with _parquet(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
        loras = _check_schema(schema, path)
        _check_sizes(metadata, path)
        names = []
        try:
            for batch in file.iter_batches(batch_size=1024, columns=["layer_model", "layer_name"]):
                for row in range(batch.num_rows):
                    one = batch.slice(row, 1)
                    words = [
                        columns.text(one.column(key), key, path)
                        for key in ("layer_model", "layer_name")
                    ]
                    names.append(".".join(words))
        except (arrow.ArrowException, OSError) as error:
            raise _not_whole(path, error) from error
    if not names:
        raise InputError(f"{path}: no row in it. Download it again.")
    return _File(path, stamp, tuple(names)), loras


def _check_schema(schema: Any, path: Path) -> tuple[int, ...]:
    """Numbers of the LoRAs; every column that is needed is there and of its type."""
    found: dict[int, set[str]] = {}
    for column in schema.names:
        match = _LORA.fullmatch(column)
        if match and match[2] in FIELDS:
            found.setdefault(int(match[1]), set()).add(match[2])
    missing = [column for column in COMMON if column not in schema.names]
    for index, fields in found.items():
        missing += [f"lora_{index}_{field}" for field in FIELDS if field not in fields]
    if not found:
        missing += [f"lora_0_{field}" for field in FIELDS]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{path}: no column {printable(missing[0])}{more}. It is not LoWRA Bench as published "
            f"({', '.join(COMMON)}, and for every i lora_{{i}}_{{{', '.join(FIELDS)}}}). Give the "
            "folder of the published files, or rename the columns."
        )
    if len(set(schema.names)) < len(schema.names):
        raise InputError(f"{path}: a column is there twice. Download the published file again.")
    types = columns.library().types
    for index in (None, *found):
        head = "" if index is None else f"lora_{index}_"
        texts = COMMON[:3] if index is None else ("name",)
        for column in texts:
            kind = schema.field(head + column).type
            if not (types.is_string(kind) or types.is_large_string(kind)):
                raise InputError(
                    f"{path}: column {head}{column} is {printable(kind)}, not text. Give the "
                    "published files."
                )
        for column in ("pre_ft_weight",) if index is None else ("A_weight", "B_weight"):
            columns.check_type(schema.field(head + column).type, head + column, path)
    return tuple(sorted(found))


def _check_sizes(metadata: Any, path: Path) -> None:
    """Refuses rows larger than any layer; what a file claims decides what reading it takes."""
    for group in range(metadata.num_row_groups):
        entry = metadata.row_group(group)
        for place in range(entry.num_columns):
            column = entry.column(place)
            if column.num_values > columns.MAX_ELEMENTS * max(1, entry.num_rows):
                raise InputError(
                    f"{path}: column {printable(column.path_in_schema)} claims "
                    f"{column.num_values} values in {entry.num_rows} rows, more than any layer "
                    "has. Do not use this file if you do not trust where it is from."
                )


def _agree(paths: Sequence[Path], loras: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    for path, own in zip(paths, loras, strict=True):
        if own != loras[0]:
            raise InputError(
                f"{path}: has {len(own)} LoRAs a layer, {paths[0].name} has {len(loras[0])}. Give "
                "a folder that holds the files of one subset only."
            )
    return loras[0]


def _rows(file: _File, wanted: set[str], loras: Sequence[int]) -> Iterator[Layer]:
    """The layers asked for, one in memory at a time; row groups without any are not read."""
    arrow = columns.library()
    needed = [*COMMON, *(f"lora_{i}_{field}" for i in loras for field in FIELDS)]
    with opened(file.path, file.stamp), _parquet(file.path) as source:
        row = 0
        for group in range(source.metadata.num_row_groups):
            count = source.metadata.row_group(group).num_rows
            own = file.names[row : row + count]
            if wanted & set(own):
                try:
                    last = max(place for place, name in enumerate(own) if name in wanted)
                    batches = source.iter_batches(batch_size=1, row_groups=[group], columns=needed)
                    for place, batch in enumerate(batches):
                        if own[place] in wanted:
                            yield _layer(batch, own[place], loras, file.path)
                        if place == last:
                            break
                except (arrow.ArrowException, OSError) as error:
                    raise _not_whole(file.path, error) from error
            row += count


def _layer(batch: Any, name: str, loras: Sequence[int], path: Path) -> Layer:
    base = columns.matrix(batch.column("pre_ft_weight"), "pre_ft_weight", path)
    base = base.reshape(len(base), -1)
    return Layer(name, base, tuple(_lora(batch, i, base.shape, path) for i in loras))


def _lora(batch: Any, index: int, shape: tuple[int, int], path: Path) -> Lora:
    head = f"lora_{index}_"
    rank = columns.number(batch.column(head + "rank"), head + "rank", path)
    alpha = columns.number(batch.column(head + "alpha"), head + "alpha", path)
    left = columns.matrix(batch.column(head + "B_weight"), head + "B_weight", path)
    right = columns.matrix(batch.column(head + "A_weight"), head + "A_weight", path)
    left, right = left.reshape(len(left), -1), right.reshape(len(right), -1)
    fits = left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
    if not fits or alpha == 0.0:
        raise InputError(
            f"{path}: {head}B_weight {list(left.shape)}, {head}A_weight {list(right.shape)}, rank "
            f"{rank:g} and alpha {alpha:g} make no update of a base {list(shape)}. Download the "
            "published file again."
        )
    name = columns.text(batch.column(head + "name"), head + "name", path)
    return Lora(name, int(rank), alpha, left, np.ascontiguousarray(right))


def _not_whole(path: Path, error: Exception) -> InputError:
    said = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
    return InputError(
        f"{path}: not a whole parquet file ({said}). Download it again; do not use it if you do "
        "not trust where it is from."
    )
