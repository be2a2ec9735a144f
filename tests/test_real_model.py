"""The main job on the real model, loaded again by transformers and PEFT."""

import numpy as np
import pytest

from jdetune import pipeline
from jdetune.cli import demo_data
from tests import real

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT's own
]

SUBJECTS = ["A cat", "The river", "My neighbour", "An old engine", "Rain", "The committee",
            "Nobody", "A small bakery", "The algorithm", "Spring"]  # fmt: skip
VERBS = ["sleeps on the warm roof", "moved slowly to the north", "was never seen again",
         "costs more than last year", "needs a careful repair", "surprised everyone in town",
         "cannot be proved wrong", "smells of fresh bread", "agrees with the measurement",
         "writes a letter every week"]  # fmt: skip


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    models = demo_data.write_merged(real.minilm_folder(), folder / "models")
    report = pipeline.run(models, folder / "out")
    assert report["summary"]["exit_code"] == 0
    return models, folder / "out"


def embed(model, tokenizer, sentences):
    import torch

    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return ((states * mask).sum(1) / mask.sum(1)).double().numpy()


def test_transformers_loads_the_base_and_embeds_as_the_true_model(recovered):
    from transformers import AutoModel, AutoTokenizer

    base = recovered[1] / "base"
    sentences = [f"{subject} {verb}." for subject in SUBJECTS for verb in VERBS]
    tokenizer = AutoTokenizer.from_pretrained(base)
    ours, true, tuned = (
        embed(AutoModel.from_pretrained(path).eval(), tokenizer, sentences)
        for path in (base, real.minilm_folder(), recovered[0][0])
    )

    def distance(a, b):
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        return 1 - cosine

    assert len(sentences) == 100
    assert distance(ours, true).max() < 1e-6
    assert distance(tuned, true).max() > 1e-3  # what was undone is not nothing


def test_peft_loads_every_adapter_and_gives_the_merged_model_back(recovered):
    from peft import PeftModel
    from transformers import AutoModel

    models, out = recovered
    for path in models:
        base = AutoModel.from_pretrained(out / "base")
        loaded = PeftModel.from_pretrained(base, str(out / "adapters" / path.name))
        weights = loaded.merge_and_unload().state_dict()  # pyright: ignore[reportCallIssue]
        truth = AutoModel.from_pretrained(path).state_dict()
        assert set(weights) == set(truth)
        for name, tensor in truth.items():
            stored, again = tensor.numpy().astype(np.float64), weights[name].numpy()
            ulp = np.spacing(np.abs(tensor.numpy()).max(axis=-1, keepdims=True))
            # float32 rounding: of the base, of the factors' product, of their sum
            assert (np.abs(again - stored) <= 2 * ulp).all(), name
