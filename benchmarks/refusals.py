"""What jdetune refuses, repairs and solves: every case on disk, through the command line.

    python -m benchmarks.refusals

builds small models of every kind that users hand in, runs `jdetune recover` on them and prints a
Markdown table. Ends with exit code 1 if a case goes other than expected, or if a base that was
written is not the true one.
"""

import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.refusal_cases import CASES, Case, Family
from jdetune.checkpoint import open_checkpoint, read_tensor, save_safetensors
from jdetune.cli.main import main as jdetune
from jdetune.cli.main import prepare_environment
from jdetune.metrics import log_mse

#: log10 of the mean squared error up to which a written base counts as the true one.
RIGHT = {"float32": -15.0, "bfloat16": -8.0}


class Ending(NamedTuple):
    """How a case went: what the command said first, its exit code, and what is amiss."""

    code: int
    message: str
    base_written: bool
    amiss: list[str]


def write(folder: Path, family: Family, config: dict | None = None) -> list[Path]:
    """Writes the models as Hugging Face folders."""
    paths = []
    for index, model in enumerate(family.models):
        path = folder / f"tune-{index}"
        path.mkdir(parents=True)
        save_safetensors(path / "model.safetensors", model)
        (path / "config.json").write_text(json.dumps({"model_type": "bert", **(config or {})}))
        paths.append(path)
    return paths


def wrong_tensors(base: Path, family: Family) -> list[str]:
    """What a written base lacks or has wrong."""
    found = open_checkpoint(base)
    amiss = [f"{name} is missing" for name in family.base if name not in found.tensors]
    for name in set(family.base) & set(found.tensors):
        ours, truth = read_tensor(found, name), family.base[name]
        if ours.ndim == 1 and not np.array_equal(ours, truth):
            amiss.append(f"{name} is not the base's")
        elif ours.ndim == 2 and not log_mse(ours, truth) <= RIGHT[str(truth.dtype)]:
            amiss.append(f"{name}: log10 MSE {log_mse(ours, truth):.1f}")
    return amiss


def first_line(stdout: str, stderr: str) -> str:
    """What a user reads first: the error, else the first warning or failure, else the result."""
    if stderr.strip():
        return stderr.strip().splitlines()[0].removeprefix("jdetune recover: ")
    lines = stdout.splitlines()
    for start in ("warning: ", r"\d+ tensor\(s\), e\.g\. "):
        for line in lines:
            if re.match(start, line):
                return line.removeprefix("warning: ")
    return lines[0]


def run_case(case: Case, folder: Path) -> Ending:
    """Writes a case's models, recovers them with the command and looks at what came of it."""
    family = case.build()
    paths = write(folder, family, case.config)
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = jdetune(["recover", *map(str, paths), f"--out={folder / 'out'}", "--quiet"])
    message = first_line(stdout.getvalue(), stderr.getvalue()).replace(f"{folder}/", "")
    amiss = judge(case, code, message, folder / "out", family)
    return Ending(code, message, (folder / "out" / "base").exists(), amiss)


def judge(case: Case, code: int, message: str, out: Path, family: Family) -> list[str]:
    """What went other than expected."""
    written = (out / "base").exists()
    amiss = wrong_tensors(out / "base", family) if written else []
    if code != case.code:
        amiss.append(f"exit code {code}, expected {case.code}")
    if written == (case.outcome == "refused"):
        amiss.append("a base was written" if written else "no base was written")
    if not re.search(case.message, message):
        amiss.append(f"the message does not match {case.message!r}")
    return amiss


def main() -> int:
    """Prints the table; 1 if something is amiss."""
    print("| case | what jdetune did | message | exit code | base written |")
    print("|---|---|---|---|---|")
    amiss = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            ending = run_case(case, Path(folder))
        did = case.outcome if not ending.amiss else "NOT AS EXPECTED"
        written = "yes" if ending.base_written else "no"
        message = ending.message.replace("|", r"\|")
        print(f"| {case.name} | {did} | {message} | {ending.code} | {written} |", flush=True)
        amiss += [f"{case.name}: {text}" for text in ending.amiss]
    for line in amiss:
        print(line, file=sys.stderr)
    return 1 if amiss else 0


if __name__ == "__main__":
    prepare_environment()
    sys.exit(main())
