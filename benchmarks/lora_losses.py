r"""What the adapters of LoWRA Bench's real subsets minimise: classes, answers, preferences.

Each is (what one adapter trains, its batch, the base's weights) to a mean loss. Preferences are
Direct Preference Optimisation (arXiv 2305.18290, Eq. 7): with the log-likelihoods :math:`p` of the
better answer b and the worse one w under the adapter, and :math:`q` before,

.. math:: -\log\sigma\bigl(\beta\,[(p_b - q_b) - (p_w - q_w)]\bigr).
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from benchmarks.fit_loras import Loss
from jdetune.linalg import matmul
from jdetune.models.evaluate import final_activations, token_losses

#: DPO's strength of the pull towards the model that it starts from.
BETA = 0.1


@cache
def loss_of(kind: str, module: Any) -> Loss:
    """The loss of a subset's kind; the same function for the same module, so it compiles once."""
    loss = {"images": classes, "texts": classes, "sft": answers, "dpo": preferences}[kind]
    return partial(loss, module)


def classes(module: Any, trained: Any, batch: Any, params: Any) -> Float[Array, ""]:
    """Cross entropy of a linear head on the class token or the mean of the tokens."""
    inputs = (batch["pixels"],) if "pixels" in batch else (batch["ids"], batch["mask"])
    vectors = final_activations(module, params, *inputs, lora=trained["lora"])
    logits = matmul(vectors, trained["head"]["weight"]) + trained["head"]["bias"]
    chosen = jnp.take_along_axis(logits, batch["label"][:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)


def first_heads(count: int, width: int, labels: int) -> dict[str, Array]:
    """Heads of many adapters; they are thrown away after training."""
    weight = jax.random.normal(jax.random.key(0), (count, width, labels)) * width**-0.5
    return {"weight": weight, "bias": jnp.zeros((count, labels))}


def answers(module: Any, trained: Any, batch: Any, params: Any) -> Float[Array, ""]:
    """Cross entropy of the answers' tokens; the questions are only read."""
    losses, _ = token_losses(module, params, batch["ids"], batch["mask"], lora=trained["lora"])
    answered = batch["answered"][:, 1:]
    count = jnp.sum(answered, dtype=jnp.float32)
    return jnp.sum(jnp.where(answered, losses, 0)) / jnp.maximum(count, 1)


def preferences(module: Any, trained: Any, batch: Any, params: Any) -> Float[Array, ""]:
    """DPO, with the log-likelihoods before in ``batch["reference"]``."""
    gain = likelihoods(module, params, trained["lora"], batch) - batch["reference"]
    return -jnp.mean(jax.nn.log_sigmoid(BETA * (gain[:, 0] - gain[:, 1])))


def likelihoods(module: Any, params: Any, lora: Any, batch: Any) -> Float[Array, "example answer"]:
    """Log-likelihood of each answer, the sum over its tokens."""
    flat = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in ("ids", "mask")}
    losses, _ = token_losses(module, params, flat["ids"], flat["mask"], lora=lora)
    answered = batch["answered"][..., 1:]
    return -jnp.sum(jnp.where(answered, losses.reshape(answered.shape), 0), axis=-1)


@partial(jax.jit, static_argnums=0)
def _references(module: Any, params: Any, loras: Any, batches: Any) -> Array:
    return jax.vmap(lambda lora, batch: likelihoods(module, params, lora, batch))(loras, batches)


def reference(module: Any, params: Any, loras: Any, batches: dict[str, Any]) -> dict[str, Any]:
    """Batches [adapter, ...] with the log-likelihoods under the adapters as they are now."""
    return batches | {"reference": np.asarray(_references(module, params, loras, batches))}


@partial(jax.jit, static_argnums=0)
def every(loss: Loss, trainable: Any, batches: Any, params: Any) -> Float[Array, " adapter"]:
    """Loss of every adapter on its batch."""
    return jax.vmap(lambda own, batch: loss(own, batch, params))(trainable, batches)
