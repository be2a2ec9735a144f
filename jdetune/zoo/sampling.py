"""Which matrices of a zoo are looked at, in which order, and reading them in bounded memory."""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jdetune.checkpoint.index import FLOATS, Checkpoint, TensorInfo
from jdetune.checkpoint.reader import raw_bytes, read_tensor
from jdetune.foreign import sample_sides
from jdetune.stack import storage_dtypes
from jdetune.types import STORAGE_DTYPES

#: Smaller matrices cannot tell low rank from full rank.
LEAST_SIDE = 16
#: Bytes of samples that are kept.
ROOM = 512 << 20
_BLOCK = 1 << 22


class Order(NamedTuple):
    """Matrices in the order in which they are looked at.

    Attributes:
      names: first one of every kind, then a second of every kind, and so on; what a model has once
        (embeddings, heads) comes last.
      first_round: how many there are in the first round.
    """

    names: tuple[str, ...]
    first_round: int


class Sample(NamedTuple):
    """One matrix of one model, and what is kept of it.

    Attributes:
      mark: digest of the whole matrix's values, the same for every dtype that holds them.
      matrix: drawn rows and columns, in the dtype of the file.
    """

    mark: bytes
    matrix: np.ndarray


def kind_of(name: str) -> str:
    """What is the same in all layers.

    Example:
      >>> kind_of("encoder.layer.11.attention.query.weight")
      'encoder.layer.*.attention.query.weight'
    """
    return re.sub(r"\d+", "*", name)


def is_sampled(info: TensorInfo) -> bool:
    """Whether it is a float matrix, or a convolution as one, large enough for a rank to tell."""
    if len(info.shape) not in (2, 4, 5) or info.dtype not in FLOATS:
        return False
    row = info.shape[0]
    return row >= LEAST_SIDE and int(np.prod(info.shape[1:])) >= LEAST_SIDE


def sample_order(
    checkpoints: Sequence[Checkpoint], wanted: Callable[[str], bool], seed: int
) -> Order:
    """The order for models of one architecture: kind after kind, each time in another layer.

    Args:
      checkpoints: models whose tensors are mostly the same.
      wanted: which tensors may be looked at.
      seed: of the draw of layers.
    """
    kinds: dict[tuple, list[str]] = {}
    infos: dict[str, TensorInfo] = {}
    for checkpoint in checkpoints:
        infos = {**checkpoint.tensors, **infos}
    for name, info in infos.items():
        if is_sampled(info) and wanted(name):
            kinds.setdefault((kind_of(name), info.shape), []).append(name)
    inner = [names for names in kinds.values() if len(names) > 1]
    outer = sorted((names[0] for names in kinds.values() if len(names) == 1), key=_size_in(infos))
    rng = np.random.default_rng(seed)
    drawn = [[names[i] for i in rng.permutation(len(names))] for names in inner]
    rounds = max(map(len, drawn), default=0)
    names = [queue[k] for k in range(rounds) for queue in drawn if k < len(queue)]
    return Order((*names, *outer), len(inner) or len(outer))


def _size_in(infos: Mapping[str, TensorInfo]) -> Callable[[str], tuple[int, str]]:
    return lambda name: (int(np.prod(infos[name].shape)), name)


class Sampler:
    """Reads matrices of models; keeps the samples that were used last, and every digest.

    Attributes:
      bytes_read: of tensors.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Starts with nothing read; the models are named by their index."""
        self.checkpoints = tuple(checkpoints)
        self.bytes_read = 0
        self._held = 0
        self._samples: OrderedDict[tuple[int, str], Sample] = OrderedDict()
        self._marks: dict[tuple[int, str], bytes] = {}
        self._storage: dict[tuple[int, str], str] = {}

    def get(self, model: int, name: str) -> Sample:
        """A model's sample of a matrix."""
        key = (model, name)
        if key in self._samples:
            self._samples.move_to_end(key)
            return self._samples[key]
        sample = self._read(model, name)
        self._samples[key] = sample
        self._held += sample.matrix.nbytes
        while self._held > ROOM and len(self._samples) > 2:  # two make a pair
            _, oldest = self._samples.popitem(last=False)
            self._held -= oldest.matrix.nbytes
        return sample

    def marks(self, model: int, names: Iterable[str]) -> dict[str, bytes]:
        """The digests that are known of a model's matrices."""
        return {n: self._marks[model, n] for n in names if (model, n) in self._marks}

    def storage(self, model: int, name: str) -> str:
        """The narrowest dtype that holds a matrix of a model and all seen of the same dtype.

        A single matrix may lie on a narrower grid because its base does, and nobody tuned it.
        """
        return self._storage[model, self.checkpoints[model].tensors[name].dtype]

    def equal_tensors(self, first: int, second: int) -> bool:
        """Whether two models are the same in every tensor, byte by byte."""
        one, two = self.checkpoints[first], self.checkpoints[second]
        if set(one.tensors) != set(two.tensors):
            return False
        if same_files(one, two):
            return True
        for name, info in one.tensors.items():
            other = two.tensors[name]
            if (info.shape, info.dtype) != (other.shape, other.dtype):
                return False
            known = [self._marks.get((model, name)) for model in (first, second)]
            if None not in known:
                if known[0] != known[1]:
                    return False
                continue  # of one dtype: the digests are of their bytes
            mine, its = read_tensor(one, name), read_tensor(two, name)
            self.bytes_read += mine.nbytes + its.nbytes
            if not np.array_equal(raw_bytes(mine), raw_bytes(its)):
                return False
        return True

    def _read(self, model: int, name: str) -> Sample:
        checkpoint = self.checkpoints[model]
        whole = read_tensor(checkpoint, name)
        self.bytes_read += whole.nbytes
        matrix = whole.reshape(len(whole), -1)
        if (model, name) not in self._marks:
            self._marks[model, name] = _mark(matrix)
        kept = np.ascontiguousarray(sample_sides(matrix[None])[0])
        self._note_storage(model, str(kept.dtype), storage_dtypes(kept[None])[0])
        return Sample(self._marks[model, name], kept)

    def _note_storage(self, model: int, dtype: str, storage: str) -> None:
        known = self._storage.get((model, dtype), storage)
        self._storage[model, dtype] = min(known, storage, key=STORAGE_DTYPES.index)


def same_files(one: Checkpoint, two: Checkpoint) -> bool:
    """Whether two checkpoints are links to the same weight files."""
    return len(one.files) == len(two.files) and all(
        (one.root / a).samefile(two.root / b) for a, b in zip(one.files, two.files, strict=True)
    )


def _mark(matrix: np.ndarray) -> bytes:
    """SHA-256 of the values as float32, a block of rows at a time."""
    total = hashlib.sha256(str(matrix.shape).encode())
    step = max(1, _BLOCK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        total.update(raw_bytes(matrix[start : start + step].astype(np.float32)).data)
    return total.digest()
