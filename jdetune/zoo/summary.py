"""What a store takes, by kind of content and beside other ways of storing."""

from collections.abc import Mapping, Sequence
from typing import Any

from jdetune.zoo.store import Manifest


def summarise(
    manifest: Manifest,
    scans: Sequence[Sequence[Mapping[str, Any]]],
    done: Sequence[Mapping[str, Any]],
    manifest_bytes: int,
) -> dict[str, Any]:
    """Bytes in and out.

    Args:
      manifest: of the store.
      scans: of every model (``scan.scan``).
      done: of every job (``jobs.encode``).
      manifest_bytes: size of the manifest file.

    Returns:
      ``bytes_in``; ``bytes_out``; ``ratio``; ``by_kind``: bytes of ``base`` (bases, and tensors
      that all models share), ``factors``, ``residual`` and ``other``; ``others``: bytes of
      ``per_file_zstd``, ``dedup`` (every distinct tensor and file once, as it is) and
      ``dedup_zstd`` (each of these compressed); ``residual``: what it takes by element, beside its
      entropy without regard to where an element lies; ``models``.
    """
    kinds = dict.fromkeys(("base", "factors", "residual", "other"), 0)
    kinds["other"] = manifest_bytes
    elements, entropy, counted = 0, 0.0, set()
    for entry in done:
        bases = {item["of"] for item in entry["items"] if item["kind"] == "merge"}
        for place, item in enumerate(entry["items"]):
            if item["blob"] in counted:
                continue
            counted.add(item["blob"])
            part = entry["parts"].get(str(place))
            if part is not None:
                kinds["factors"] += part["factors"]
                kinds["residual"] += part["residual"]
                elements, entropy = elements + part["elements"], entropy + part["entropy"]
            elif place in bases or place in entry["shared"]:
                kinds["base"] += item["stored"]
            else:
                kinds["other"] += item["stored"]
    bytes_in, bytes_out = sum(m.size for m in manifest.models), sum(kinds.values())
    distinct = {
        span[2]: span[1] for entries in scans for entry in entries for span in entry["spans"]
    }
    compared = all(entry["alone"] is not None for entry in done)
    alone = [e["alone"] for entries in scans for e in entries]
    return {
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "ratio": bytes_in / bytes_out,
        "by_kind": kinds,
        "others": {
            "per_file_zstd": sum(alone) if compared else None,
            "dedup": sum(distinct.values()) if compared else None,
            "dedup_zstd": sum(e["alone"] for e in done) if compared else None,
        },
        "residual": {
            "elements": elements,
            "bits": 8 * kinds["residual"] / elements if elements else None,
            "entropy_bits": entropy / elements if elements else None,
        },
        "models": [
            {"name": m.name, "files": len(m.files), "bytes": m.size} for m in manifest.models
        ],
    }
