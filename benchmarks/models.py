"""The Flax models beside transformers: how far outputs are apart, and tokens a second.

    python -m benchmarks.models

on the real all-MiniLM-L6-v2, DINOv2-small and SmolLM2-135M-Instruct that `real_models` loads. Both
generate greedily with a cache, from the same prompts in float32, and in turns, so that what else
the machine does falls on both; the median is printed with the slowest and fastest run. PyTorch gets
as many threads as JAX has cores: `taskset -c 0 python -m benchmarks.models` compares on one.
"""

import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags

from benchmarks import real_models
from benchmarks.tables import table
from jdetune import models

_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each.", lower_bound=1)
_NEW = flags.DEFINE_integer("new_tokens", 48, "Tokens to generate.", lower_bound=2)
_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Prompts at once.")

TEXT = "Interest rates rose again in the third quarter, to the surprise of most observers."
QUESTIONS = (
    "Why is the sky blue?",
    "What is a prime number?",
    "Name three rivers in Europe.",
    "How does a bicycle stay upright?",
    "What does photosynthesis do?",
    "Write a line about the sea.",
    "Who was Ada Lovelace?",
    "Explain rain to a child.",
)


def in_flax(theirs: Any) -> tuple[Any, models.Params]:
    """A transformers model as module and weights."""
    tensors = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    module = models.build(theirs.config.to_dict(), tensors)
    return module, models.load_params(module, tensors)


def outputs(name: str, theirs: Any, tokenizer: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Final activations or logits: ours, transformers', and transformers' in float64."""
    module, params = in_flax(theirs)
    if name == "dinov2":
        rng = np.random.default_rng(0)
        inputs = rng.standard_normal((2, 3, 98, 98)).astype(np.float32)
    else:
        inputs = np.array([tokenizer(TEXT)["input_ids"]], np.int32)
    x = torch.tensor(inputs)
    x = x if x.is_floating_point() else x.long()
    pick = "logits" if name == "smollm2" else "last_hidden_state"
    out = jax.jit(lambda p, v: models.run(module, p, v))(params, jnp.asarray(inputs))
    ours = np.asarray(out.hidden if out.logits is None else out.logits)
    with torch.no_grad():
        single = theirs(x)[pick].numpy()
        wide = copy.deepcopy(theirs).double()
        double = wide(x.double() if x.is_floating_point() else x)[pick].numpy()
    return ours, single, double


def difference(name: str) -> list[str]:
    """Row of a model: largest differences, and the size of what is compared."""
    theirs, tokenizer, _ = real_models.load(name)
    ours, single, double = outputs(name, theirs, tokenizer)

    def apart(a: np.ndarray, b: np.ndarray) -> str:
        return f"{np.abs(a.astype(np.float64) - b).max():.1e}"

    size = f"{np.abs(double).max():.3g}"
    return [name, size, apart(ours, single), apart(ours, double), apart(single, double)]


def prompts(tokenizer: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Chats of one question each, padded on the left: ids and mask."""
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}] for i in range(count)]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="np", return_dict=True
    )
    return batch["input_ids"], batch["attention_mask"]


def in_turns(first: Callable, second: Callable, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of two functions, run one after the other, again and again."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, spent in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            spent.append(time.perf_counter() - start)
    return times


def speed(theirs: Any, tokenizer: Any, batch: int, new: int, repeats: int) -> list[str]:
    """Row of a batch size: tokens a second of both, and how many tokens are equal."""
    module, params = in_flax(theirs)
    ids, mask = prompts(tokenizer, batch)

    def ours() -> np.ndarray:
        return np.asarray(models.generate(module, params, ids, mask, new_tokens=new).tokens)

    @torch.no_grad()
    def pytorch() -> np.ndarray:
        out = theirs.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
        )
        return out[:, ids.shape[1] :].numpy()

    start = time.perf_counter()
    tokens = ours()
    compiling = time.perf_counter() - start
    equal = np.mean(tokens == pytorch())
    rates = [[batch * new / s for s in spent] for spent in in_turns(ours, pytorch, repeats)]
    told = [f"{statistics.median(r):.1f} ({min(r):.1f} to {max(r):.1f})" for r in rates]
    ratio = statistics.median(rates[0]) / statistics.median(rates[1])
    return [str(batch), *told, f"{ratio:.1f}", f"{equal:.3f}", f"{compiling:.0f}"]


def main(argv: list[str]) -> None:
    """Prints both tables."""
    if len(argv) > 1:
        raise app.UsageError("no arguments are expected")
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    head = ["model", "largest value", "Flax - PyTorch", "Flax - float64", "PyTorch - float64"]
    print(table(head, [difference(name) for name in real_models.SOURCES]), flush=True)
    theirs, tokenizer, origin = real_models.load("smollm2")
    new, repeats = _NEW.value, _REPEATS.value
    rows = [speed(theirs, tokenizer, int(b), new, repeats) for b in _BATCHES.value]
    print(f"\n{origin}\n{new} new tokens, {repeats} runs, {cores} core(s) each,", end=" ")
    print(f"load {os.getloadavg()[0]:.1f}; tokens a second, median (least to most)\n")
    head = ["prompts", "Flax", "transformers", "times faster", "equal tokens", "first run, s"]
    print(table(head, rows))


if __name__ == "__main__":
    app.run(main)
