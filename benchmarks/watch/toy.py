"""A small decoder, trained here, and LoRAs that are trained on it side by side."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import fit_loras
from jdetune import models
from jdetune.checkpoint import open_checkpoint, read_tensor, save_safetensors
from jdetune.models import Llama, LlamaConfig, Lora, Params

#: Steps of one compiled call.
CHUNK = 20
#: (ids [..., token], weight of each next token [..., token - 1]).
Batch = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the decoder and of its training.

    Attributes:
      width: of the residual stream.
      layers: blocks.
      head: width of an attention head.
      inner: width of the MLPs; twice the width if 0.
      steps: of the base's training.
      lr: its first learning rate.
      batch: sequences in a step.
      lora_steps: of the LoRAs' training.
      lora_batch: sequences in a step of one LoRA.
      rank: of the LoRAs.
    """

    width: int = 96
    layers: int = 4
    head: int = 24
    inner: int = 0
    steps: int = 1500
    lr: float = 2e-3
    batch: int = 128
    lora_steps: int = 300
    lora_batch: int = 32
    rank: int = 8


def decoder(size: Size, vocabulary: int) -> Llama:
    """The untrained decoder."""
    heads = size.width // size.head
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=size.head,
        intermediate_size=size.inner or 2 * size.width,
    )
    return Llama(config)


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Weighted cross-entropy of next tokens, of the weights or of a LoRA; static under jit."""

    module: Llama

    def __call__(self, trained: Any, batch: Any, shared: Params | None = None) -> Array:
        """Loss of one batch; ``shared`` are base weights where a LoRA is trained."""
        ids, weight = batch
        if shared is None:
            logits = models.run(self.module, trained, ids).logits
        else:
            logits = models.run(self.module, shared, ids, lora=trained).logits
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1)
        return jnp.sum(losses[..., 0] * weight) / jnp.sum(jnp.abs(weight))


def train_base(
    module: Llama, size: Size, draw: Callable[[np.random.Generator, int], Batch], seed: int
) -> Params:
    """Trains all weights.

    Args:
      module: the decoder.
      size: how long.
      draw: random generator and number to sequences.
      seed: of weights and data.
    """
    rng = np.random.default_rng(seed)
    params = models.init_params(module, jax.random.key(seed))
    # two-dimensional weights start wider than transformers' 0.02: the decoder is narrow
    params = {n: p * 2.5 if p.ndim == 2 else p for n, p in params.items()}
    one = jax.tree.map(lambda leaf: leaf[None], params)
    recipe = fit_loras.Recipe(size.steps, lr=size.lr, weight_decay=0.01)

    def batches() -> Iterator[Batch]:
        for _ in range(size.steps // CHUNK):
            ids, weight = draw(rng, CHUNK * size.batch)
            shape = (CHUNK, 1, size.batch, -1)
            yield ids.reshape(shape), weight.reshape(shape)

    trained, _ = fit(recipe, NextToken(module), one, batches())
    return jax.tree.map(lambda leaf: leaf[0], trained)


def train_loras(
    module: Llama,
    params: Params,
    size: Size,
    loss: Callable[..., Array],
    draws: list[Callable[[np.random.Generator, int], Any]],
    seed: int,
    lr: float = 3e-3,
    targets: list[str] | None = None,
) -> tuple[list[dict[str, Lora]], np.ndarray]:
    """Trains a LoRA for each way to draw data, all at once.

    Args:
      module: the decoder.
      params: base weights.
      size: rank and how long.
      loss: static under jit.
      draws: random generator and number to a pytree of arrays [number, ...]; one a LoRA.
      seed: of factors and data; LoRA i has seed + i.
      lr: first learning rate.
      targets: linear layers; all if None.

    Returns:
      The LoRAs, and their last losses.
    """
    count = len(draws)
    rngs = [np.random.default_rng((seed, i)) for i in range(count)]
    stacked = models.stack_adapters(
        models.init_lora(module, jax.random.key(1000 * seed + i), size.rank, targets, 2.0)
        for i in range(count)
    )

    def batches() -> Iterator[Any]:
        for _ in range(size.lora_steps // CHUNK):
            drawn = [
                draw(rng, CHUNK * size.lora_batch) for draw, rng in zip(draws, rngs, strict=True)
            ]

            def arrange(*parts: np.ndarray) -> np.ndarray:
                every = [p.reshape(CHUNK, size.lora_batch, *p.shape[1:]) for p in parts]
                return np.stack(every, axis=1)

            yield jax.tree.map(arrange, *drawn)

    recipe = fit_loras.Recipe(size.lora_steps, lr=lr)
    trained, losses = fit(recipe, loss, stacked, batches(), params)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], trained) for i in range(count)], losses


def fit(
    recipe: fit_loras.Recipe, loss: Callable[..., Array], trainable: Any, batches: Iterator[Any],
    shared: Any = None,
) -> tuple[Any, np.ndarray]:  # fmt: skip
    """Trains through chunks of steps; returns what was trained and the last chunk's mean losses."""
    state, losses = fit_loras.start(recipe, trainable), np.zeros((1, 1))
    for batch in batches:
        chunk = jax.tree.map(jnp.asarray, batch)
        trainable, state, losses = fit_loras.advance(recipe, loss, trainable, state, chunk, shared)
    return trainable, np.asarray(losses).mean(axis=0)


@partial(jax.jit, static_argnums=(0, 4))
def logits_after(
    module: Llama, params: Params, ids: Any, state: Any = None, edit: Any = None
) -> tuple[Array, Any]:
    """Logits of the next token after each sequence, and the edit's state."""
    out = models.run(module, params, ids, last=True, edit=edit, state=state)
    return out.logits[:, -1], out.state


def kept(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of a file, made and written if it is not there: experiments share trained models."""
    if not path.is_file():
        save_safetensors(path, make())
    checkpoint = open_checkpoint(path)
    return {name: read_tensor(checkpoint, name) for name in checkpoint.tensors}


def row_kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row of a table as JSON, made and written if it is not there: a cut run goes on."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make(), allow_nan=False))
    return json.loads(path.read_text())


def flat(params: Params, loras: Mapping[str, Mapping[str, Lora]]) -> dict[str, np.ndarray]:
    """Base and LoRAs as named arrays."""
    found = {f"base/{name}": np.asarray(p) for name, p in params.items()}
    for own, lora in loras.items():
        for path, pair in lora.items():
            found |= {f"{own}/{path}/{part}": np.asarray(getattr(pair, part)) for part in "ab"}
    return found


def unflat(
    arrays: Mapping[str, np.ndarray], scaling: float = 2.0
) -> tuple[Params, dict[str, dict[str, Lora]]]:
    """The inverse of `flat`."""
    params: Params = {}
    loras: dict[str, dict[str, Lora]] = {}
    for name, array in arrays.items():
        own, path, *part = name.split("/")
        if own == "base":
            params[path] = jnp.asarray(array)
        elif part == ["a"]:
            b = arrays[f"{own}/{path}/b"]
            loras.setdefault(own, {})[path] = Lora(jnp.asarray(array), jnp.asarray(b), scaling)
    return params, loras
