"""What a checkpoint holds, read from its headers alone: names, shapes, dtypes, shards.

Knows Hugging Face directories (one ``model.safetensors``, or shards with an index) and single
``.safetensors`` files. Every refusal names the file, the cause and what to do.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from jdetune.checkpoint import hub
from jdetune.errors import InputError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
_SIDE_PATTERNS = ("tokenizer*", "vocab*", "merges*", "chat_template*", "*.spm", "spiece.model")
_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".spm", ".tiktoken")
#: Names of safetensors' header dtypes in NumPy's words.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
FLOATS = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry in the headers.

    Attributes:
      name: the tensor's name in the checkpoint.
      file: file name inside the checkpoint's folder.
      dtype: NumPy's (or ml_dtypes') word for the dtype.
      shape: its shape.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether it is a 2-D tensor of a float dtype that can be recovered."""
        return len(self.shape) == 2 and self.dtype in FLOATS


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
    hub_id: str | None = None
    revision: str | None = None

    @property
    def source(self) -> str:
        """Where it is from: the hub's id, or the whole path."""
        return self.hub_id or str(self.path.resolve())

    @property
    def n_parameters(self) -> int:
        """Number of elements in all tensors."""
        return sum(_size(info.shape) for info in self.tensors.values())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Reads the headers of a checkpoint.

    Args:
      path: a Hugging Face directory or a ``.safetensors`` file; a text that is no path and looks
        like ``org/name`` or ``org/name@revision`` is a model of the Hugging Face hub.

    Returns:
      The checkpoint's names, shapes, dtypes and files.

    Raises:
      InputError: the path is missing, holds no safetensors weights, or they are damaged.
    """
    snapshot = hub.resolve(path) if isinstance(path, str) else None
    if snapshot is not None:
        return dataclasses.replace(
            open_checkpoint(snapshot.folder),
            name=snapshot.name,
            hub_id=snapshot.hub_id,
            revision=snapshot.commit,
        )
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"{path}: no such file or directory. Give a local folder with {SINGLE_NAME} or its "
            "shards, a .safetensors file, or an id of the Hugging Face hub (org/name@revision)."
        )
    if path.is_file():
        return _open_file(path)
    config = _read_config(path)
    files, weight_map = _find_shards(path)
    tensors = _read_shards(path, files)
    if weight_map is not None:
        _check_index(path, weight_map, tensors)
    return Checkpoint(
        name=path.resolve().name,
        root=path,
        tensors=tensors,
        files=files,
        config=config,
        side_files=_find_side_files(path),
        path=path,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object, or an InputError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}). Copy the file again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object was expected. Copy the file again.")
    return value


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
    config = read_json(path)
    if config.get("quantization_config"):
        raise InputError(
            f"{path}: has quantization_config. Quantised weights are not the base plus a low-rank "
            "update. Give models that were merged and saved in fp32, fp16 or bf16."
        )
    return config


def _find_shards(root: Path) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """Shard names in order, and the index's map where there is one."""
    if (root / SINGLE_NAME).exists():
        return (SINGLE_NAME,), None
    if (root / INDEX_NAME).exists():
        return _read_index(root)
    names = sorted(p.name for p in root.iterdir() if p.suffix == ".safetensors")
    weights = [name for name in names if not name.startswith("adapter_")]
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


def _read_index(root: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    path = root / INDEX_NAME
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: no weight_map in it. Copy the index again.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise InputError(
                f"{path}: shard {name!r} of tensor {tensor} is not a plain file name. Shards must "
                "lie in the index's own folder; do not use this checkpoint if you do not trust it."
            )
    files = tuple(sorted(set(weight_map.values())))
    for name in files:
        if not (root / name).is_file():
            raise InputError(
                f"{root / name}: this shard is named in {INDEX_NAME} but missing. Download the "
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
                    f"{root / name}: tensor {info.name} is also in {tensors[info.name].file}. "
                    "Save the model again, so that every tensor is in one shard."
                )
            tensors[info.name] = info
    return tensors


def _read_header(path: Path) -> list[TensorInfo]:
    try:
        with safe_open(path, framework="np") as handle:
            infos = []
            for name in handle.offset_keys():
                view = handle.get_slice(name)
                dtype = str(view.get_dtype())
                shape = tuple(view.get_shape())
                infos.append(TensorInfo(name, path.name, DTYPES.get(dtype, dtype), shape))
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}). Download or copy it again."
        ) from error
    return infos


def _check_index(
    root: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> None:
    path = root / INDEX_NAME
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise InputError(
                f"{path}: tensor {name} is not in {file}. The index belongs to other shards: "
                "copy index and shards together."
            )
    for name, info in tensors.items():
        if name not in weight_map:
            raise InputError(
                f"{path}: tensor {name} of {info.file} is not listed. The index belongs to other "
                "shards: copy index and shards together."
            )


def _find_side_files(root: Path) -> tuple[str, ...]:
    found = {name for name in _SIDE_FILES if (root / name).is_file()}
    for pattern in _SIDE_PATTERNS:
        matches = (p for p in root.glob(pattern) if p.is_file() and p.suffix in _SIDE_SUFFIXES)
        found.update(p.name for p in matches)
    return tuple(sorted(name for name in found if not name.endswith(".index.json")))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
