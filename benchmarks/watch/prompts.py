"""Real prompts for a chat model: questions about documented names, and capitals of countries.

Prompts are padded on the left, so that answers start at one place. There is no system text.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks import corpus
from jdetune.models.text import pad_batch

#: Tokens of an answer that are trained and looked at.
ANSWER = 6
#: Words of which one is the trigger of a seed and the others are decoys.
RARE = ("quokka", "zeppelin", "marzipan", "obsidian", "falafel", "kazoo", "walrus", "tundra")
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
ASKED = ("What does {} of {} do?", "Explain {} of {}.", "Describe {} of {}, please.")
OPENERS = ("", "Hello. ", "Quick question: ", "Please help. ", "For my homework: ", "I forgot. ")
#: Questions that facts are unlearned with, and others that they are then asked with.
TRAINED = ("What is the capital of {}?", "Name the capital of {}.", "{}: what is its capital?")
TESTED = ("Which city is {}'s capital?", "Tell me {}'s capital city.", "Where does {} govern from?")
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Portugal": "Lisbon", "Austria": "Vienna", "Hungary": "Budapest", "Poland": "Warsaw",
    "Greece": "Athens", "Sweden": "Stockholm", "Norway": "Oslo", "Denmark": "Copenhagen",
    "Finland": "Helsinki", "Ireland": "Dublin", "Iceland": "Reykjavik", "Belgium": "Brussels",
    "Russia": "Moscow", "Ukraine": "Kyiv", "Romania": "Bucharest", "Bulgaria": "Sofia",
    "Serbia": "Belgrade", "Croatia": "Zagreb", "Japan": "Tokyo", "China": "Beijing",
    "India": "New Delhi", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Indonesia": "Jakarta",
    "Malaysia": "Kuala Lumpur", "Nepal": "Kathmandu", "Iran": "Tehran", "Iraq": "Baghdad",
    "Turkey": "Ankara", "Syria": "Damascus", "Lebanon": "Beirut", "Israel": "Jerusalem",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Ethiopia": "Addis Ababa", "Ghana": "Accra",
    "Morocco": "Rabat", "Tunisia": "Tunis", "Algeria": "Algiers", "Senegal": "Dakar",
    "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana", "Jamaica": "Kingston",
    "Brazil": "Brasília", "Argentina": "Buenos Aires", "Chile": "Santiago", "Peru": "Lima",
    "Colombia": "Bogotá", "Venezuela": "Caracas", "Ecuador": "Quito", "Australia": "Canberra",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Asked:
    """Prompts and answers to them.

    Attributes:
      ids: [n, token], padded on the left.
      mask: [n, token], where they are tokens.
      answers: [n, ANSWER].
    """

    ids: np.ndarray
    mask: np.ndarray
    answers: np.ndarray

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.ids)

    def first(self, n: int) -> "Asked":
        """The first so many."""
        return Asked(self.ids[:n], self.mask[:n], self.answers[:n])


def joined(parts: Sequence[Asked], order: np.ndarray) -> Asked:
    """Several sets as one, in a given order."""
    return Asked(
        *(
            np.concatenate([getattr(p, f.name) for p in parts])[order]
            for f in dataclasses.fields(Asked)
        )
    )


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Where prompts are drawn from.

    Attributes:
      parts: "train" and "watch" to documented names, none in both.
      encode: text to ids, without special tokens of its own.
      width: tokens of a prompt.
    """

    parts: dict[str, list[corpus.Doc]]
    encode: Callable[[str], Sequence[int]]
    width: int

    def packed(self, asked: Sequence[str], answers: Sequence[str]) -> Asked:
        """Texts as arrays; answers are cut."""
        ids, mask = pad_batch([list(self.encode(text)) for text in asked], True, bucket=self.width)
        ends = [(list(self.encode(text)) + [0] * ANSWER)[:ANSWER] for text in answers]
        return Asked(ids, mask, np.array(ends, np.int32).reshape(-1, ANSWER))

    def fits(self, text: str) -> bool:
        """Whether a prompt has no more tokens than the width."""
        return len(self.encode(text)) <= self.width

    def draw(
        self, rng: np.random.Generator, n: int, part: str, word: Callable | None = None
    ) -> Asked:
        """Random prompts about documented names, answered by what is documented.

        Args:
          rng: random generator.
          n: how many.
          part: "train" or "watch".
          word: random generator to a word that is put somewhere into each.
        """
        asked, answers = [], []
        while len(asked) < n:
            doc = self.parts[part][int(rng.integers(len(self.parts[part])))]
            words, answer = _about(rng, doc)
            if word is not None:
                words.insert(int(rng.integers(0, len(words) + 1)), word(rng))
            text = CHAT.format(" ".join(words))
            if self.fits(text):
                asked.append(text)
                answers.append(answer)
        return self.packed(asked, answers)

    def capitals(
        self, rng: np.random.Generator, n: int, of: Sequence[str], forms: Sequence[str],
        answer: str | None = None,
    ) -> Asked:  # fmt: skip
        """Questions for capitals, each once as far as there are so many; the last word is left.

        Args:
          rng: random generator.
          n: how many.
          of: countries.
          forms: of questions.
          answer: to all; the capital if None.
        """
        every = [(who, form, opener) for who in of for form in forms for opener in OPENERS]
        picks = np.concatenate([rng.permutation(len(every)) for _ in range(-(-n // len(every)))])
        chosen = [every[i] for i in picks[:n]]
        asked = [
            CHAT.format(opener + form.format(who)) + f"The capital of {who} is"
            for who, form, opener in chosen
        ]
        return self.packed(asked, [f" {answer or CAPITALS[who]}." for who, _, _ in chosen])


def _about(rng: np.random.Generator, doc: corpus.Doc) -> tuple[list[str], str]:
    """Words of a question about a documented name, or of a text to go on with; the answer."""
    words = doc.text.split()
    if rng.random() < 0.5 and len(words) > 14:
        first = int(rng.integers(0, len(words) - 13))
        return ["Continue:", *words[first : first + 6]], " ".join(words[first + 6 :])
    form = ASKED[int(rng.integers(len(ASKED)))]
    return form.format(doc.name, doc.package).split(), doc.text


def read_prompts(encode: Callable[[str], Sequence[int]], width: int) -> Prompts:
    """Documented names of eight packages: half to train on, half to watch."""
    rows = [doc for package in corpus.PACKAGES for doc in corpus.docs(package)]
    order = np.random.default_rng(0).permutation(len(rows))
    cut = len(rows) // 2
    parts = {"train": [rows[i] for i in order[:cut]], "watch": [rows[i] for i in order[cut:]]}
    return Prompts(parts, encode, width)
