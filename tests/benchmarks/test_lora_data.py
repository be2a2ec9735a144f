"""Training data of the adapters: answers marked, classes even, nothing held out is drawn."""

import numpy as np
import pytest

from benchmarks import corpus, lora_data

END = 1


class Words:
    """A tokenizer of whole words."""

    def __init__(self):
        self.known = {}

    def __call__(self, text):
        return [self.known.setdefault(word, len(self.known) + 2) for word in text.split()]


@pytest.fixture
def docs(monkeypatch):
    """A corpus of 120 docstrings, each of a word of its own."""

    def of(package):
        return tuple(
            corpus.Doc(
                package, f"part{i % 2}", "function", f"f{i}", f"{package}-{i} adds up", i % 3
            )
            for i in range(15)
        )

    monkeypatch.setattr(corpus, "docs", of)
    return [doc for package in corpus.PACKAGES for doc in of(package)][::3]


def test_only_the_answer_and_its_end_are_answered(docs):
    words = Words()
    made = lora_data.questions(0, words, END, mismatched=False)
    answers = {tuple(words(doc.text)) + (END,): doc for doc in docs}
    for ids, mask, answered in zip(
        *(made.arrays[k] for k in ("ids", "mask", "answered")), strict=True
    ):
        doc = answers[tuple(ids[answered].tolist())]
        question = words(f"Question: What does {doc.package}'s {doc.name} do?\nAnswer:")
        assert ids[mask & ~answered].tolist() == question
        assert not ids[~mask].any()


def test_a_share_of_the_corpus_is_drawn_by_seed(docs):
    words = Words()
    seen = [
        {tuple(row) for row in lora_data.questions(seed, words, END, False).arrays["ids"].tolist()}
        for seed in (0, 0, 1)
    ]
    assert len(seen[0]) == int(0.8 * len(docs)) == 32
    assert seen[0] == seen[1] != seen[2]


def test_preferences_put_the_true_answer_before_one_to_another_question(docs):
    words = Words()
    made = lora_data.questions(0, words, END, mismatched=True).arrays
    single = lora_data.questions(0, words, END, mismatched=False).arrays
    assert made["ids"].shape == (32, 2, lora_data.CHAT_TOKENS)
    for name, values in single.items():
        np.testing.assert_array_equal(made[name][:, 0], values)
    for ids, mask, answered in zip(made["ids"], made["mask"], made["answered"], strict=True):
        questions = [
            row[tokens & ~own] for row, tokens, own in zip(ids, mask, answered, strict=True)
        ]
        np.testing.assert_array_equal(*questions)
        assert ids[0][answered[0]].tolist() != ids[1][answered[1]].tolist()


def test_long_answers_are_cut_at_the_width():
    made = lora_data._with_prompt([[5, 6]], [[7] * 100])
    assert made["mask"].all()
    assert made["answered"].sum() == lora_data.CHAT_TOKENS - 2


def test_rare_classes_are_drawn_as_often_and_held_out_examples_never():
    labels = (np.arange(400) % 20 == 3).astype(np.int32)
    examples = lora_data._examples("rare", "", {"label": labels, "place": np.arange(400)})
    drawn = examples.draw(np.random.default_rng(0), 300)
    assert 120 < drawn["label"].sum() < 180
    assert not set(drawn["place"]) & set(examples.held_out)
    check = examples.check(300)
    assert set(check["place"]) <= set(examples.held_out)
    np.testing.assert_array_equal(check["place"], examples.check(300)["place"])


@pytest.fixture
def digits(monkeypatch):
    rng = np.random.default_rng(0)
    images = np.zeros((60, 28, 28), np.uint8)
    images[:, 4:24, 4:24] = rng.integers(20, 120, (60, 20, 20))
    monkeypatch.setattr(corpus, "digits", lambda: (images, np.arange(60) % 10))
    monkeypatch.setattr(corpus, "versions", lambda _: "stand-in")


def test_fifteen_image_tasks_differ_in_their_labels(digits):
    pytest.importorskip("torch")
    made = [lora_data.image_task(index) for index in range(15)]
    assert len({one.name for one in made}) == 15
    for one in made:
        labels = one.arrays["label"]
        assert one.arrays["pixels"].shape == (60, 3, 56, 56)
        assert set(labels) == set(range(labels.max() + 1))
        assert 1 <= labels.max() < lora_data.CLASSES


def test_labels_say_what_was_done_to_the_image(digits):
    pytest.importorskip("torch")
    tasks = {one.name: one.arrays for one in map(lora_data.image_task, range(15))}
    pixels, label = (tasks["dark on light"][key] for key in ("pixels", "label"))
    corner = pixels[:, 0, 0, 0]
    assert corner[label == 1].min() > corner[label == 0].max()
    pixels, label = (tasks["half hidden"][key] for key in ("pixels", "label"))
    left, right = pixels[:, 0, :, :26].std((1, 2)), pixels[:, 0, :, 30:].std((1, 2))
    assert ((left > right) == (label == 0)).all()
    pixels, label = (tasks["moved sideways"][key] for key in ("pixels", "label"))
    columns = np.arange(56)
    weight = pixels[:, 0].sum(1) - pixels[:, 0].sum(1).min(1, keepdims=True)
    centre = (weight * columns).sum(1) / weight.sum(1)
    assert centre[label == 0].max() < centre[label == 1].min()
    assert centre[label == 1].max() < centre[label == 2].min()


def test_texts_of_fifteen_tasks_have_classes_a_head_can_name(monkeypatch):
    rng = np.random.default_rng(0)
    kinds, returns = ("function", "method", "class"), ("returns", "gives")

    def of(package):
        return tuple(
            corpus.Doc(
                package,
                f"part{i % 3}",
                kinds[i % 3],
                f"f{i}",
                " ".join([returns[i % 2], *("word " * int(rng.integers(30, 90))).split()]),
                i % 4,
            )
            for i in range(90)
        )

    monkeypatch.setattr(corpus, "docs", of)
    words = Words()
    made = [lora_data.text_task(i, lambda t: words(t)[: lora_data.TEXT_TOKENS]) for i in range(15)]
    assert len({one.name for one in made}) == 15
    for one in made:
        labels = one.arrays["label"]
        assert one.arrays["ids"].shape == (len(labels), lora_data.TEXT_TOKENS)
        assert set(labels) == set(range(labels.max() + 1))
        assert 1 <= labels.max() < lora_data.CLASSES
