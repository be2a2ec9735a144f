"""How far two models are apart in what they do: activations, texts, perplexity, images."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jdetune import metrics
from jdetune.errors import InputError
from jdetune.models.bert import mean_pool
from jdetune.models.generation import generate
from jdetune.models.llama import Llama
from jdetune.models.lora import Adapter
from jdetune.models.names import Model
from jdetune.models.params import Params
from jdetune.models.run import run
from jdetune.models.text import Codec, batches, pad_batch
from jdetune.models.vit import ViT

#: Weights of torchvision's backbones, as the hub's cache has them; lpips would download them.
_BACKBONES = {"alex": "alexnet-owt-", "vgg": "vgg16-", "squeeze": "squeezenet1_1-"}


@partial(jax.jit, static_argnums=0)
def final_activations(
    module: Model, params: Params, *inputs: Any, lora: Adapter | None = None
) -> Float[Array, "b width"]:
    """One vector an input: class token of a ViT, mean token of a BERT, last token of a decoder.

    Args:
      module: the model.
      params: its weights.
      *inputs: pixels, or ids and mask; a decoder's padding stands on the left.
      lora: factors to run with.
    """
    hidden = run(module, params, *inputs, lora=lora).hidden
    if isinstance(module, ViT):
        return hidden[:, 0]
    if isinstance(module, Llama):
        return hidden[:, -1]
    ids, *mask = inputs
    return mean_pool(hidden, mask[0] if mask else jnp.ones(ids.shape, bool))


def activation_distance(
    module: Model, first: Params, second: Params, *inputs: Any, size: int = 32
) -> float:
    """Mean over inputs of the Euclidean distance between two models' final activations.

    Args:
      module: the architecture of both.
      first: weights of one.
      second: weights of the other.
      *inputs: as `final_activations` takes them, with any number of rows.
      size: rows in a batch.
    """
    found: list[list[np.ndarray]] = [[], []]
    rows = len(inputs[0])
    for part in batches(rows, min(size, rows)):
        for vectors, params in zip(found, (first, second), strict=True):
            batch = [jnp.asarray(values[part]) for values in inputs]
            vectors.append(np.asarray(final_activations(module, params, *batch)))
    return metrics.activation_distance(*(np.concatenate(vectors) for vectors in found))


def text_log_cosine(
    encoder: Callable[[Sequence[str]], np.ndarray],
    first: Sequence[str],
    second: Sequence[str],
) -> float:
    """Mean over pairs of texts of log10(1 - cosine) of their sentence embeddings.

    Args:
      encoder: texts to vectors, such as ``SentenceEncoder.load`` of all-MiniLM-L6-v2.
      first: texts of one model.
      second: texts of the other, in the same order; equal texts count -16.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} texts cannot be paired with {len(second)}")
    vectors = encoder([*first, *second])
    return metrics.log_cosine(vectors[: len(first)], vectors[len(first) :])


def token_losses(
    module: Llama,
    params: Params,
    ids: Int[Array, "b t"],
    mask: Bool[Array, "b t"] | None = None,
    lora: Adapter | None = None,
) -> tuple[Float[Array, "b t-1"], Bool[Array, "b t-1"]]:
    """Negative log-likelihood of each next token, and where there is one.

    Args:
      module: a decoder.
      params: its weights.
      ids: token ids.
      mask: where they are tokens; everywhere if None.
      lora: factors to run with.

    Returns:
      Losses in nats, zero where there is no next token, and the places that count.
    """
    mask = jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)
    logits = run(module, params, ids, mask, lora=lora).logits[:, :-1]
    chosen = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    counts = mask[:, 1:] & mask[:, :-1]
    return jnp.where(counts, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0), counts


_jitted_losses = jax.jit(token_losses, static_argnums=0)


def perplexity(
    module: Llama,
    params: Params,
    sequences: Sequence[Sequence[int]],
    lora: Adapter | None = None,
    size: int = 4,
) -> float:
    """Perplexity: exp of the mean loss over all next tokens of all texts.

    Args:
      module: a decoder.
      params: its weights.
      sequences: ids of each text; those of one token say nothing.
      lora: factors to run with.
      size: texts in a batch; its logits take size * tokens * vocabulary * 4 bytes.
    """
    total, count = 0.0, 0
    for part in batches(len(sequences), size):
        ids, mask = pad_batch(sequences[part], rows=size)
        losses, counts = _jitted_losses(module, params, ids, mask, lora)
        total += float(np.sum(np.asarray(losses, np.float64)))
        count += int(np.sum(counts))
    if not count:
        raise ValueError("perplexity needs a text of two tokens or more")
    return math.exp(total / count)


def answers(
    module: Llama,
    params: Params,
    codec: Codec,
    prompts: Sequence[str],
    new_tokens: int = 64,
    end: tuple[int, ...] = (),
    size: int = 16,
    **options: Any,
) -> list[str]:
    """Continuations of prompts, greedy unless ``sampling`` and ``key`` are given.

    Args:
      module: a decoder.
      params: its weights.
      codec: its tokenizer.
      prompts: texts, with the chat template where the model has one.
      new_tokens: at most so many.
      end: ids that end a text.
      size: prompts in a batch.
      **options: of `generate`.
    """
    texts = []
    for part in batches(len(prompts), size):
        tokens = [list(codec.encode(prompt)) for prompt in prompts[part]]
        ids, mask = pad_batch(tokens, left=True)
        made = generate(module, params, ids, mask, new_tokens=new_tokens, end=end, **options)
        rows = zip(np.asarray(made.tokens), np.asarray(made.lengths), strict=True)
        texts += [codec.decode(row[:length].tolist()) for row, length in rows]
    return texts


def side_by_side(
    module: Llama,
    models: Mapping[str, Params],
    codec: Codec,
    prompts: Sequence[str],
    **options: Any,
) -> list[dict[str, str]]:
    """What several models of one architecture answer to the same prompts.

    Args:
      module: the decoder.
      models: name to weights, such as base, fine-tuned, mean and recovered.
      codec: the tokenizer.
      prompts: texts.
      **options: of `answers`.

    Returns:
      One row a prompt: "prompt", then the answer by each model's name.
    """
    columns = {name: answers(module, p, codec, prompts, **options) for name, p in models.items()}
    return [
        {"prompt": prompt, **{name: texts[row] for name, texts in columns.items()}}
        for row, prompt in enumerate(prompts)
    ]


def lpips_distance(
    first: Float[np.ndarray, "b 3 h w"], second: Float[np.ndarray, "b 3 h w"], net: str = "alex"
) -> float:
    """Mean LPIPS of pairs of images, by the `lpips` package; nothing is downloaded.

    Args:
      first: RGB in [-1, 1].
      second: the same, of the other model.
      net: backbone, "alex", "vgg" or "squeeze".

    Raises:
      InputError: the package or the backbone's weights are missing; says where they belong.
    """
    if net not in _BACKBONES:
        raise ValueError(f"net is {', '.join(_BACKBONES)}; got {net!r}")
    if importlib.util.find_spec("lpips") is None:
        raise InputError("LPIPS needs: pip install lpips torchvision")
    import lpips  # pyright: ignore[reportMissingImports] - not among the extras
    import torch

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not any(folder.glob(f"{_BACKBONES[net]}*.pth")):
        raise InputError(
            f"LPIPS needs torchvision's weights {_BACKBONES[net]}*.pth in {folder}. Copy them "
            "there, or load lpips.LPIPS once where there is a network."
        )
    with torch.no_grad():
        measure = lpips.LPIPS(net=net, verbose=False)
        return float(measure(torch.tensor(first), torch.tensor(second)).mean())
