"""Models in, a store out: scan, recover, encode, decode again and compare, put in place."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jdetune import outfolder
from jdetune.checkpoint.index import read_json
from jdetune.checkpoint.writer import save_json
from jdetune.errors import InputError, JdetuneError, OutputError
from jdetune.pipeline import Options as RecoverOptions
from jdetune.pipeline import plan_models, version
from jdetune.report import TensorResult
from jdetune.solving import Progress, RecoverFn, solve_one_base
from jdetune.zoo import jobs as work
from jdetune.zoo.finishing import Meter, assemble, check, sweep
from jdetune.zoo.reading import Blobs
from jdetune.zoo.scan import Source, check_unchanged, open_sources, scan
from jdetune.zoo.store import (
    BLOBS,
    MANIFEST,
    MAX_MANIFEST,
    write_manifest,
)
from jdetune.zoo.summary import summarise
from jdetune.zoo.zstd import library

REPORT = "report.json"


@dataclasses.dataclass(frozen=True)
class Options:
    """How to pack.

    Attributes:
      level: of zstandard.
      polish: refine recovered bases and updates: fewer bytes, more time.
      compare: measure what other ways of storing take.
      max_memory: bytes that a device may use at a time.
      overwrite: replace a former store.
      command: what to name in the report as the command.
    """

    level: int = 3
    polish: bool = True
    compare: bool = True
    max_memory: int | None = None
    overwrite: bool = False
    command: str = "jdetune.zoo.packing.run"


def run(
    models: Sequence[str | Path],
    out: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
    recover_fn: RecoverFn | None = None,
) -> dict[str, Any]:
    """Packs models into a store from which ``unpacking.run`` gives back every file.

    Args:
      models: folders or files, at least one.
      out: folder for the store; built in OUT/.jdetune and put in place at the end.
      options: how to run.
      progress: told of every step.
      recover_fn: stands in for ``jdetune.recover``.

    Returns:
      What was packed into how many bytes (``summary.summarise``).

    Raises:
      JdetuneError: bad models or output folder, or decoding does not give back what was read;
        nothing is put in place.
    """
    options, out, begin = options or Options(), Path(out), time.monotonic()
    library()
    sources = plan(models)
    state = _state(sources, options)
    if outfolder.finish_placing(out) and _made_from(out) == state["models"]:
        return read_json(out / REPORT)  # all but that was done when the former run was killed
    outfolder.check_out(out, [source.path for source in sources], options.overwrite)
    stage = outfolder.start_stage(out, state, options.overwrite)
    root = stage / outfolder.SOLVED
    scans = _scan_all(sources, root, options, progress)
    found, reasons = _recover(sources, root, options, progress, recover_fn)
    done = _encode_all(sources, scans, found, root, options, progress)
    manifest = assemble(sources, scans, done)
    write_manifest(stage / MANIFEST, manifest, jdetune_version=version(), level=options.level)
    size = (stage / MANIFEST).stat().st_size
    if size > MAX_MANIFEST:
        raise OutputError(f"--out={out}: too many tensors for one store. Pack fewer models.")
    blobs = Blobs(root)
    sweep(root / BLOBS, {blobs.path(item.blob) for item in manifest.items})
    check(manifest, root, progress)
    for source in sources:
        check_unchanged(source)
    report = {
        "schema": "jdetune.pack/1",
        "command": options.command,
        "store": str(out),
        "level": options.level,
        "seconds": time.monotonic() - begin,
        **summarise(manifest, scans, done, size),
        "warnings": [*_unreadable(sources), *reasons],
        "made_from": state["models"],
        "exit_code": 0,
    }
    save_json(stage / REPORT, report)
    (root / BLOBS).rename(stage / BLOBS)
    outfolder.place(out, stage)
    return report


def _made_from(out: Path) -> Any:
    """What a store's report says that it was made from; None if there is no report."""
    try:
        return read_json(out / REPORT).get("made_from")
    except InputError:
        return None


def describe(
    models: Sequence[str | Path], out: str | Path | None, options: Options
) -> dict[str, Any]:
    """What ``run`` would pack, by names and sizes alone."""
    sources = plan(models)
    if out is not None:
        outfolder.check_out(Path(out), [source.path for source in sources], options.overwrite)
    return {
        "bytes_in": sum(source.size for source in sources),
        "models": [
            {"name": s.name, "files": len(s.files), "bytes": s.size, "path": str(s.path)}
            for s in sources
        ],
        "warnings": _unreadable(sources),
        "exit_code": 0,
    }


def _unreadable(sources: Sequence[Source]) -> list[str]:
    return [f"{s.name}: kept as files only: {s.reason}" for s in sources if s.reason]


def plan(models: Sequence[str | Path]) -> list[Source]:
    """The models' files, checked as far as can be without reading them.

    Raises:
      InputError: no model is given, or one cannot be packed.
    """
    if not models:
        raise InputError("no model is given. Give folders or files of models.")
    return open_sources(models)


def _state(sources: Sequence[Source], options: Options) -> dict[str, Any]:
    """What the store depends on: an interrupted run goes on only where all of it is the same."""
    import jax
    import numpy as np

    listed = [
        [s.name, str(s.path.resolve()), {k: list(v) for k, v in s.files.items()}] for s in sources
    ]
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return {
        "models": {"names": [source.name for source in sources], "files": digest},
        "flags": {k: getattr(options, k) for k in ("level", "polish", "compare", "max_memory")},
        "software": {"jdetune": version(), "jax": jax.__version__, "numpy": np.__version__}
        | {"zstandard": library().__version__},
    }


def _scan_all(
    sources: Sequence[Source], root: Path, options: Options, progress: Progress | None
) -> list[list[dict[str, Any]]]:
    meter = Meter(progress, "read", sum(source.size for source in sources))
    found = []
    for index, source in enumerate(sources):
        path = root / "scans" / f"{index:05d}.json"
        if path.exists():
            meter.add(source.size)
        else:
            level = options.level if options.compare else None
            save_json(path, {"files": scan(source, level, meter.add)})
        found.append(read_json(path)["files"])
    return found


def _recover(
    sources: Sequence[Source],
    root: Path,
    options: Options,
    progress: Progress | None,
    recover_fn: RecoverFn | None,
) -> tuple[dict[str, tuple[dict[str, int], TensorResult]], list[str]]:
    """What was recovered of every tensor, with the places of its models; and why not more."""
    readable = [source.checkpoint for source in sources if source.checkpoint.tensors]
    if len(readable) < 3:
        return {}, []
    solver = None
    if not options.polish:
        from jdetune.solvers.intersection import SubspaceIntersection

        solver = SubspaceIntersection(polish=False)
    settings = RecoverOptions(solver=solver, max_memory=options.max_memory)
    try:
        planned = plan_models(readable, settings, progress)
        planned, results, notes = solve_one_base(planned, settings, root, progress, recover_fn)
    except OutputError:
        raise
    except JdetuneError as error:
        return {}, [f"no base was recovered: {error}"]
    places = {checkpoint.name: i for i, checkpoint in enumerate(planned.checkpoints)}
    good = {r.plan.name: (places, r) for r in results if r.status == "recovered" and r.recovery}
    bad = [r for r in results if r.status == "failed"]
    if bad:
        why = bad[0].reason or bad[0].plan.reason
        notes = [*notes, f"{len(bad)} tensor(s), e.g. {bad[0].plan.name}, have no base: {why}"]
    return good, notes


def _encode_all(
    sources: Sequence[Source],
    scans: Sequence[Sequence[Mapping[str, Any]]],
    found: Mapping[str, tuple[Mapping[str, int], TensorResult]],
    root: Path,
    options: Options,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    jobs = work.plan_jobs(sources, scans)
    meter = Meter(progress, "pack", sum(job.size for job in jobs))
    done = []
    for index, job in enumerate(jobs):
        path = root / "jobs" / f"{index:06d}.json"
        if not (path.exists() and _is_there(read_json(path), root)):
            known = found.get(job.name) if job.name is not None else None
            entry = work.encode(job, sources, known, root / BLOBS, options.level, options.compare)
            save_json(path, entry)
        done.append(read_json(path))
        meter.add(job.size)
    return done


def _is_there(entry: Mapping[str, Any], root: Path) -> bool:
    """Whether the blobs of a job that was done are still there."""
    blobs = Blobs(root)
    return all(blobs.path(item["blob"]).is_file() for item in entry["items"])
