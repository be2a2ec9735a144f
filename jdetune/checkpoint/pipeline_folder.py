"""Diffusers pipelines: a folder of components, opened and written as one checkpoint.

Tensors carry the component before their name, ``unet/conv_in.weight``; in the component's own file
they have their own. Everything else works as for any checkpoint.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from jdetune.checkpoint.files import check_inside
from jdetune.checkpoint.index import Checkpoint, TensorInfo, open_checkpoint, read_json
from jdetune.errors import InputError

MODEL_INDEX = "model_index.json"
_SIDE_SUFFIXES = (".json", ".txt", ".model", ".spm", ".jinja", ".tiktoken")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def open_pipeline(path: Path, trusted: bool = False) -> Checkpoint:
    """Reads the headers of all components of a pipeline folder.

    Args:
      path: folder with ``model_index.json``.
      trusted: whether code that comes with it is copied too.

    Returns:
      One checkpoint; ``config`` is ``model_index.json``.

    Raises:
      InputError: a component is missing or cannot be read, or none has weights.
    """
    check_inside(path / MODEL_INDEX, path)
    index = read_json(path / MODEL_INDEX)
    tensors: dict[str, TensorInfo] = {}
    files: list[str] = []
    side_files = [MODEL_INDEX]
    for name in _component_names(path, index):
        if not _has_weights(path / name):
            side_files += [f"{name}/{file}" for file in _side_files(path / name)]
            continue
        part = open_checkpoint(path / name, trusted)
        files += [f"{name}/{file}" for file in part.files]
        side_files += [f"{name}/{file}" for file in part.side_files]
        tensors |= {
            f"{name}/{key}": _in_component(name, info) for key, info in part.tensors.items()
        }
    if not files:
        raise InputError(
            f"{path}: no component with weights in it. Give a pipeline folder as diffusers' "
            "save_pretrained writes it."
        )
    return Checkpoint(
        name=path.resolve().name,
        root=path,
        tensors=tensors,
        files=tuple(files),
        config=index,
        side_files=tuple(side_files),
        path=path,
        trusted=trusted,
    )


def is_pipeline(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a pipeline of components."""
    return MODEL_INDEX in checkpoint.side_files


def components(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of a pipeline's components with weights, in order."""
    return tuple(dict.fromkeys(component_of(name) for name in checkpoint.tensors))


def component_of(name: str) -> str:
    """Component of a pipeline's tensor.

    Example:
      >>> component_of("unet/conv_in.weight")
      'unet'
    """
    return name.partition("/")[0]


def component_view(checkpoint: Checkpoint, component: str) -> Checkpoint:
    """One component of a pipeline as a checkpoint of its own; nothing is opened again."""
    folder = f"{component}/"
    root = checkpoint.root / component
    own = {n.removeprefix(folder): i for n, i in checkpoint.tensors.items() if n.startswith(folder)}
    config = root / "config.json"
    return dataclasses.replace(
        checkpoint,
        root=root,
        tensors={
            n: dataclasses.replace(i, name=n, file=i.file.removeprefix(folder), key=None)
            for n, i in own.items()
        },
        files=_within(checkpoint.files, folder),
        config=read_json(config) if config.is_file() else {},
        side_files=_within(checkpoint.side_files, folder),
        path=root,
    )


def home_file(template: Checkpoint, info: TensorInfo) -> str:
    """File of a template in which a tensor that only other models hold has its place.

    The last file of the tensor's own folder; a file of its own where the template lacks the
    component.
    """
    folder = PurePosixPath(info.file).parent
    same = [file for file in template.files if PurePosixPath(file).parent == folder]
    return same[-1] if same else info.file


def _component_names(path: Path, index: Mapping[str, object]) -> list[str]:
    """Components that ``model_index.json`` names, in its order."""
    names = []
    for name, value in index.items():
        is_component = isinstance(value, list) and len(value) == 2 and value[1] is not None
        if name.startswith("_") or not is_component:
            continue
        if name in (".", "..") or PurePosixPath(name).name != name or "\\" in name:
            raise InputError(
                f"{path / MODEL_INDEX}: component {name!r} is not a plain folder name. Do not use "
                "this checkpoint if you do not trust it."
            )
        if not (path / name).is_dir():
            raise InputError(
                f"{path / name}: this component is named in {MODEL_INDEX} but missing. Download "
                "the pipeline again, or set the component to [null, null]."
            )
        check_inside(path / name, path)
        names.append(name)
    return names


def _has_weights(folder: Path) -> bool:
    """Whether a component is a model; one whose weights are in no known format is refused later."""
    is_model = (folder / "config.json").is_file()
    return is_model or any(p.suffix in _WEIGHT_SUFFIXES for p in folder.iterdir())


def _side_files(folder: Path) -> list[str]:
    """Files of a component without weights: scheduler, tokenizer, feature extractor."""
    found = [p for p in folder.iterdir() if p.suffix in _SIDE_SUFFIXES and p.is_file()]
    for path in found:
        check_inside(path, folder)
    return sorted(path.name for path in found)


def _in_component(name: str, info: TensorInfo) -> TensorInfo:
    file = f"{name}/{info.file}"
    return dataclasses.replace(info, name=f"{name}/{info.name}", file=file, key=info.name)


def _within(files: tuple[str, ...], folder: str) -> tuple[str, ...]:
    return tuple(file.removeprefix(folder) for file in files if file.startswith(folder))
