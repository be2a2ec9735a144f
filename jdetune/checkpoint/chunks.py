"""Files of any bytes, written piece by piece so that they are whole or not there."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from jdetune.errors import OutputError, VerificationError

_CHUNK = 1 << 22


def save_chunks(path: Path, chunks: Iterable[bytes], sha256: str | None = None) -> str:
    """Writes bytes to a file: temporary name, read back, compare, rename.

    Args:
      path: where the file goes; its folder is made.
      chunks: the bytes in order.
      sha256: digest that they must have, in hex.

    Returns:
      The digest.

    Raises:
      OutputError: it cannot be written, or what was read back differs.
      VerificationError: the bytes have another digest; nothing is left behind.
    """
    return _save(path, chunks, lambda _: path, sha256)[0]


def save_by_content(folder: Path, chunks: Iterable[bytes]) -> tuple[str, int]:
    """Writes bytes to a file that is called like their digest.

    Args:
      folder: where it goes, in a folder of the digest's first two digits.
      chunks: the bytes in order.

    Returns:
      The digest and the number of bytes.

    Raises:
      OutputError: it cannot be written, or what was read back differs.
    """
    return _save(folder / "new", chunks, lambda digest: folder / digest[:2] / digest, None)


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total.update(chunk)
    return total.hexdigest()


def _save(path, chunks, target_of, sha256: str | None) -> tuple[str, int]:
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
    total, size = hashlib.sha256(), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
                total.update(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        digest = total.hexdigest()
        if sha256 is not None and digest != sha256:
            raise VerificationError(
                f"{path}: what was decoded has not the digest of the original. The store is "
                "damaged, or was made for another version: pack again, or copy it again."
            )
        if digest_file(temporary) != digest:
            raise OutputError(f"{path}: read back differs from what was written. Check the disk.")
        target = target_of(digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(target)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error}). Check space and rights."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return digest, size
