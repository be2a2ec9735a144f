"""The table of refusals and repairs: every case as expected, and a miss is seen."""

import dataclasses

import numpy as np
import pytest

from benchmarks import refusals
from benchmarks.refusal_cases import CASES, LAYERS
from jdetune import pipeline
from jdetune.errors import JdetuneError
from jdetune.solvers.intersection import SubspaceIntersection


def command(folder, paths):
    """`jdetune recover` without the refinement, which takes long to compile: code and message."""
    options = pipeline.Options(solver=SubspaceIntersection(polish=False))
    try:
        report = pipeline.run(paths, folder / "out", options)
    except JdetuneError as error:
        return error.exit_code, str(error)
    failed = [t for t in report["tensors"] if t["status"] == "failed"]
    failures = [f"{len(failed)} tensor(s), e.g. {t['name']}: {t['reason']}" for t in failed]
    summary = report["summary"]
    solved = f"{summary['recovered']} of {summary['recovered'] + summary['failed']} differing"
    return summary["exit_code"], [*report["warnings"], *failures, solved][0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_ends_as_expected(case, tmp_path):
    family = case.build()
    paths = refusals.write(tmp_path, family, case.config)
    code, message = command(tmp_path, paths)
    assert refusals.judge(case, code, message, tmp_path / "out", family) == []


def test_a_case_that_ends_otherwise_is_seen(tmp_path):
    case = next(c for c in CASES if c.name == "an all-zero matrix")
    family = case.build()
    paths = refusals.write(tmp_path, family)
    out = tmp_path / "out"
    code, message = command(tmp_path, paths)
    assert refusals.judge(case, code, message, out, family) == []
    refused = dataclasses.replace(case, outcome="refused", code=4, message="no way")
    assert len(refusals.judge(refused, code, message, out, family)) == 3
    family.base[LAYERS[0]] += np.float32(1e-3)
    family.base["encoder.norm.bias"] += 1
    family.base["more"] = np.zeros(3, np.float32)
    assert len(refusals.judge(case, code, message, out, family)) == 3
