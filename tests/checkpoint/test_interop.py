"""What we write loads with transformers and PEFT and merges to what it should."""

import warnings

import numpy as np
import pytest

from jdetune.checkpoint import (
    load_adapter,
    merge_peft,
    open_checkpoint,
    read_tensor,
    save_like,
    write_adapter,
)
from tests import pico

pytestmark = pytest.mark.interop


@pytest.fixture(autouse=True)
def _quiet():
    """Other libraries' deprecations are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def tiny_bert(folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(folder)
    return model


def load_merged(base_folder, adapter_folder):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(base_folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = peft.PeftModel.from_pretrained(base, adapter_folder)
    return model.merge_and_unload()


def base_and_adapter(tmp_path):
    """A base we wrote, and an adapter with mixed ranks, an embedding and a head of its own."""
    tiny_bert(tmp_path / "template")
    template = open_checkpoint(tmp_path / "template")
    save_like(
        template,
        tmp_path / "base",
        lambda n: None if n == "classifier.bias" else read_tensor(template, n),
    )
    rng = np.random.default_rng(0)
    ranks = {
        "bert.encoder.layer.0.attention.self.query.weight": 3,
        "bert.encoder.layer.1.attention.self.query.weight": 2,
        "bert.encoder.layer.1.attention.self.value.weight": 1,
        "bert.encoder.layer.0.intermediate.dense.weight": 4,
        "bert.embeddings.word_embeddings.weight": 2,
    }
    given = {n: pico.pair(rng, template.tensors[n].shape, r) for n, r in ranks.items()}
    write_adapter(tmp_path / "adapter", given, template, per_model=("classifier.bias",))
    return template, given


def test_peft_loads_and_merges_by_our_rule(tmp_path):
    template, given = base_and_adapter(tmp_path)
    merged = load_merged(tmp_path / "base", tmp_path / "adapter").state_dict()
    for name in template.tensors:
        expected = read_tensor(template, name)
        found = merged[name].numpy()
        if name in given:
            assert np.any(found != expected), name
            expected = merge_peft(expected, *given[name])
            # the order of sums of at most 4 products of 0.01: far below an ulp of 0.1
            np.testing.assert_allclose(found, expected, rtol=0, atol=1.5e-8, err_msg=name)
        else:
            np.testing.assert_array_equal(found, expected, err_msg=name)


def test_we_read_what_peft_writes(tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    model = tiny_bert(tmp_path / "template")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["query", "word_embeddings"],
        rank_pattern={"layer.1.attention.self.query": 2},
        alpha_pattern={"layer.1.attention.self.query": 5},
        init_lora_weights=False,
    )
    tuned = peft.get_peft_model(model, config)
    tuned.save_pretrained(tmp_path / "adapter")
    before = {k: v.clone().numpy() for k, v in model.state_dict().items()}
    found = load_adapter(tmp_path / "adapter")
    template = open_checkpoint(tmp_path / "template")
    merged = tuned.merge_and_unload().state_dict()
    assert len(found) == 3
    for name, (left, right) in found.items():
        again = merge_peft(read_tensor(template, name), left, right)
        np.testing.assert_allclose(merged[name].numpy(), again, atol=1e-6, err_msg=name)
        assert np.abs(again - read_tensor(template, name)).max() > 1e-3
    assert before
    assert torch is not None


def test_gpt2_conv1d_merges_by_our_rule(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    template = open_checkpoint(tmp_path / "base")
    name = next(n for n in template.tensors if n.endswith("attn.c_attn.weight"))
    pair = pico.pair(np.random.default_rng(0), template.tensors[name].shape, 3)
    write_adapter(tmp_path / "adapter", {name: pair}, template)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    expected = merge_peft(read_tensor(template, name), *pair)
    found = merged.state_dict()[name].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.5e-8)
