"""Text in and out: tokenizers, batches, and sentence embeddings as of sentence-transformers."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jdetune.checkpoint.index import read_json
from jdetune.errors import InputError
from jdetune.models.bert import Bert, mean_pool, normalise
from jdetune.models.lora import Adapter
from jdetune.models.params import Params, load
from jdetune.models.run import run

#: Batches are as wide as a multiple of this, so that few programs are compiled.
BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Codec:
    """A tokenizer as two functions, whatever library made it.

    Attributes:
      encode: text to ids.
      decode: ids to text, without special tokens.
    """

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]


def load_codec(folder: str | Path, max_tokens: int | None = None) -> Codec:
    """The tokenizer of a Hugging Face folder, through the `tokenizers` package.

    Args:
      folder: holds tokenizer.json.
      max_tokens: longer texts are cut, special tokens counted.

    Raises:
      InputError: the package or the file is missing.
    """
    path = Path(folder) / "tokenizer.json"
    if importlib.util.find_spec("tokenizers") is None:
        raise InputError("Reading text needs the tokenizers package: pip install tokenizers")
    if not path.is_file():
        raise InputError(f"{path}: no such file. Copy the tokenizer beside the weights.")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    if max_tokens is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(max_tokens)
    return Codec(
        lambda text: tokenizer.encode(text).ids,
        lambda ids: tokenizer.decode([int(i) for i in ids], skip_special_tokens=True),
    )


def pad_batch(
    sequences: Sequence[Sequence[int]],
    left: bool = False,
    rows: int | None = None,
    bucket: int = BUCKET,
) -> tuple[Int[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
    """Sequences of ids as one array, and which of its places hold tokens.

    Args:
      sequences: ids of each text.
      left: padding stands on the left, as generation wants it.
      rows: height of the batch; empty rows are added.
      bucket: the width is a multiple of it.

    Example:
      >>> pad_batch([[5, 6], [7]], left=True, bucket=1)[0].tolist()
      [[5, 6], [0, 7]]
    """
    width = max((len(one) for one in sequences), default=0)
    width = max(bucket, -(-width // bucket) * bucket)
    ids = np.zeros((rows or len(sequences), width), np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, one in enumerate(sequences):
        part = slice(width - len(one), width) if left else slice(0, len(one))
        ids[row, part], mask[row, part] = one, True
    return ids, mask


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size``."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


@dataclasses.dataclass(frozen=True)
class SentenceEncoder:
    """A BERT with mean pooling and normalisation, such as all-MiniLM-L6-v2.

    Attributes:
      module: the encoder.
      params: its weights.
      codec: its tokenizer.
    """

    module: Bert
    params: Params
    codec: Codec

    @classmethod
    def load(cls, folder: str | Path) -> "SentenceEncoder":
        """Reads a sentence-transformers folder.

        Raises:
          InputError: it is not one of BERT with mean pooling, or files are missing.
        """
        folder = Path(folder)
        pooling = folder / "1_Pooling" / "config.json"
        if pooling.is_file() and not read_json(pooling).get("pooling_mode_mean_tokens", True):
            raise InputError(f"{pooling}: only mean pooling can be run.")
        module, params = load(folder)
        if not isinstance(module, Bert):
            raise InputError(f"{folder}: sentences are encoded by a BERT, not by {module.config}.")
        settings = folder / "sentence_bert_config.json"
        most = read_json(settings).get("max_seq_length") if settings.is_file() else None
        limit = module.config.max_position_embeddings
        return cls(module, params, load_codec(folder, min(most or limit, limit)))

    def __call__(self, texts: Sequence[str], size: int = 32) -> Float[np.ndarray, "text width"]:
        """Embeddings of length one.

        Args:
          texts: any number.
          size: texts in a batch.
        """
        found = [np.zeros((0, self.module.config.hidden_size), np.float32)]
        for part in batches(len(texts), size):
            tokens = [self.codec.encode(text) for text in texts[part]]
            ids, mask = pad_batch(tokens, rows=size)
            vectors = embed(self.module, self.params, ids, mask)
            found.append(np.asarray(vectors)[: len(tokens)])
        return np.concatenate(found)


@partial(jax.jit, static_argnums=0)
def embed(
    module: Bert,
    params: Params,
    ids: Int[jax.Array | np.ndarray, "b t"],
    mask: Bool[jax.Array | np.ndarray, "b t"],
    lora: Adapter | None = None,
) -> Float[jax.Array, "b width"]:
    """Sentence embeddings of token ids.

    Args:
      module: the encoder.
      params: its weights.
      ids: token ids.
      mask: where they are tokens.
      lora: factors to run with.
    """
    ids, mask = jnp.asarray(ids), jnp.asarray(mask)
    return normalise(mean_pool(run(module, params, ids, mask, lora=lora).hidden, mask))
