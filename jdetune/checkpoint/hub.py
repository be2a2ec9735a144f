"""Models of the Hugging Face hub: ``org/name`` or ``org/name@revision`` to a folder of its cache.

Needs ``huggingface_hub`` (the extra ``hub``), which also decides about cache, token and offline
mode (``HF_HUB_CACHE``, ``hf auth login``, ``HF_HUB_OFFLINE``).
"""

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

from jdetune.errors import InputError

_INSTALL = "pip install 'jdetune[hub]'"
#: What is fetched: weights, their indices, config and tokenizer; never pickles, never code.
ALLOWED = (
    "*.safetensors",
    "*.json",
    "*.spm",
    "*.tiktoken",
    "*tokenizer*.model",
    "*spiece.model",
    "*vocab*.txt",
    "*merges*.txt",
    "*chat_template*.jinja",
)
#: Second copies of the weights in other layouts.
REFUSED = ("consolidated*", "original/*", "onnx/*", "openvino/*")
_ID = re.compile(r"(\w[\w.-]{0,95}/\w[\w.-]{0,95}?)(?:@([\w./-]{1,200}))?", re.ASCII)
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One commit of a model in the hub's cache.

    Attributes:
      hub_id: ``org/name``.
      commit: the commit that the revision stood for.
      folder: ``models--org--name/snapshots/COMMIT`` in the cache. Its files are links to
        ``models--org--name/blobs``, which is the only place outside it that they may lead to.
    """

    hub_id: str
    commit: str
    folder: Path

    @property
    def name(self) -> str:
        """The id as a folder name.

        Example:
          >>> Snapshot("org/name", "0" * 40, Path("cache")).name
          'org--name'
        """
        return self.hub_id.replace("/", "--")


def parse_id(text: str) -> tuple[str, str | None] | None:
    """The id and revision that a text stands for; None if it does not look like one.

    Example:
      >>> parse_id("org/name"), parse_id("org/name@v1.0"), parse_id("./org/name")
      (('org/name', None), ('org/name', 'v1.0'), None)
    """
    found = _ID.fullmatch(text)
    if found is None or text.endswith(_FILES) or ".." in text or "--" in found[1]:
        return None
    return found[1], found[2]


def resolve(text: str) -> Snapshot | None:
    """The snapshot of a hub id, downloaded unless it is in the cache.

    Args:
      text: what was given as a model. A path that exists is never taken for an id.

    Returns:
      The snapshot, or None if the text is a path or does not look like an id.

    Raises:
      InputError: it cannot be had; says why and what to do.
    """
    parsed = parse_id(text)
    if parsed is None or Path(text).exists():
        return None
    hub_id, revision = parsed
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError(
            f"{text}: no such file or directory. If it is an id of the Hugging Face hub, install "
            f"huggingface_hub: {_INSTALL}"
        )
    folder = Path(_download(text, hub_id, revision))
    if not any(folder.rglob("*.safetensors")):
        raise InputError(
            f"{text}: no safetensors weights in this hub model (or none in the cache). Pickled "
            "weights are never downloaded: convert them once, in an environment that you trust, "
            "with model.save_pretrained(FOLDER, safe_serialization=True), and give the folder."
        )
    return Snapshot(hub_id, folder.name, folder)


def _download(text: str, hub_id: str, revision: str | None) -> str:
    """Path of the snapshot; what goes wrong becomes an InputError."""
    from huggingface_hub import constants, errors, snapshot_download

    requests: Any = errors.HfHubHTTPError.__bases__  # of the HTTP library that is in use
    page = f"{constants.ENDPOINT}/{hub_id}"
    absent = f"{text}: no such file or directory here, and as an id of the Hugging Face hub"
    try:
        return snapshot_download(
            hub_id, revision=revision, allow_patterns=list(ALLOWED), ignore_patterns=list(REFUSED)
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{text}: this hub model is gated. Accept its terms on {page}, log in "
            "with `hf auth login`, and run again."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{text}: the hub model has no revision {revision!r}. See the branches and tags on "
            f"{page}/tree/main."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{absent} it is not found. Check the spelling; if it is private, log in with "
            "`hf auth login`."
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"{absent} it is not valid ({_line(error)}).") from error
    except errors.LocalEntryNotFoundError as error:
        why = _unreached(constants.HF_HUB_OFFLINE, error)
        raise InputError(f"{absent} it is not (or not whole) in the cache, and {why}") from error
    except (*requests, ValueError) as error:
        raise InputError(
            f"{text}: cannot be had from the hub ({_line(error)}). Check the network and the disk, "
            f"or download it elsewhere and give the folder."
        ) from error


def _unreached(offline: bool, error: Exception) -> str:
    """Why the cache was all there was, and what to do."""
    if offline:
        return (
            "HF_HUB_OFFLINE forbids to fetch it. Unset HF_HUB_OFFLINE, or run `hf download` where "
            "there is a network."
        )
    return f"the hub cannot be reached ({_line(error.__cause__ or error)}). Check the network."


def _line(error: BaseException) -> str:
    """An error in one line, without what follows the first."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
