"""What a checkpoint holds, read from its headers alone: names, shapes, dtypes, shards.

Knows Hugging Face directories (one ``model.safetensors``, or shards with an index) and single
``.safetensors`` files. Every refusal names the file, the cause and what to do.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jdetune.busy import Busy
from jdetune.checkpoint import hub, sidefiles
from jdetune.checkpoint.files import Stamp, check_inside, check_regular, read_whole, unreadable
from jdetune.checkpoint.header import DTYPES, read_header
from jdetune.checkpoint.strict_json import MAX_BYTES, parse_object
from jdetune.checkpoint.weight_names import weight_names
from jdetune.errors import InputError, printable

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
FLOATS = ("float32", "float16", "bfloat16")
_KNOWN = frozenset(DTYPES.values())


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry in the headers.

    Attributes:
      name: the tensor's name in the checkpoint.
      file: file name inside the checkpoint's folder.
      dtype: NumPy's (or ml_dtypes') word for the dtype; the header's own where they have none.
      shape: its shape.
      start: its first byte in the file.
      n_bytes: its size.
      stamp: which file the header was read from.
      key: its name in the file, where that is another.
      whole: its shape in the file, where only its first rows are looked at.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    n_bytes: int = 0
    stamp: Stamp | None = None
    key: str | None = None
    whole: tuple[int, ...] | None = None

    @property
    def stored_name(self) -> str:
        """Its name in the file."""
        return self.name if self.key is None else self.key

    @property
    def read_bytes(self) -> int:
        """Bytes of the rows that are looked at, which are the first."""
        if self.whole is None:
            return self.n_bytes
        return self.n_bytes // max(self.whole[0], 1) * self.shape[0]

    @property
    def is_matrix(self) -> bool:
        """Whether it is a 2-D tensor of a float dtype that can be recovered."""
        return len(self.shape) == 2 and self.dtype in FLOATS

    @property
    def is_known(self) -> bool:
        """Whether NumPy or ml_dtypes have its dtype."""
        return self.dtype in _KNOWN


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's headers; no weights are held.

    Attributes:
      name: basename of the folder or file.
      root: the folder that the files lie in.
      tensors: name to entry, in the order of the shards.
      files: shard file names, in order.
      config: contents of config.json, empty where there is none.
      side_files: config and tokenizer files that belong with the weights, relative to ``root``.
      path: what was opened, folder or file.
      trusted: whether code that comes with it, and config that names it, is copied too.
      busy: told when it is read.
      hub_id: ``org/name`` where it is a model of the Hugging Face hub.
      revision: its commit there.
    """

    name: str
    root: Path
    tensors: Mapping[str, TensorInfo]
    files: tuple[str, ...]
    config: Mapping[str, Any]
    side_files: tuple[str, ...]
    path: Path
    trusted: bool = False
    busy: Busy = dataclasses.field(default_factory=Busy, compare=False, repr=False)
    hub_id: str | None = None
    revision: str | None = None

    @property
    def source(self) -> str:
        """Where it is from: the hub's id, or the whole path."""
        return self.hub_id or str(self.path.resolve())

    @property
    def n_parameters(self) -> int:
        """Number of elements in all tensors."""
        return sum(math.prod(info.shape) for info in self.tensors.values())


def open_checkpoint(path: str | Path, trust_remote_code: bool = False) -> Checkpoint:
    """Reads the headers of a checkpoint.

    Args:
      path: a Hugging Face directory (of transformers or diffusers, also a pipeline's) or a
        ``.safetensors`` file; a text that is no path and looks like ``org/name`` or
        ``org/name@revision`` is a model of the Hugging Face hub.
      trust_remote_code: also copy Python files, and config that makes transformers run them.

    Returns:
      The checkpoint's names, shapes, dtypes and files.

    Raises:
      InputError: the path is missing, holds no safetensors weights, or they are damaged.
    """
    snapshot = hub.resolve(path) if isinstance(path, str) else None
    if snapshot is not None:
        return dataclasses.replace(
            open_checkpoint(snapshot.folder, trust_remote_code),
            name=snapshot.name,
            hub_id=snapshot.hub_id,
            revision=snapshot.commit,
        )
    path = Path(path)
    try:
        found = os.stat(path)
        if path.is_dir():
            return _open_folder(path, trust_remote_code)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{path}: no such file or directory. Give a local folder with {SINGLE_NAME} or its "
            "shards, a .safetensors file, or an id of the Hugging Face hub (org/name@revision)."
        ) from error
    except (OSError, ValueError) as error:
        raise unreadable(Path(printable(path)), error) from error
    check_regular(path, found)
    return _open_file(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object, or an InputError that names the file."""
    return parse_object(read_whole(path, MAX_BYTES), path)


def _open_folder(path: Path, trusted: bool) -> Checkpoint:
    if (path / "model_index.json").is_file():
        from jdetune.checkpoint.pipeline_folder import open_pipeline

        return open_pipeline(path, trusted)
    config = _read_config(path)
    files, weight_map = _find_shards(path)
    for name in files:
        check_inside(path / name, path)
    tensors = _read_shards(path, files)
    if weight_map is not None:
        _check_index(path, weight_map, tensors)
    return Checkpoint(
        name=path.resolve().name,
        root=path,
        tensors=tensors,
        files=files,
        config=config,
        side_files=sidefiles.find(path, trusted),
        path=path,
        trusted=trusted,
    )


def _open_file(path: Path) -> Checkpoint:
    if path.suffix in _PICKLE_SUFFIXES:
        raise InputError(f"{path}: {_pickle_message()}")
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: not a .safetensors file. Give a safetensors file or a folder.")
    return Checkpoint(
        name=path.stem,
        root=path.parent,
        tensors=_read_shards(path.parent, (path.name,)),
        files=(path.name,),
        config={},
        side_files=(),
        path=path,
    )


def _pickle_message() -> str:
    return (
        "pickled weights are refused, since unpickling runs code. Convert them once, in an "
        "environment that you trust: load with transformers and call "
        "model.save_pretrained(FOLDER, safe_serialization=True)."
    )


def _read_config(root: Path) -> dict[str, Any]:
    path = root / "config.json"
    if not path.is_file():
        return {}
    check_inside(path, root)
    config = read_json(path)
    names = config.get("architectures")
    if not isinstance(config.get("model_type", ""), str | None) or not (
        names is None or (isinstance(names, list) and all(isinstance(n, str) for n in names))
    ):
        raise InputError(
            f"{path}: model_type is not text, or architectures is not a list of names. Copy the "
            "file again."
        )
    if config.get("quantization_config"):
        raise InputError(
            f"{path}: has quantization_config. Quantised weights are not the base plus a low-rank "
            "update. Give models that were merged and saved in fp32, fp16 or bf16."
        )
    return config


def _find_shards(root: Path) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """Shard names in order, and the index's map where there is one."""
    single, index = weight_names(root)
    if (root / single).exists():
        return (single,), None
    if (root / index).exists():
        return _read_index(root, index)
    names = sorted(p.name for p in root.iterdir() if p.suffix == ".safetensors")
    weights = [name for name in names if not name.startswith("adapter_")]
    if len(weights) > 1:  # other formats' copies of the same weights
        weights = [name for name in weights if not name.startswith("consolidated")] or weights
    if len(weights) == 1:
        return (weights[0],), None
    if weights:
        raise InputError(
            f"{root}: {len(weights)} safetensors files but no {INDEX_NAME}. Add the index, or "
            "give one of the files."
        )
    if names:
        raise InputError(
            f"{root}: holds an adapter, not a merged model. jdetune starts from merged models: "
            "merge it into its base (PEFT: merge_and_unload) or leave it out."
        )
    pickled = sorted(p.name for p in root.iterdir() if p.suffix in _PICKLE_SUFFIXES)
    if pickled:
        raise InputError(f"{root / pickled[0]}: {_pickle_message()}")
    raise InputError(
        f"{root}: no safetensors weights in it. Give a folder with {SINGLE_NAME}, or with shards "
        f"and {INDEX_NAME}."
    )


def _read_index(root: Path, index: str) -> tuple[tuple[str, ...], dict[str, str]]:
    path = root / index
    check_inside(path, root)
    weight_map = parse_object(read_whole(path, MAX_BYTES), path, constants=False).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: no weight_map in it. Copy the index again.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise InputError(
                f"{path}: shard {printable(name)!r} of tensor {printable(tensor)} is not a plain "
                "file name. Shards must lie in the index's own folder; do not use this checkpoint "
                "if you do not trust it."
            )
    files = tuple(sorted(set(weight_map.values())))
    for name in files:
        if not os.path.lexists(root / name):
            raise InputError(
                f"{root / name}: this shard is named in {index} but missing. Download the "
                "checkpoint again."
            )
    return files, weight_map


def _is_plain_name(name: str) -> bool:
    plain = name == PurePosixPath(name).name and "\\" not in name and name not in ("", ".", "..")
    return plain and name.isprintable() and name.endswith(".safetensors")


def _read_shards(root: Path, files: tuple[str, ...]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        for info in _read_header(root / name):
            if info.name in tensors:
                raise InputError(
                    f"{root / name}: tensor {printable(info.name)} is also in "
                    f"{tensors[info.name].file}. Save the model again, so that every tensor is "
                    "in one shard."
                )
            tensors[info.name] = info
    return tensors


def _read_header(path: Path) -> list[TensorInfo]:
    found = read_header(path)
    return [
        TensorInfo(e.name, path.name, DTYPES.get(e.word, e.word), e.shape, *e[3:], found.stamp)
        for e in found.entries
    ]


def _check_index(
    root: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> None:
    path = root / weight_names(root)[1]
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise InputError(
                f"{path}: tensor {printable(name)} is not in {file}. The index belongs to "
                "other shards: copy index and shards together."
            )
    for name, info in tensors.items():
        if name not in weight_map:
            raise InputError(
                f"{path}: tensor {printable(name)} of {info.file} is not listed. The index "
                "belongs to other shards: copy index and shards together."
            )
