"""Config and tokenizer files that go along with weights, without code that would be run."""

import json
from pathlib import Path
from typing import Any

from jdetune.checkpoint.files import check_inside, read_whole
from jdetune.checkpoint.strict_json import MAX_BYTES, parse_object

_NAMES = (
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
_PATTERNS = ("tokenizer*", "vocab*", "merges*", "chat_template*", "*.spm", "spiece.model")
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".spm", ".tiktoken")
#: The key by which transformers finds, and then runs, Python files of a checkpoint.
_CODE_KEY = "auto_map"


def find(root: Path, trusted: bool = False) -> tuple[str, ...]:
    """Names of a folder's side files, relative to it; Python files only where it is trusted.

    Raises:
      InputError: one is a link out of the folder.
    """
    found = {name for name in _NAMES if (root / name).is_file()}
    for pattern in _PATTERNS:
        matches = (p for p in root.glob(pattern) if p.is_file() and p.suffix in _SUFFIXES)
        found.update(p.name for p in matches)
    if trusted:
        found.update(_code_files(root))
    names = tuple(sorted(name for name in found if not name.endswith(".index.json")))
    for name in names:
        check_inside(root / name, root)
    return names


def content(root: Path, name: str, trusted: bool = False) -> bytes:
    """A side file as it is to be written: without ``auto_map`` unless the folder is trusted."""
    data = read_whole(root / name, _limit(name))
    if trusted or not _may_name_code(name) or _CODE_KEY.encode() not in data:
        return data
    kept = without_code(parse_object(data, root / name))
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def without_code(value: Any) -> Any:
    """JSON without ``auto_map``, at any depth.

    Example:
      >>> without_code({"a": [{"auto_map": {}}], "b": 1})
      {'a': [{}], 'b': 1}
    """
    if isinstance(value, dict):
        return {key: without_code(item) for key, item in value.items() if key != _CODE_KEY}
    return [without_code(item) for item in value] if isinstance(value, list) else value


def code_left_out(root: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """Side files that name code, and Python files: what a folder that is not trusted loses."""
    naming = [
        name
        for name in names
        if _may_name_code(name) and _CODE_KEY.encode() in read_whole(root / name, _limit(name))
    ]
    return (*naming, *_code_files(root)) if naming else ()


def code_note(name: str, root: Path, files: tuple[str, ...], product: str) -> list[str]:
    """What to tell where ``code_left_out`` finds something in a folder: one line, or none.

    Args:
      name: what the folder is called.
      root: the folder.
      files: its side files.
      product: what is written from it.
    """
    code = code_left_out(root, files)
    said = f"code of {name} was left out ({', '.join(code)}): {product} has no auto_map. "
    return [said + "Add --trust_remote_code if you trust where it is from"] if code else []


def _may_name_code(name: str) -> bool:
    return name.endswith("config.json")


def _code_files(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("*.py") if path.is_file())


def _limit(name: str) -> int:
    """Tokenizers may be larger than any config."""
    return MAX_BYTES if _may_name_code(name) else 10 * MAX_BYTES
