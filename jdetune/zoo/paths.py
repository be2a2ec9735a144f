"""Names that a store may hold: what they name lies inside the folder, on every system."""

from collections.abc import Iterable

_RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$"}
_RESERVED |= {f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³"}
_MAX_PART, _MAX_PATH, _MAX_DEPTH = 255, 2048, 32


def problem_of(path: str) -> str | None:
    """Why a relative path must not be used; None if it may.

    Example:
      >>> problem_of("a/../b"), problem_of("1_Pooling/config.json")
      ("has a part '..'", None)
    """
    parts = path.split("/")
    if len(path) > _MAX_PATH or len(parts) > _MAX_DEPTH:
        return "is too long or too deep"
    for part in parts:
        if part in ("", ".", ".."):
            return f"has a part {part!r}"
        if not part.isprintable() or set(part) & set('\\:*?"<>|'):
            return "has a character that some systems do not allow in names"
        if part != part.strip() or part.endswith("."):
            return "has a part that starts or ends with a space, or ends with a dot"
        if part.partition(".")[0].casefold() in _RESERVED:
            return "has a part that some systems reserve for devices"
        if not _is_text(part) or len(part.encode()) > _MAX_PART:
            return "has a part that is too long, or no text"
    return None


def clash_of(paths: Iterable[str]) -> str | None:
    """A path that occurs twice, or that is a file and a folder at once; None if there is none."""
    seen: set[str] = set()
    folders: set[str] = set()
    for path in paths:
        parts = path.split("/")
        above = {"/".join(parts[:depth]) for depth in range(1, len(parts))}
        if path in seen or path in folders or above & seen:
            return path
        seen.add(path)
        folders |= above
    return None


def _is_text(part: str) -> bool:
    try:
        part.encode()
    except UnicodeEncodeError:
        return False
    return True
