"""One recovery per group of a zoo, into one folder, so that the same command goes on.

``OUT/.jdetune/groups.json`` says of every group what its result depends on, before its run begins
and when it has ended; ``OUT/groups.json`` takes its place when all groups are done.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jdetune import outfolder, pipeline
from jdetune.checkpoint.index import Checkpoint, read_json
from jdetune.checkpoint.writer import save_json
from jdetune.errors import InputError, NotOneBaseError, OutputError
from jdetune.report import read_report
from jdetune.solving import Progress, RecoverFn
from jdetune.zoo.group_report import SCHEMA

SUMMARY = "groups.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """One group to recover.

    Attributes:
      name: of the group and of its folder in OUT.
      models: what to give as MODEL.
      checkpoints: the same, opened.
      command: the recover command that does the same.
    """

    name: str
    models: tuple[str, ...]
    checkpoints: tuple[Checkpoint, ...]
    command: str


def check_out(out: Path, models: Sequence[Path]) -> None:
    """Refuses an output folder that holds a model or anything but former results of this command.

    Raises:
      OutputError: OUT cannot be used.
    """
    outfolder.check_apart(out, models)
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"--out={out}: is a file. Choose a folder.")
    if any(out.iterdir()) and not _former(out):
        raise OutputError(
            f"--out={out}: holds files that `jdetune group --recover` did not write. Choose "
            "another folder."
        )


def run_all(
    jobs: Sequence[Job],
    out: Path,
    options: pipeline.Options,
    found: Mapping[str, Any],
    progress: Progress | None = None,
    recover_fn: RecoverFn | None = None,
) -> dict[str, Any]:
    """Recovers group after group; those that are done and unchanged are kept.

    Args:
      jobs: the groups.
      out: folder that gets one folder a group, and ``groups.json``.
      options: of every run.
      found: what ``groups.json`` says besides.
      progress: told of every step.
      recover_fn: stands in for ``jdetune.recover``.

    Returns:
      What ``groups.json`` says: ``found``, and ``runs`` with an entry a group.

    Raises:
      OutputError: a finished group has changed and may not be replaced, or OUT cannot be written.
        All groups are looked at before the first one starts.
    """
    records = _former(out)
    marks = {job.name: _mark(job, options) for job in jobs}
    done = {job.name for job in jobs if _is_done(out / job.name, records, marks[job.name])}
    for job in jobs:
        folder = out / job.name
        if job.name not in done and not (folder / outfolder.STAGE).exists():
            paths = [checkpoint.path for checkpoint in job.checkpoints]
            _check_group(folder, paths, options.overwrite)
    state = out / outfolder.STAGE / SUMMARY
    runs = []
    for number, job in enumerate(jobs):
        folder = out / job.name
        if job.name in done:
            runs.append(_entry(job, folder, read_report(folder), kept=True))
            continue
        record = {"mark": marks[job.name], "former": _digest(folder), "done": False}
        if records.get(job.name, {}).get("mark") == record["mark"]:
            record = records[job.name]  # begun before
        records[job.name] = record
        save_json(state, {"schema": SCHEMA, "records": records})
        begin = time.monotonic()
        own = dataclasses.replace(options, command=job.command)
        try:
            report = pipeline.run(
                job.models, folder, own, _numbered(progress, number, len(jobs)), recover_fn
            )
        except (InputError, NotOneBaseError) as error:  # of this group alone
            entry = _entry(job, folder, None) | {"error": str(error), "exit_code": error.exit_code}
        else:
            entry = _entry(job, folder, report)
            records[job.name] = {**record, "done": True}
            save_json(state, {"schema": SCHEMA, "records": records})
        runs.append({**entry, "seconds": round(time.monotonic() - begin, 3)})
    content = {**found, "runs": runs, "records": records}
    content["summary"] = {**found["summary"], "exit_code": _exit_code(found, runs)}
    save_json(out / SUMMARY, content)
    state.unlink(missing_ok=True)
    if state.parent.is_dir():
        state.parent.rmdir()
    return content


def _numbered(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Progress whose stages say of which group they are."""
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{number + 1}/{count} {stage}", done, total)


def _former(out: Path) -> dict[str, Any]:
    """Records of former or interrupted runs, by group."""
    records: dict[str, Any] = {}
    for path in (out / SUMMARY, out / outfolder.STAGE / SUMMARY):
        try:
            content = read_json(path)
        except InputError:
            continue
        if content.get("schema") == SCHEMA:
            records |= content.get("records", {})
    return records


def _is_done(folder: Path, records: Mapping[str, Any], mark: str) -> bool:
    """Whether a group's result is in place, and of the same models and options."""
    record = records.get(folder.name, {})
    if record.get("mark") != mark or (folder / outfolder.STAGE).exists():
        return False
    now = _digest(folder)
    return now is not None and (record["done"] or now != record["former"])


def _check_group(folder: Path, models: Sequence[Path], overwrite: bool) -> None:
    try:
        outfolder.check_out(folder, models, overwrite)
    except OutputError as error:
        raise OutputError(
            f"{error} Its models or the flags have changed since, so that its result is not kept."
        ) from error


def _mark(job: Job, options: pipeline.Options) -> str:
    """What a result depends on; files are told by size and time of change."""
    kept = dataclasses.replace(options, command="", overwrite=False)
    files = []
    for checkpoint in job.checkpoints:
        stats = [(checkpoint.root / name).stat() for name in checkpoint.files]
        sizes = [(found.st_size, found.st_mtime_ns) for found in stats]
        files.append([checkpoint.name, checkpoint.source, checkpoint.revision, sizes])
    text = json.dumps([files, repr(kept), pipeline.version()])
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(folder: Path) -> str | None:
    """Digest of a group's report, None if there is none."""
    path = folder / "report.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _entry(
    job: Job, folder: Path, report: Mapping[str, Any] | None, kept: bool = False
) -> dict[str, Any]:
    """An entry of ``runs``."""
    summary = {} if report is None else report["summary"]
    code = summary.get("exit_code")
    return {
        "group": job.name,
        "out": str(folder),
        "command": job.command,
        "verdict": summary.get("verdict", "failed"),
        "recovered": summary.get("recovered"),
        "predicted_error": summary.get("predicted_error"),
        "exact_fraction_est": summary.get("exact_fraction_est"),
        "kept": kept,
        "error": None,
        "exit_code": code,
        "seconds": None if report is None else report["seconds"],
    }


def _exit_code(found: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> int:
    """0 if every model is in a group that was recovered; the worst code if no group was; else 5."""
    codes = {run["exit_code"] for run in runs}
    if codes and not codes & {0, 5}:
        return max(codes)
    return found["summary"]["exit_code"] if codes <= {0} else 5
