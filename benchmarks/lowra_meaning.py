"""What recovered weights do: activations, texts and perplexity of base and estimate.

Two settings. *Sampled layers*: the true base with the sampled layers replaced by an estimate (the
same layers for every method), cheap enough for every n. *Whole model*: every fine-tuned layer is
recovered from the same three models, and the answers to 100 prompts are compared token for token.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import corpus, lora_cache
from jdetune.bench import methods
from jdetune.bench.layers import Source, merge
from jdetune.bench.protocol import draw_subsets
from jdetune.models import Llama, Params, evaluate
from jdetune.models.text import SentenceEncoder, load_codec, pad_batch

#: Tokens of an answer.
NEW_TOKENS = 24
#: Inputs of the activation distance, and prompts of the answers.
INPUTS, PROMPTS, WHOLE_PROMPTS = 64, 16, 100
#: What is replaced layer by layer: layer name to weights.
Estimate = Mapping[str, np.ndarray]


def prompts(count: int) -> list[str]:
    """Questions of the kind that the SFT models were trained on, about other names.

    Training takes every third documented name; these are others.
    """
    every = [doc for package in corpus.PACKAGES for doc in corpus.docs(package)]
    others = [doc for place, doc in enumerate(every) if place % 3]
    picks = np.linspace(0, len(others) - 1, count).astype(int)
    asked = (others[place] for place in picks)
    return [f"Question: What does {d.package}'s {d.name} do?\nAnswer:" for d in asked]


class Meter:
    """Measures models of one subset against the base.

    Attributes:
      names: of the metrics, the first is the one that figures show; lower is nearer.
    """

    def __init__(self, model: str) -> None:
        """Loads the base.

        Args:
          model: a key of `real_models.SOURCES`.
        """
        self.module, self.params = lora_cache.base(model)
        self._kind = model
        if model == "smollm2":
            assert isinstance(self.module, Llama)
            self.names = ("log_cosine", "answers_equal", "perplexity")
            self._codec = load_codec(lora_cache.base_folder(model))
            self._encoder = SentenceEncoder.load(lora_cache.base_folder("minilm"))
            self._end = tuple(self._codec.encode("<|im_end|>"))
            self._texts = [list(self._codec.encode(doc))[:48] for doc in _passages(16)]
            self._answers = self.answers(self.params, prompts(PROMPTS))
        else:
            self.names = ("activation_distance",)
            self._inputs = _inputs(model)

    def answers(self, params: Params, asked: Sequence[str]) -> list[str]:
        """Greedy answers."""
        assert isinstance(self.module, Llama)
        return evaluate.answers(
            self.module, params, self._codec, asked, NEW_TOKENS, self._end, size=20
        )

    def replaced(self, estimate: Estimate) -> Params:
        """The base with some layers replaced."""
        return {**self.params, **{name: jnp.asarray(value) for name, value in estimate.items()}}

    def measure(self, params: Params) -> dict[str, float]:
        """All metrics of a model against the base."""
        if not isinstance(self.module, Llama):
            inputs = self._inputs
            distance = evaluate.activation_distance(self.module, self.params, params, *inputs)
            return {"activation_distance": distance}
        said = self.answers(params, prompts(PROMPTS))
        equal = float(np.mean([a == b for a, b in zip(said, self._answers, strict=True)]))
        return {
            "log_cosine": evaluate.text_log_cosine(self._encoder, said, self._answers),
            "answers_equal": equal,
            "perplexity": evaluate.perplexity(self.module, params, self._texts),
        }


def _passages(count: int) -> list[str]:
    every = [doc.text for package in corpus.PACKAGES for doc in corpus.docs(package)]
    return [every[place] for place in np.linspace(1, len(every) - 1, count).astype(int)]


def _inputs(model: str) -> tuple[np.ndarray, ...]:
    if model == "dinov2":
        images, _ = corpus.digits()
        picks = np.linspace(0, len(images) - 1, INPUTS).astype(int)
        return (corpus.digit_pixels(images[picks]).numpy(),)
    codec = load_codec(lora_cache.base_folder("minilm"), 32)
    ids, mask = pad_batch([list(codec.encode(text)) for text in _passages(INPUTS)])
    return np.asarray(ids), np.asarray(mask)


def sampled(meter: Meter, estimates: Mapping[tuple[int, str], Estimate]) -> list[dict[str, Any]]:
    """Metrics of the base with the sampled layers replaced.

    Args:
      meter: of the model.
      estimates: n and method to the layers' estimates of the first repeat.
    """
    return [
        {"n": n, "method": method, **meter.measure(meter.replaced(estimate))}
        for (n, method), estimate in estimates.items()
    ]


def whole(
    meter: Meter,
    source: Source,
    steps: int,
    n: int = 3,
    count: int = WHOLE_PROMPTS,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """A whole decoder recovered from the same n models by every method, and what it answers.

    Args:
      meter: of a decoder.
      source: all its fine-tuned layers.
      steps: of the paper's solver.
      n: number of models.
      count: number of prompts.
      progress: called after every layer.

    Returns:
      For every method the W-error over all layers, layers without a base, answers that equal the
      base's to the last token, log cosine of the answers; and all answers side by side.
    """
    (models,) = draw_subsets(len(source.models), n, 1, seed=1)
    estimates: dict[str, dict[str, np.ndarray]] = {m: {} for m in methods.DEFAULT}
    errors: dict[str, list[float]] = {m: [] for m in methods.DEFAULT}
    seconds: dict[str, float] = dict.fromkeys(methods.DEFAULT, 0.0)
    missing: dict[str, int] = dict.fromkeys(methods.DEFAULT, 0)
    exact: list[float] = []
    for place, layer in enumerate(source.read(source.names)):
        base, merged = merge(layer, models)
        task = methods.Task(base, merged, max(x.rank for x in layer.loras), steps, 0)
        for method in methods.DEFAULT:
            found = methods.run(method, task)
            seconds[method] += found["seconds"]
            if "base" in found:
                estimates[method][layer.name] = found["base"]
                errors[method].append(found["w_error"])
            else:  # what a user would fall back to
                estimates[method][layer.name] = np.mean(merged, axis=0)
                missing[method] += 1
            if method == "jdetune" and found.get("exact_fraction") is not None:
                exact.append(found["exact_fraction"])
        if progress is not None:
            progress("whole model", place + 1, len(source.names))
    asked = prompts(count)
    clock = time.perf_counter()
    texts = {"base": meter.answers(meter.params, asked)}
    for method, estimate in estimates.items():
        texts[method] = meter.answers(meter.replaced(estimate), asked)
    rows = {
        method: {
            "w_error": float(np.mean(errors[method])) if errors[method] else None,
            "layers": len(source.names),
            "without_base": missing[method],
            "seconds": seconds[method],
            "answers": len(asked),
            "equal": sum(a == b for a, b in zip(texts["base"], texts[method], strict=True)),
            "log_cosine": evaluate.text_log_cosine(meter._encoder, texts["base"], texts[method]),
        }
        for method in estimates
    }
    return {
        "n": n,
        "models": list(models),
        "new_tokens": NEW_TOKENS,
        "exact_fraction": float(np.mean(exact)) if exact else None,
        "generation_seconds": time.perf_counter() - clock,
        "methods": rows,
        "texts": [
            {"prompt": prompt, **{name: column[i] for name, column in texts.items()}}
            for i, prompt in enumerate(asked)
        ],
    }
