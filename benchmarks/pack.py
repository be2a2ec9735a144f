"""Packs families of real merged models, unpacks them, and compares every byte.

    python -m benchmarks.pack             # all cases: table and benchmarks/results/pack.json
    python -m benchmarks.pack --case=minilm-float32

The models are written to a temporary folder (--scratch), packed and unpacked by the program as
users run it, and removed. `smollm2` takes the adapters of `benchmarks.train_adapters` where they
are, and otherwise random directions with the sizes and spectra of MiniLM's trained adapters.
"""

import filecmp
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks import families, merged_folders, tables

CASES = {
    "minilm-float32": ("minilm", 15, "float32"),
    "minilm-bfloat16": ("minilm", 15, "bfloat16"),
    "smollm2-float32": ("smollm2", 5, "float32"),
}
RESULTS = Path(__file__).parent / "results" / "pack.json"

_CASE = flags.DEFINE_multi_enum("case", list(CASES), list(CASES), "Which families.")
_FLAGS = flags.DEFINE_multi_string("pack_flag", [], "More flags for jdetune pack.")
_SCRATCH = flags.DEFINE_string("scratch", None, "Folder for models and stores meanwhile.")
_SAVE = flags.DEFINE_boolean("save", True, "Write the figures to benchmarks/results/pack.json.")
_RANDOM = flags.DEFINE_boolean("random", False, "Random directions for smollm2, trained or not.")


def measure(case: str, root: Path, pack_flags: list[str]) -> dict[str, Any]:
    """Packs and unpacks one family.

    Args:
      case: a key of `CASES`.
      root: an empty folder.
      pack_flags: more flags for `jdetune pack`.

    Returns:
      The report of `jdetune pack`, what it was run on, seconds of both commands, and whether every
      file came back.
    """
    model, count, dtype = CASES[case]
    if model == "minilm":
        what = f"{count} MiniLM, {dtype}"
        paths = merged_folders.minilm(root / "models", count, dtype)
    else:
        trained = _has_trained(count) and not _RANDOM.value
        kind = "trained adapters" if trained else "random adapters with trained spectra"
        what = f"{count} SmolLM2-135M, {dtype}, {kind}"
        paths = merged_folders.smollm2(root / "models", count, dtype, trained)
    what += f" ({' '.join(pack_flags)})" if pack_flags else ""
    load = os.getloadavg()[0]
    store, back = root / "store", root / "back"
    report, packing = _run(["pack", *map(str, paths), f"--out={store}", *pack_flags])
    unpacked, unpacking = _run(["unpack", str(store), f"--out={back}"])
    disk = sum(p.stat().st_size for p in store.rglob("*") if p.is_file())
    result = {
        "what": what,
        "load": load,
        "pack_seconds": packing,
        "unpack_seconds": unpacking,
        "bytes_on_disk": disk,
        "identical": all(identical(path, back / path.name) for path in paths),
        "files": sum(m["files"] for m in unpacked["models"]),
        "one_model": sum(p.stat().st_size for p in paths[0].rglob("*") if p.is_file()),
    }
    kept = ("bytes_in", "bytes_out", "ratio", "by_kind", "others", "residual", "level", "warnings")
    return {**result, **{key: report[key] for key in kept}, "flags": pack_flags}


def identical(one: Path, two: Path) -> bool:
    """Whether two folders hold the same files, byte by byte."""
    names = [sorted(str(p.relative_to(r)) for p in r.rglob("*") if p.is_file()) for r in (one, two)]
    same = names[0] == names[1]
    return same and all(filecmp.cmp(one / name, two / name, shallow=False) for name in names[0])


def row(figures: dict[str, Any]) -> list[str]:
    """A row of the table, in MB."""

    def mega(value: float | int) -> str:
        return f"{value / 1e6:.1f}"

    others, kinds, rest = figures["others"], figures["by_kind"], figures["residual"]
    return [
        figures["what"],
        mega(figures["bytes_in"]),
        mega(others["per_file_zstd"]),
        f"{mega(others['dedup'])} ({mega(others['dedup_zstd'])})",
        mega(figures["bytes_out"]),
        f"{figures['ratio']:.1f}",
        " + ".join(mega(kinds[key]) for key in ("base", "factors", "residual", "other")),
        f"{rest['bits']:.2f} ({rest['entropy_bits']:.2f})" if rest["elements"] else "-",
        f"{figures['pack_seconds']:.0f} / {figures['unpack_seconds']:.0f}",
        "yes" if figures["identical"] else "NO",
    ]


HEADER = [
    *("models", "MB in", "zstd of every file", "equal tensors once (and zstd)", "store", "ratio"),
    *("base + factors + residual + other", "residual, bits a weight (entropy)"),
    *("s to pack / unpack", "identical"),
]


def _has_trained(count: int) -> bool:
    try:
        return len(families.adapter_folders("smollm2-sft", count)) == count
    except FileNotFoundError:
        return False


def _run(arguments: list[str]) -> tuple[dict[str, Any], float]:
    """A command's JSON and its seconds."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "jdetune", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout), time.monotonic() - begin


def main(argv: list[str]) -> None:
    """Measures the cases and prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    known = json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else {}
    for case in _CASE.value:
        root = Path(tempfile.mkdtemp(prefix="jdetune-pack-", dir=_SCRATCH.value))
        try:
            known[case] = measure(case, root, _FLAGS.value)
        finally:
            shutil.rmtree(root)
        if _SAVE.value:
            content = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "cases": known}
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(content, indent=2) + "\n")
        print(json.dumps(known[case]), file=sys.stderr, flush=True)
    chosen = [known[case] for case in CASES if case in _CASE.value]
    print(tables.table(HEADER, [row(figures) for figures in chosen]))
    if not all(figures["identical"] for figures in chosen):
        raise SystemExit(1)


if __name__ == "__main__":
    app.run(main)
