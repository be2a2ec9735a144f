"""The whole of it for one model: directions, calibration, audit, inputs to check, and a report."""

import dataclasses
import datetime
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdetune import report
from jdetune.checkpoint.writer import save_text
from jdetune.errors import InputError
from jdetune.models.bert import Bert
from jdetune.models.generation import generate
from jdetune.models.llama import Llama
from jdetune.models.text import load_codec, pad_batch
from jdetune.pipeline import version
from jdetune.watch.audit import findings, lead, no_leaders
from jdetune.watch.carried import carried
from jdetune.watch.directions import Directions, directions
from jdetune.watch.monitor import MARGIN, ROLES, Extremes, Monitor, flag
from jdetune.watch.page import render
from jdetune.watch.rates import Calibration, Rate, bound, calibrate, measured
from jdetune.watch.recording import Firing, firings, joined, model_extremes, natural_place, record
from jdetune.watch.store import load_monitor, save_monitor
from jdetune.watch.texts import Text, read_texts, text_batches
from jdetune.watch.tuned import Tuned, load_tuned

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to do.

    Attributes:
      texts: inputs that are taken to be harmless: ranges are from them, and the audit.
      check: inputs to test.
      monitor: a saved monitor to test with, instead of calibrating.
      save: file for the monitor.
      page: file for the HTML page.
      top_k: directions of each matrix.
      drop_last: last layers left out.
      carried: also watch updates of values and inner matrices, where the next ones carry them.
      margin: how far outside of its range a cosine must lie.
      trim: share of inputs left out at each end of a range.
      extremes: inputs shown at each end of a direction.
      answer_tokens: tokens that a decoder answers to inputs without an answer.
      batch: inputs at once.
      max_tokens: of an input.
      command: what to name in the report.
    """

    texts: str | None = None
    check: str | None = None
    monitor: str | None = None
    save: str | None = None
    page: str | None = None
    top_k: int = 20
    drop_last: int = 0
    carried: bool = False
    margin: float = MARGIN
    trim: float = 0.0
    extremes: int = 10
    answer_tokens: int = 0
    batch: int = 16
    max_tokens: int = 512
    command: str = "jdetune.watch.session.run"


def run(
    out: str | Path, model: str, options: Options, progress: Progress | None = None
) -> dict[str, Any]:
    """Watches one model of a recovery.

    Args:
      out: folder of `jdetune recover`.
      model: name or number of the model.
      options: what to do.
      progress: told of every batch.

    Returns:
      The report; ``exit_code`` is 5 if matrices that should be watched were not recovered.

    Raises:
      InputError: something cannot be read, or does not fit together.
    """
    started, begin = datetime.datetime.now(datetime.UTC), time.monotonic()
    tuned = load_tuned(out, model)
    if not isinstance(tuned.module, Bert | Llama):
        raise InputError(f"{out}: texts go into BERT and decoders. Use jdetune.watch from Python.")
    loaded = None if options.monitor is None else load_monitor(options.monitor)
    watched = directions_of(tuned, options) if loaded is None else loaded.directions
    _check_fit(tuned, watched, options)
    calibration, leaders, texts = None, None, _read(tuned, options.texts, options)
    if texts:
        seen = look(tuned, watched, texts, options, partial(_step, progress, "texts"))
        leaders = lead(no_leaders(watched, min(options.extremes, len(texts))), seen)
        if loaded is None:
            calibration = calibrate(watched, seen, options.trim, options.margin)
    monitor = loaded if calibration is None else calibration.monitor
    if monitor is None:
        raise InputError("a monitor needs --texts to calibrate on, or --monitor.")
    checked = _read(tuned, options.check, options)
    fired, flagged = test(tuned, monitor, checked, options, partial(_step, progress, "check"))
    topics = [text.topic or "" for text in texts] if any(t.topic for t in texts) else None
    found = findings(watched, leaders, topics=topics) if leaders is not None else []
    if options.save is not None:
        save_monitor(options.save, monitor)
    value = {
        **report.top_level(
            command=options.command,
            started_at=started.isoformat(timespec="seconds"),
            seconds=time.monotonic() - begin,
            device=jax.default_backend(),
            version=version(),
        ),
        "schema": "jdetune.watch/1",
        "model": tuned.name,
        "directions": _about(watched),
        "calibration": _calibration(monitor, calibration),
        "audit": [dataclasses.asdict(one) for one in found],
        "checked": _checked(checked, fired, flagged),
        "missing": list(tuned.missing),
        "saved": options.save,
        "page": options.page,
        "summary": {"exit_code": 5 if tuned.missing else 0},
    }
    if options.page is not None:
        save_text(options.page, render(value, texts, checked))
    return value


def directions_of(tuned: Tuned, options: Options) -> Directions:
    """What the update added."""
    update = tuned.update
    if options.carried:
        size = tuned.module.config.head_dim if isinstance(tuned.module, Llama) else None
        update = carried(update, tuned.params, size)
    return directions(
        update,
        options.top_k,
        where=natural_place(tuned.module),
        drop_last=options.drop_last,
    )


def look(
    tuned: Tuned,
    watched: Directions,
    texts: Sequence[Text],
    options: Options,
    step: Callable[[int, int], None],
) -> Extremes:
    """Extremes of all texts."""
    parts = []
    for part, ids, valid, answer in text_batches(texts, options.batch):
        seen = model_extremes(tuned.module, tuned.params, watched, ids, valid, answer)
        parts.append(seen[: part.stop - part.start])
        step(part.stop, len(texts))
    return joined(parts)


def test(
    tuned: Tuned,
    monitor: Monitor,
    texts: Sequence[Text],
    options: Options,
    step: Callable[[int, int], None],
) -> tuple[list[Firing], np.ndarray]:
    """Which texts are flagged, and by which directions on which tokens."""
    fired, flagged = [], np.zeros(len(texts), bool)
    watched = monitor.directions
    for part, ids, valid, answer in text_batches(texts, options.batch):
        seen = model_extremes(tuned.module, tuned.params, watched, ids, valid, answer)
        flagged[part] = np.asarray(flag(monitor, seen))[: part.stop - part.start]
        if flagged[part].any():
            acts = _record(tuned.module, tuned.params, watched, ids, valid)
            own = firings(monitor, acts, valid, answer)
            fired += [one._replace(sample=one.sample + part.start) for one in own]
        step(part.stop, len(texts))
    return fired, flagged


@partial(jax.jit, static_argnums=0)
def _record(module: Any, params: Any, watched: Directions, ids: Any, valid: Any) -> Any:
    return record(module, params, ids, valid, directions=watched)


def _read(tuned: Tuned, path: str | None, options: Options) -> list[Text]:
    """Inputs of a file, with the model's own answers if it should give them."""
    if path is None:
        return []
    limit = options.max_tokens
    if isinstance(tuned.module, Bert):
        limit = min(limit, tuned.module.config.max_position_embeddings)
    texts = read_texts(path, partial(load_codec, tuned.folder, limit), limit)
    most = max(max(text.ids) for text in texts)
    least = min(min(text.ids) for text in texts)
    assert isinstance(tuned.module, Bert | Llama)
    count = tuned.module.config.vocab_size
    if least < 0 or most >= count:
        wrong = least if least < 0 else most
        raise InputError(f"{path}: token {wrong} is none of the model's {count}.")
    if options.answer_tokens and isinstance(tuned.module, Llama):
        texts = answered(tuned, texts, options)
    return texts


def answered(tuned: Tuned, texts: Sequence[Text], options: Options) -> list[Text]:
    """Texts with the first tokens of the model's answer, where they have none."""
    assert isinstance(tuned.module, Llama)
    found = []
    for start in range(0, len(texts), options.batch):
        part = texts[start : start + options.batch]
        rows = [text.ids for text in part] + [(0,)] * (options.batch - len(part))
        ids, mask = pad_batch(rows, left=True)
        new = options.answer_tokens
        tokens = np.asarray(generate(tuned.module, tuned.params, ids, mask, new_tokens=new).tokens)
        for text, row in zip(part, tokens.tolist(), strict=False):
            if text.given < len(text.ids):
                found.append(text)
                continue
            words = (*text.words, *(f" {i}" for i in row))
            found.append(dataclasses.replace(text, ids=(*text.ids, *row), words=words))
    return found


def _check_fit(tuned: Tuned, watched: Directions, options: Options) -> None:
    config = tuned.module.config
    places = max(number for _, number in watched.places)
    if watched.vectors.shape[-1] != config.hidden_size or places > config.num_hidden_layers:
        raise InputError(f"{options.monitor}: is of a model of other sizes.")


def _step(progress: Progress | None, stage: str, done: int, total: int) -> None:
    if progress is not None:
        progress(stage, done, total)


def _about(watched: Directions) -> dict[str, Any]:
    return {
        "count": watched.count,
        "places": [list(place) for place in watched.places],
        "width": int(watched.vectors.shape[-1]),
    }


def _calibration(monitor: Monitor, found: Calibration | None) -> dict[str, Any]:
    def rate(one: Rate | None) -> dict[str, Any] | None:
        if one is None or not one.trials:
            return None
        ends = {"low": one.low, "high": one.high}
        return {"flagged": one.hits, "of": one.trials, "share": one.share, **ends}

    return {
        "samples": dict(zip(ROLES, np.asarray(monitor.samples).tolist(), strict=True)),
        "trimmed": dict(zip(ROLES, np.asarray(monitor.left_out).tolist(), strict=True)),
        "margin": round(float(monitor.margin), 6),
        "bound": bound(monitor),
        "held_out": rate(found and found.held_out),
        "online": rate(measured(int(monitor.alarms), int(monitor.tested))),
    }


def _checked(
    texts: Sequence[Text], fired: Sequence[Firing], flagged: np.ndarray
) -> dict[str, Any] | None:
    if not texts:
        return None
    rate = measured(int(flagged.sum()), len(texts))
    rows = []
    for sample in np.flatnonzero(flagged).tolist():
        own = [one for one in fired if one.sample == sample]
        rows.append(
            {
                "input": sample,
                "text": texts[sample].text,
                "firings": [
                    {
                        "token": one.token,
                        "word": texts[sample].words[one.token],
                        "role": one.role,
                        "direction": one.direction,
                        "excess": one.excess,
                    }
                    for one in own[:20]
                ],
                "count": len(own),
            }
        )
    ends = {"low": rate.low, "high": rate.high}
    return {"inputs": len(texts), "flagged": rate.hits, "share": rate.share, **ends, "rows": rows}
