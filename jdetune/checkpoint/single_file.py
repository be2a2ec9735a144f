"""Single files: what their header says beside tensors, and the original Stable Diffusion layout."""

from jdetune.checkpoint.header import read_header
from jdetune.checkpoint.index import Checkpoint

#: Where the denoiser lies in the original layout.
DENOISER = "model.diffusion_model."
#: Words that the name of the block stack of a transformer denoiser starts with.
_TRANSFORMERS = ("double_blocks.", "single_blocks.", "joint_blocks.")
#: A hash in the header is that of one model's weights, so it would be wrong for the base.
_HASHES = ("hash",)


def is_original_layout(checkpoint: Checkpoint) -> bool:
    """Whether tensors are named as Stable Diffusion's and its successors' own code names them."""
    return any(n.startswith((DENOISER, *_TRANSFORMERS)) for n in checkpoint.tensors)


def denoiser_prefix(checkpoint: Checkpoint) -> str:
    """What the denoiser's names start with in the original layout."""
    return DENOISER if any(n.startswith(DENOISER) for n in checkpoint.tensors) else ""


def kept_metadata(template: Checkpoint) -> dict[str, str] | None:
    """Header text that the base takes over from the model it is written like.

    Args:
      template: an opened checkpoint.

    Returns:
      The header's text without hashes of weights where the model is a single file, None otherwise.

    Raises:
      InputError: the file is no longer there or damaged.
    """
    if not template.path.is_file():
        return None
    found = read_header(template.path).metadata
    kept = {k: v for k, v in found.items() if not any(word in k.lower() for word in _HASHES)}
    return {"format": "pt"} | kept
