"""Names of weight files in a folder: transformers' and diffusers' stems, variants, indices."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from jdetune.errors import InputError

_STEMS = ("model", "diffusion_pytorch_model")
_SUFFIX = ".safetensors"
#: Stem, variant and number of a weight file.
_FILE = re.compile(rf"({'|'.join(_STEMS)})(\.[\w-]+?)?(-\d+-of-\d+)?\.safetensors")
_VARIANT_INDEX = re.compile(rf"({'|'.join(_STEMS)})\.safetensors\.index\.([\w-]+)\.json")


def weight_names(root: Path) -> tuple[str, str]:
    """Name of the single weight file that a folder would hold, and of its index.

    A plain file or index comes before a variant (``model.fp16.safetensors``).

    Args:
      root: a folder.

    Returns:
      The two names; at most one of the files is there, and neither where no known name is.

    Raises:
      InputError: there are several variants and no plain file.
    """
    for stem in _STEMS:
        single = f"{stem}{_SUFFIX}"
        if (root / single).exists() or (root / index_name(single)).exists():
            return single, index_name(single)
        variants = _variants(root, stem)
        if len(variants) > 1:
            said = ", ".join(variants)
            raise InputError(
                f"{root}: weights in several variants ({said}) and no {single}. Keep the files of "
                "one variant in the folder, or give one of them as MODEL."
            )
        if variants:
            return f"{stem}.{variants[0]}{_SUFFIX}", f"{stem}{_SUFFIX}.index.{variants[0]}.json"
    single = f"{_STEMS[0]}{_SUFFIX}"
    return single, index_name(single)


def index_name(file: str) -> str:
    """Name of the index that belongs to a weight file without variant.

    Example:
      >>> index_name("diffusion_pytorch_model-00001-of-00002.safetensors")
      'diffusion_pytorch_model.safetensors.index.json'
    """
    match = _FILE.fullmatch(PurePosixPath(file).name)
    return f"{match[1] if match else _STEMS[0]}{_SUFFIX}.index.json"


def written_name(file: str, files: Sequence[str]) -> str:
    """Name under which a file of a checkpoint is written, so that its library finds it.

    Variants lose their name, since a loader takes the plain file unless it is told otherwise.

    Args:
      file: one of the files, with its folder in a pipeline.
      files: all of them.

    Example:
      >>> written_name("unet/diffusion_pytorch_model.fp16.safetensors", ())
      'unet/diffusion_pytorch_model.safetensors'
      >>> written_name("mymerge.safetensors", ["mymerge.safetensors"])
      'model.safetensors'
    """
    path = PurePosixPath(file)
    match = _FILE.fullmatch(path.name)
    if match:
        return str(path.with_name(f"{match[1]}{match[3] or ''}{_SUFFIX}"))
    alone = len(files) == 1 and len(path.parts) == 1
    return f"{_STEMS[0]}{_SUFFIX}" if alone else file


def _variants(root: Path, stem: str) -> list[str]:
    """Names of the variants in a folder, as files or as indices."""
    found = set()
    for path in root.glob(f"{stem}.*"):
        file = _FILE.fullmatch(path.name)
        index = _VARIANT_INDEX.fullmatch(path.name)
        if file and file[1] == stem and file[2]:
            found.add(file[2][1:])
        elif index and index[1] == stem:
            found.add(index[2])
    return sorted(found)
