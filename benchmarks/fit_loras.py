"""Trains many LoRA adapters at once: one compiled scan over steps, vmapped over adapters.

The base weights are shared, so a step reads them once for all adapters. Optimiser as in
`train_adapters`: AdamW, learning rate falling linearly to zero, gradient norm at most 1, each
adapter for itself.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from jax import Array

#: (what one adapter trains, its batch, what all share) to its mean loss.
Loss = Callable[[Any, Any, Any], Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How adapters are trained.

    Attributes:
      steps: of training; the learning rate ends at zero.
      lr: learning rate of the first step.
      weight_decay: AdamW's.
      clip: largest norm of an adapter's gradient.
    """

    steps: int
    lr: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0

    def optimizer(self) -> optax.GradientTransformation:
        """The optimiser of one adapter."""
        schedule = optax.linear_schedule(self.lr, 0.0, self.steps)
        adamw = optax.adamw(schedule, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip), adamw)


def start(recipe: Recipe, trainable: Any) -> Any:
    """Optimiser state of many adapters.

    Args:
      recipe: how they are trained.
      trainable: pytree with a leading adapter axis.
    """
    return jax.vmap(recipe.optimizer().init)(trainable)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def advance(
    recipe: Recipe, loss: Loss, trainable: Any, state: Any, batches: Any, shared: Any = None
) -> tuple[Any, Any, Array]:
    """Trains through a chunk of steps; call it again with what it returns.

    Args:
      recipe: how.
      loss: of one adapter on one batch.
      trainable: pytree with a leading adapter axis; given up.
      state: from `start` or the call before; given up.
      batches: pytree of arrays [step, adapter, ...].
      shared: what all adapters have in common, such as the base's weights; it does not change.

    Returns:
      What was trained, the state, and losses before each step, [step, adapter].
    """
    update = recipe.optimizer().update

    def one(weights: Any, own: Any, batch: Any) -> tuple[Any, Any, Array]:
        value, gradient = jax.value_and_grad(loss)(weights, batch, shared)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and rates
            change, own = update(gradient, own, weights)
        return optax.apply_updates(weights, change), own, value

    def step(carry: tuple[Any, Any], batch: Any) -> tuple[tuple[Any, Any], Array]:
        weights, own, value = jax.vmap(one)(*carry, batch)
        return (weights, own), value

    (trainable, state), losses = jax.lax.scan(step, (trainable, state), batches)
    return trainable, state, losses
