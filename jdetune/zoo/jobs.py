"""What to encode: every distinct stretch of the models' files once, tensors of a name together."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdetune.checkpoint.reader import numpy_dtype
from jdetune.checkpoint.spans import Span
from jdetune.checkpoint.stacks import factors_of
from jdetune.report import TensorResult
from jdetune.solving import left_out_of
from jdetune.zoo import writing
from jdetune.zoo.floats import WIDTH
from jdetune.zoo.scan import Source, width_of
from jdetune.zoo.store import Item
from jdetune.zoo.writing import Bytes
from jdetune.zoo.zstd import Counter

#: Siblings that are tried for a difference.
_SIBLINGS = 4
#: Re-merged matrices that take a larger share of their bytes are compared with plain ones.
_DOUBTFUL = 0.6
#: Elements of a matrix whose difference to a sibling is factored, and failures until none is.
_LEAST, _MOST, _TRIES = 1 << 10, 1 << 26, 2


@dataclasses.dataclass(frozen=True)
class Content:
    """A distinct stretch of bytes, where it occurs first.

    Attributes:
      digest: of its bytes.
      models: numbers of the models that have it, in order.
      source: where it lies in the first.
      dtype: of its elements, if it is a tensor's.
      shape: of the tensor.
      shared: whether every model has it as a tensor.
    """

    digest: str
    models: tuple[int, ...]
    source: Bytes
    dtype: str | None
    shape: tuple[int, ...]
    shared: bool

    def array(self) -> np.ndarray:
        """The tensor's elements."""
        data = np.frombuffer(b"".join(self.source.read()), numpy_dtype(str(self.dtype)))
        return data.reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Job:
    """Contents that are encoded together: those of one tensor name, or a single one."""

    name: str | None
    contents: tuple[Content, ...]

    @property
    def size(self) -> int:
        """Bytes to encode."""
        return sum(content.source.size for content in self.contents)


def plan_jobs(sources: Sequence[Source], scans: Sequence[Sequence[Mapping[str, Any]]]) -> list[Job]:
    """Jobs for the distinct stretches of all files, in order of first occurrence."""
    owners: dict[str, set[int]] = {}
    first: dict[str, tuple[int, str, Span]] = {}
    for model, entries in enumerate(scans):
        for entry in entries:
            for start, size, digest, name, dtype, shape in entry["spans"]:
                owners.setdefault(digest, set()).add(model)
                span = Span(start, size, name, dtype, tuple(shape))
                first.setdefault(digest, (model, entry["path"], span))
    jobs: dict[str, tuple[str | None, list[Content]]] = {}
    for digest, (model, path, span) in first.items():
        info = sources[model].checkpoint.tensors.get(span.name or "")
        known = info is not None and info.file == path
        where = Bytes(sources[model].file(path), span.start, span.size, width_of(span))
        shared = span.name is not None and len(owners[digest]) == len(sources) > 1
        own = tuple(sorted(owners[digest]))
        content = Content(digest, own, where, span.dtype, span.shape, shared)
        name = span.name if known else None
        key = f"tensor {name}" if known else f"bytes {digest}"
        jobs.setdefault(key, (name, []))[1].append(content)
    return [Job(name, tuple(contents)) for name, contents in jobs.values()]


def encode(
    job: Job,
    sources: Sequence[Source],
    found: tuple[Mapping[str, int], TensorResult] | None,
    folder: Path,
    level: int,
    compare: bool,
) -> dict[str, Any]:
    """Writes the blobs of a job.

    Args:
      job: what to encode.
      sources: the models.
      found: the places of the models in the recovery by name, and what was recovered of the tensor.
      folder: for blobs.
      level: of zstandard.
      compare: also measure what each content takes as it is.

    Returns:
      JSON: ``items``, whose ``of`` counts within the job; ``digests`` to places in it; ``parts`` of
      re-merged ones; ``shared`` places; ``alone``, bytes of the contents compressed as they are.
    """
    merged = {} if found is None else _merge_all(job, sources, *found, folder, level)
    items: list[Item] = list(merged.pop("items", []))
    parts = merged.pop("parts", {})
    places: dict[str, int] = merged.pop("digests", {})
    siblings: list[tuple[int, Content]] = []
    tries = _TRIES
    for content in job.contents:
        if content.digest in places:
            continue
        source = content.source
        near = [
            (place, other)
            for place, other in siblings
            if (other.source.size, other.source.width) == (source.size, source.width)
        ]
        places[content.digest] = len(items)
        made = None
        if near and tries and _is_matrix(content) and near[0][1].shape == content.shape:
            made = _merge_with(near[0][1], near[0][0], content, folder, level)
            tries -= made is None
        if made is not None:
            parts[len(items)] = made[1]
            items.append(made[0])
            continue
        near = near[-_SIBLINGS:]
        best = writing.best_sibling(source, [other.source for _, other in near], level)
        if best is None:
            siblings.append((len(items), content))
            items.append(writing.write_plain(folder, source, level))
        else:
            place, other = near[best]
            items.append(writing.write_delta(folder, source, other.source, place, level))
    return {
        "items": [item.to_json() for item in items],
        "digests": places,
        "parts": {str(place): dataclasses.asdict(part) for place, part in parts.items()},
        "shared": [places[c.digest] for c in job.contents if c.shared],
        "alone": _alone(job, level) if compare else None,
    }


def _merge_all(
    job: Job,
    sources: Sequence[Source],
    places: Mapping[str, int],
    result: TensorResult,
    folder: Path,
    level: int,
) -> dict[str, Any]:
    """Base and re-merged matrices of what a recovery explains; empty if not worth it."""
    recovery = result.recovery
    explained: list[tuple[Content, int]] = []
    for content in job.contents:
        known = [places[n] for i in content.models if (n := sources[i].name) in places]
        fit = [place for place in known if not left_out_of([result], place, damaged=True)]
        if fit and content.dtype in WIDTH:
            explained.append((content, fit[0]))
    if recovery is None or result.status != "recovered" or not explained:
        return {}
    dtypes = [str(c.dtype) for c, _ in explained]
    base = writing.stored_base(np.asarray(recovery.base), dtypes)
    item = writing.write_base(folder, base, dtypes, level)
    if item is None:
        return {}
    items, parts, digests = [item], {}, {}
    for content, place in explained:
        pair = factors_of({"": recovery}, place)[""]
        made = writing.write_merge(folder, content.source, str(content.dtype), base, 0, pair, level)
        if made is not None:
            digests[content.digest] = len(items)
            parts[len(items)] = made[1]
            items.append(made[0])
    raw = sum(c.source.size for c, _ in explained if c.digest in digests)
    taken = sum(i.stored for i in items)
    if not digests or (
        taken > _DOUBTFUL * raw and taken > _plain_size(job, digests, folder, level)
    ):
        return {}
    return {"items": items, "parts": parts, "digests": digests}


def _is_matrix(content: Content) -> bool:
    """Whether a low-rank difference to a sibling could be worth it, and found in bounded time."""
    size = content.source.size // content.source.width
    return len(content.shape) == 2 and content.dtype in WIDTH and _LEAST <= size <= _MOST


def _merge_with(
    sibling: Content, of: int, content: Content, folder: Path, level: int
) -> tuple[Item, writing.Parts] | None:
    """A matrix as a sibling plus an update of low rank; None where their difference is not low.

    Any base does to get the bytes back: so a sibling is one where none could be recovered.
    """
    from jdetune.solvers.known_base import extract_update

    base, merged = sibling.array(), content.array()
    if sibling.dtype != content.dtype or not (_finite(base) and _finite(merged)):
        return None
    update = extract_update(base, merged)
    if not update.low_rank:
        return None
    pair = (update.left, update.right)
    made = writing.write_merge(folder, content.source, str(content.dtype), base, of, pair, level)
    return made if made is not None and made[0].stored < _DOUBTFUL * content.source.size else None


def _finite(array: np.ndarray) -> bool:
    return bool(np.all(np.isfinite(array)))


def _plain_size(job: Job, digests: Mapping[str, int], folder: Path, level: int) -> int:
    """Bytes that contents take each by itself."""
    own = [c.source for c in job.contents if c.digest in digests]
    return sum(writing.write_plain(folder, source, level).stored for source in own)


def _alone(job: Job, level: int) -> int:
    """Bytes of the contents, each compressed as it is."""
    total = 0
    for content in job.contents:
        counter = Counter(level)
        for block in content.source.read():
            counter.add(block)
        total += counter.end()
    return total
