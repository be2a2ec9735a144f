"""The forward pass as a pure function of weights, adapter and inputs."""

from typing import Any

from jdetune.models.hooks import Edit, Hooks
from jdetune.models.layers import LORA
from jdetune.models.lora import Adapter, lora_tree
from jdetune.models.names import Model
from jdetune.models.output import Output
from jdetune.models.params import Params, to_tree


def run(
    module: Model,
    params: Params,
    *inputs: Any,
    lora: Adapter | None = None,
    taps: tuple[str, ...] = (),
    edit: Edit | None = None,
    **options: Any,
) -> Output:
    """Runs a model; for use under ``jax.jit``, ``jax.vmap`` and ``jax.grad``.

    ``module``, ``taps`` and ``edit`` are static. ``jax.vmap`` over ``lora`` alone runs many
    fine-tunes on shared weights; ``jax.grad`` by ``lora`` leaves the weights alone.

    Args:
      module: from `load` or `build`.
      params: its weights.
      *inputs: what the module is called with: ids and mask, or pixels.
      lora: path of a linear layer to its factors.
      taps: activations to return, see `hooks`.
      edit: pure function that changes activations on the way, see `hooks`.
      **options: further arguments of the module, among them ``state`` for the edit.

    Returns:
      Output of the module.

    Raises:
      InputError: weights or factors do not fit the module.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdetune.models import Llama, LlamaConfig, init_params
      >>> small = LlamaConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, head_dim=2,
      ...     num_attention_heads=2, num_key_value_heads=1, intermediate_size=4)
      >>> weights = init_params(Llama(small), jax.random.key(0))
      >>> run(Llama(small), weights, jnp.int32([[1, 2, 3]])).logits.shape
      (1, 3, 8)
    """
    variables = {"params": to_tree(module, params)}
    if lora is not None:
        variables[LORA] = lora_tree(module, lora)
    if taps or edit is not None:
        hooks = Hooks(tuple(taps), edit, module.hooks.answer)
        module = module.clone(hooks=hooks)
    found = module.apply(variables, *inputs, **options)
    assert isinstance(found, Output)
    return found
