"""House rules: imports run one way, the package is light, nothing points outside."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jdetune

PACKAGE = Path(jdetune.__file__).parent
ROOT = PACKAGE.parent

#: Later layers may import earlier ones, never the other way.
LAYERS = [
    {"types", "behind", "busy", "deferred", "errors", "status", "metrics"},
    {"noise", "linalg", "blocks", "result", "rank_schedule", "synth"},
    {"stack", "core", "ranks", "factors"},
    {"solvers"},
    {"exact", "certificate", "grids", "snap"},
    {
        "sharding",
        "staging",
        "machine",
        "groups",
        "programs",
        "closed_form",
        "folded",
        "iterated",
        "foreign",
        "damage",
        "repair",
        "explain",
        "recovery",
    },
    {"checkpoint", "distributed"},
    {"models"},
    {
        "ahead",
        "outfolder",
        "pipeline",
        "solving",
        "store",
        "products",
        "remerge",
        "report",
        "report_check",
        "pages",
        "slices",
        "gathering",
        "inspection",
        "verification",
        "extraction",
        "outcomes",
        "merging",
    },
    {"zoo", "bench"},
    {"watch", "leak", "defend"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules():
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path):
    """Full names of what a module of the package imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "jdetune":
                yield from (f"jdetune.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = part_of(path)
    assert own in LEVEL, f"{own}: say in LAYERS where it stands"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "jdetune" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= LEVEL[own], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_numerical_side_knows_no_files(path):
    if LEVEL[part_of(path)] < LEVEL["checkpoint"] and part_of(path) != "machine":
        banned = {"safetensors", "absl", "pathlib", "os", "shutil", "torch", "flax", "rich"}
        assert not banned & {name.split(".")[0] for name in imported(path)}
    if part_of(path) != "checkpoint":
        assert "safetensors" not in {name.split(".")[0] for name in imported(path)}


def test_import_is_light_and_touches_no_backend():
    code = (
        "import sys, jdetune; jdetune.recover; from jax._src import xla_bridge as b\n"
        "assert not b.backends_are_initialized()\n"
        "heavy = {'flax', 'optax', 'safetensors', 'torch', 'absl', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_public_names_are_few_and_documented():
    assert len(jdetune.__all__) <= 25
    for name in jdetune.__all__:
        assert getattr(jdetune, name).__doc__, name
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = jdetune.nothing_like_this


def test_import_loads_no_module_of_the_package_before_it_is_asked_for():
    code = "import sys, jdetune; print(sum(name.startswith('jdetune.') for name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True
    )
    assert done.stdout.strip() == "0"


def tracked():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines()]


def test_no_tracked_file_refers_outside_the_repository():
    outside = re.compile(r"\.\./(shared|\.library)|/(work|root)/|/opt/pypi")
    for path in tracked():
        if path.suffix != ".safetensors" and path.exists() and path != Path(__file__):
            assert not outside.search(path.read_text(errors="replace")), path


def test_version_and_requirements_are_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == jdetune.__version__
    assert f"## {jdetune.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    pins = (ROOT / "constraints.txt").read_text()
    assert "torch==2.13.0" in pins
    assert "torch==2.13.0" in project["optional-dependencies"]["test"]
