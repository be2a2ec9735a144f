"""What recovered models do beside their base: answers token for token, perplexity, activations.

    python -m benchmarks.semantic --subset=smollm2-sft --n=3
    python -m benchmarks.semantic --subset=dinov2 --methods=ours,mean,fine-tuned

All layers with adapters are recovered from n merged models of a real subset (trained by
`benchmarks.train_loras`), put into the base's other weights, and run in Flax. "mean" is the mean
of the merged models, "fine-tuned" the first of them. A decoder answers prompts greedily; printed is
how many answers are the base's token for token, the mean sentence distance (SBERT log-cosine of the
Flax MiniLM; -16 for equal texts), and the perplexity on texts that nobody was trained on. Of an
encoder it is the distance of final activations (class token or mean token).
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jdetune.cli.main import prepare_environment

if __name__ == "__main__":  # before JAX starts
    prepare_environment()

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402

import jdetune  # noqa: E402
from benchmarks import corpus, lora_cache, lora_data  # noqa: E402
from benchmarks.families import merge  # noqa: E402
from benchmarks.tables import table  # noqa: E402
from jdetune import models  # noqa: E402
from jdetune.metrics import exact_fraction, log_mse  # noqa: E402
from jdetune.models import evaluate  # noqa: E402
from jdetune.models.text import Codec, SentenceEncoder, batches, load_codec, pad_batch  # noqa: E402

METHODS = ("ours", "closed form", "paper", "mean", "fine-tuned")
TOPICS = (
    *("the sea", "photosynthesis", "bread", "democracy", "gravity", "jazz", "a bicycle", "snow"),
    *("a computer", "chess", "money", "sleep", "the moon", "a vaccine", "glass", "a library"),
    *("rice", "football", "an engine", "poetry", "a bridge", "coffee", "time", "a forest", "salt"),
)
QUESTIONS = (
    "Explain {} in one sentence.",
    "Give one fact about {}.",
    "Why does {} matter to people?",
    "What would be different without {}?",
)
#: Prompts of a decoder; each question about each topic.
PROMPTS = tuple(question.format(topic) for topic in TOPICS for question in QUESTIONS)
#: Inputs of an encoder, and texts that the perplexity is of.
INPUTS, TEXTS = 64, 48
#: A model's answers to prompts, as ids without padding.
Answers = list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A base model with what its metrics need.

    Attributes:
      module: architecture.
      params: the base's weights.
      codec: tokenizer; None for images.
      inputs: of an encoder, or ids of the perplexity's texts.
      encoder: of sentences, for a decoder's answers.
    """

    module: Any
    params: models.Params
    codec: Codec | None
    inputs: Any
    encoder: SentenceEncoder | None = None


def setting(model: str, cache: str | None = None) -> Setting:
    """What the metrics of a model of `real_models.SOURCES` need."""
    module, params = lora_cache.base(model, cache)
    if model == "dinov2":
        images, _ = corpus.digits()
        pixels = corpus.digit_pixels(images[:: len(images) // INPUTS][:INPUTS]).numpy()
        return Setting(module, params, None, (pixels,))
    codec = load_codec(lora_cache.base_folder(model, cache))
    docs = corpus.docs("numpy")[1::3]  # every third from the first one was trained on
    texts = [doc.text for doc in docs[: max(INPUTS, TEXTS)]]
    if model == "minilm":
        width = lora_data.TEXT_TOKENS
        tokens = [list(codec.encode(text))[:width] for text in texts[:INPUTS]]
        return Setting(module, params, codec, pad_batch(tokens))
    tokens = [list(codec.encode(text))[: lora_data.CHAT_TOKENS] for text in texts[:TEXTS]]
    encoder = SentenceEncoder.load(lora_cache.base_folder("minilm", cache))
    return Setting(module, params, codec, tokens, encoder)


def answer(
    at: Setting, params: models.Params, prompts: Sequence[str], new_tokens: int, size: int = 25
) -> Answers:
    """Greedy answers of a decoder, as ids up to and with the end."""
    assert at.codec is not None
    end = tuple(at.codec.encode("<|im_end|>"))
    found: Answers = []
    for part in batches(len(prompts), size):
        asked = [f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n" for p in prompts[part]]
        ids, mask = pad_batch([list(at.codec.encode(text)) for text in asked], left=True, rows=None)
        made = models.generate(at.module, params, ids, mask, new_tokens=new_tokens, end=end)
        rows = zip(np.asarray(made.tokens), np.asarray(made.lengths), strict=True)
        found += [tuple(row[:length].tolist()) for row, length in rows]
    return found


def figures(
    at: Setting, params: models.Params, prompts: Sequence[str], new_tokens: int, base: Answers
) -> dict[str, Any]:
    """How far a model is from the base in what it does; ``answers`` are texts, of a decoder."""
    if not isinstance(at.module, models.Llama):
        distance = evaluate.activation_distance(at.module, at.params, params, *at.inputs)
        return {"activation_distance": distance, "log10": _log10(distance)}
    assert at.codec is not None
    assert at.encoder is not None
    own = answer(at, params, prompts, new_tokens)
    texts, theirs = ([at.codec.decode(ids) for ids in some] for some in (own, base))
    return {
        "equal_answers": sum(a == b for a, b in zip(own, base, strict=True)),
        "prompts": len(prompts),
        "log_cosine": evaluate.text_log_cosine(at.encoder, texts, theirs),
        "perplexity": evaluate.perplexity(at.module, params, at.inputs, size=8),
        "answers": texts,
    }


def _log10(value: float) -> float:
    return float(np.log10(max(value, 1e-20)))


def merged_stacks(
    params: Mapping[str, Any], factors: Mapping[str, list[models.Lora]], pick: Sequence[int]
) -> dict[str, np.ndarray]:
    """Merged weights [model, row, col] of some adapters, in float32 as PEFT merges them."""
    stacks = {}
    for name, every in factors.items():
        base = np.asarray(params[name])
        pairs = [every[i] for i in pick]
        updates = [(np.asarray(p.b) @ np.asarray(p.a)) * np.float32(p.scaling) for p in pairs]
        stacks[name] = np.stack([merge(base, update) for update in updates])
    return stacks


def recovered(
    method: str, stacks: Mapping[str, np.ndarray], rank: int | None, steps: int
) -> dict[str, np.ndarray]:
    """The weights that a method makes of merged ones; layers without a base stay the mean.

    Args:
      method: of `METHODS`.
      stacks: merged weights by name.
      rank: what the paper's solver is told.
      steps: of the paper's solver.
    """
    if method == "fine-tuned":
        return {name: stack[0] for name, stack in stacks.items()}
    mean = {
        name: stack.mean(0, dtype=np.float64).astype(np.float32) for name, stack in stacks.items()
    }
    if method == "mean":
        return mean
    if method == "paper":
        if rank is None:
            raise ValueError("the paper's solver needs one rank for all layers")
        solver: Any = jdetune.SpectralDeTuning(rank=rank, steps=steps)
    else:
        solver = jdetune.SubspaceIntersection(polish=method == "ours")
    found = jdetune.recover(stacks, solver)
    return {
        name: np.asarray(found[name].base) if np.isfinite(found[name].base).all() else mean[name]
        for name in stacks
    }


def compare(
    subset: str,
    n_models: int,
    methods: Sequence[str],
    steps: int,
    prompts: Sequence[str],
    new_tokens: int,
    seed: int = 0,
    cache: str | None = None,
) -> dict[str, Any]:
    """Recovers a subset's base by some methods and runs what they give.

    Args:
      subset: a key of `lora_cache.SUBSETS`.
      n_models: merged models, drawn by the seed.
      methods: of `METHODS`.
      steps: of the paper's solver.
      prompts: of a decoder.
      new_tokens: of an answer, at most.
      seed: chooses the models.
      cache: of adapters.

    Returns:
      ``subset``, ``models``, ``layers``, the base's ``answers`` and ``methods``, each with its
      ``w_error``, ``exact``, ``seconds`` of recovery and `figures`.
    """
    spec = lora_cache.SUBSETS[subset]
    at = setting(spec.model, cache)
    factors = lora_cache.factors(at.module, lora_cache.adapter_folders(subset, cache))
    count = len(next(iter(factors.values())))
    pick = sorted(np.random.default_rng(seed).choice(count, n_models, replace=False).tolist())
    stacks = merged_stacks(at.params, factors, pick)
    decoder = isinstance(at.module, models.Llama)
    base = answer(at, at.params, prompts, new_tokens) if decoder else []
    rows = {}
    for method in methods:
        start = time.perf_counter()
        rank = spec.rank if isinstance(spec.rank, int) else None
        weights = recovered(method, stacks, rank, steps)
        seconds = time.perf_counter() - start
        params = {**at.params, **{name: jnp.asarray(w) for name, w in weights.items()}}
        truth = {name: np.asarray(at.params[name]) for name in weights}
        rows[method] = {
            "w_error": float(np.mean([log_mse(weights[n], truth[n]) for n in weights])),
            "exact": float(np.mean([exact_fraction(weights[n], truth[n]) for n in weights])),
            "seconds": seconds,
            **figures(at, params, prompts, new_tokens, base),
        }
    told = {"subset": subset, "models": pick, "layers": len(stacks), "paper_steps": steps}
    if decoder:
        assert at.codec is not None
        perplexity = evaluate.perplexity(at.module, at.params, at.inputs, size=8)
        told |= {"prompts": list(prompts), "base_perplexity": perplexity}
        told["answers"] = [at.codec.decode(ids) for ids in base]
    return told | {"methods": rows}


def shown(result: dict[str, Any]) -> str:
    """A table, one row a method."""
    decoder = "answers" in result
    heads = ["method", "W-error", "exact", "s"]
    heads += ["answers equal", "log cosine", "perplexity"] if decoder else ["activation distance"]
    rows = []
    for name, row in result["methods"].items():
        cells = [name, f"{row['w_error']:.2f}", f"{row['exact']:.4f}", f"{row['seconds']:.0f}"]
        if decoder:
            cells += [f"{row['equal_answers']} of {row['prompts']}", f"{row['log_cosine']:.2f}"]
            cells.append(f"{row['perplexity']:.4f}")
        else:
            cells.append(f"{row['activation_distance']:.3g}")
        rows.append(cells)
    if decoder:
        rows.append(["base", "-", "-", "-", "-", "-", f"{result['base_perplexity']:.4f}"])
    head = f"{result['subset']}, models {result['models']}, {result['layers']} layers"
    return f"{head}\n\n{table(heads, rows)}"


def define_flags() -> None:
    """The flags of this command."""
    flags.DEFINE_enum("subset", "smollm2-sft", list(lora_cache.SUBSETS), "Which adapters.")
    flags.DEFINE_integer("n", 3, "Merged models.", lower_bound=3)
    flags.DEFINE_list("methods", ["ours", "mean", "fine-tuned"], f"Of {', '.join(METHODS)}.")
    flags.DEFINE_integer("steps", 300, "Steps of the paper's solver.", lower_bound=1)
    flags.DEFINE_integer("prompts", len(PROMPTS), "Prompts of a decoder.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 32, "Tokens of an answer, at most.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Chooses the models.")
    flags.DEFINE_string("cache", None, "Folder of adapters; $JDETUNE_CACHE if not given.")
    flags.DEFINE_string("out", None, "JSON file to write.")


def main(argv: list[str]) -> None:
    """Prints the table of one subset."""
    values = flags.FLAGS
    unknown = set(values.methods) - set(METHODS)
    if len(argv) > 1 or unknown:
        raise app.UsageError(f"--methods are of {', '.join(METHODS)}; nothing else is expected")
    result = compare(
        values.subset,
        values.n,
        values.methods,
        values.steps,
        PROMPTS[: values.prompts],
        values.new_tokens,
        values.seed,
        values.cache,
    )
    print(shown(result))
    if values.out:
        Path(values.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    define_flags()
    app.run(main)
