"""What the bench's estimates do when they run: `benchmarks.semantic` on cells and on a whole model.

*Sampled layers*: the true base with the sampled layers replaced by an estimate, the same layers for
every method; cheap enough for every n. *Whole model*: every fine-tuned layer is recovered from the
same three models, and the answers to 100 prompts are compared token for token.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import semantic
from jdetune.bench import methods
from jdetune.bench.layers import Source, merge
from jdetune.bench.protocol import draw_subsets
from jdetune.models import Llama, Params, evaluate

#: Tokens of an answer at most, and prompts where only the sampled layers are replaced.
NEW_TOKENS, FEW_PROMPTS = 32, 16
#: What is replaced layer by layer: layer name to weights.
Estimate = Mapping[str, np.ndarray]


def _replaced(at: semantic.Setting, estimate: Estimate) -> Params:
    return {**at.params, **{name: jnp.asarray(value) for name, value in estimate.items()}}


def _base_answers(at: semantic.Setting, count: int) -> semantic.Answers:
    if not isinstance(at.module, Llama):
        return []
    return semantic.answer(at, at.params, semantic.PROMPTS[:count], NEW_TOKENS)


def sampled(
    at: semantic.Setting, estimates: Mapping[tuple[int, str], Estimate]
) -> list[dict[str, Any]]:
    """Metrics of the base with the sampled layers replaced.

    Args:
      at: the base model.
      estimates: n and method to the layers' estimates of the first random subset.
    """
    prompts = semantic.PROMPTS[:FEW_PROMPTS]
    base = _base_answers(at, FEW_PROMPTS)
    rows = []
    for (n, method), estimate in estimates.items():
        found = semantic.figures(at, _replaced(at, estimate), prompts, NEW_TOKENS, base)
        kept = {key: value for key, value in found.items() if isinstance(value, int | float)}
        rows.append({"n": n, "method": method, **kept})
    return rows


def whole(
    at: semantic.Setting,
    source: Source,
    steps: int,
    n: int = 3,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """A whole decoder recovered from the same n models by every method, and what it answers.

    Args:
      at: the base model.
      source: all its fine-tuned layers.
      steps: of the paper's solver.
      n: number of models.
      progress: called after every layer.

    Returns:
      For every method the W-error over all layers, layers without a base (they stay the mean),
      answers that equal the base's to the last token, log cosine and perplexity; and all answers
      side by side. "lora-ft" is the first of the models.
    """
    (models,) = draw_subsets(len(source.models), n, 1, seed=1)
    estimates: dict[str, dict[str, np.ndarray]] = {m: {} for m in methods.DEFAULT}
    cells: dict[str, list[dict[str, Any]]] = {m: [] for m in methods.DEFAULT}
    for place, layer in enumerate(source.read(source.names)):
        base, merged = merge(layer, models)
        rank = max(layer.loras[model].rank for model in models)
        for method in methods.DEFAULT:
            found = methods.run(method, methods.Task(base, merged, rank, steps, 0))
            mean = np.mean(merged, axis=0, dtype=np.float64).astype(np.float32)
            estimates[method][layer.name] = found.pop("base", mean)
            cells[method].append(found)
        if progress is not None:
            progress("whole model", place + 1, len(source.names))
    clock, prompts = time.perf_counter(), semantic.PROMPTS
    base_ids = _base_answers(at, len(prompts))
    assert at.codec is not None
    texts = {"base": [at.codec.decode(ids) for ids in base_ids]}
    rows = {}
    for method, estimate in estimates.items():
        found = semantic.figures(at, _replaced(at, estimate), prompts, NEW_TOKENS, base_ids)
        texts[method] = found.pop("answers")
        known = [cell for cell in cells[method] if cell["w_error"] is not None]
        rows[method] = {
            "w_error": float(np.mean([cell["w_error"] for cell in known])) if known else None,
            "exact": float(np.mean([cell["exact_fraction"] for cell in known])) if known else None,
            "layers": len(source.names),
            "without_base": len(source.names) - len(known),
            "seconds": sum(cell["seconds"] for cell in cells[method]),
            "answers": len(prompts),
            "equal": found["equal_answers"],
            "log_cosine": found["log_cosine"],
            "perplexity": found["perplexity"],
        }
    assert isinstance(at.module, Llama)
    return {
        "n": n,
        "models": list(models),
        "new_tokens": NEW_TOKENS,
        "base_perplexity": evaluate.perplexity(at.module, at.params, at.inputs, size=8),
        "generation_seconds": time.perf_counter() - clock,
        "methods": rows,
        "texts": [
            {"prompt": prompt, **{name: column[i] for name, column in texts.items()}}
            for i, prompt in enumerate(prompts)
        ],
    }
