"""Real models of every kind of tensor: recovered, loaded by transformers and PEFT, compared."""

import pytest

from jdetune.verification import verify
from tests import family_zoo as zoo

pytestmark = pytest.mark.interop


def resnet():
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def test_convolutions_of_a_resnet(tmp_path):
    transformers = pytest.importorskip("transformers")
    paths = zoo.merge_family(tmp_path, resnet, target_modules=["convolution"])
    auto = transformers.AutoModelForImageClassification
    report = zoo.round_trip(paths, tmp_path / "out", auto, zoo.knows(tmp_path / "true"))
    assert report["summary"]["exit_code"] == 0
    convs = [e for e in report["tensors"] if e["status"] == "recovered"]
    assert {len(e["shape"]) for e in convs} == {4}
    assert {tuple(e["shape"][2:]) for e in convs} == {(1, 1), (3, 3), (7, 7)}
    result = verify(tmp_path / "out", tmp_path / "true", paths)
    assert not result["failures"]
    assert result["exact_fraction"] == 1.0


def vit():
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    return transformers.ViTForImageClassification(config)


def test_patches_of_a_vit(tmp_path):
    transformers = pytest.importorskip("transformers")
    paths = zoo.merge_family(tmp_path, vit, target_modules=["projection", "q_proj", "fc2"])
    auto = transformers.AutoModelForImageClassification
    report = zoo.round_trip(paths, tmp_path / "out", auto, zoo.knows(tmp_path / "true"))
    assert report["summary"]["exit_code"] == 0
    assert report["summary"]["recovered"] == 3
    assert not verify(tmp_path / "out", models=paths)["failures"]


def convnext():
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.ConvNextConfig(hidden_sizes=[16, 24], depths=[1, 1], num_stages=2)
    return transformers.ConvNextModel(config)


def test_depthwise_kernels_are_kept_whole(tmp_path):
    """PEFT cannot merge into them itself, so they are trained whole here."""
    transformers = pytest.importorskip("transformers")
    paths = zoo.merge_family(
        tmp_path, convnext, target_modules=["pwconv1"], modules_to_save=["dwconv", "layernorm"]
    )
    report = zoo.round_trip(
        paths, tmp_path / "out", transformers.AutoModel, zoo.knows(tmp_path / "true")
    )
    assert {len(e["shape"]) for e in report["tensors"] if e["status"] == "per_model"} == {1}


def gpt2():
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def test_gpt2_with_conv1d_and_tied_embeddings(tmp_path):
    transformers = pytest.importorskip("transformers")
    paths = zoo.merge_family(
        tmp_path, gpt2, target_modules=["c_attn", "c_proj", "wte", "wpe"], fan_in_fan_out=True
    )
    auto = transformers.AutoModelForCausalLM
    report = zoo.round_trip(paths, tmp_path / "out", auto, zoo.knows(tmp_path / "true"))
    assert report["summary"]["exit_code"] == 0
    assert report["summary"]["recovered"] == 8
    assert not verify(tmp_path / "out", models=paths)["failures"]


def bert():
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    return transformers.BertForSequenceClassification(config)


def test_bert_with_embeddings_and_trained_norms(tmp_path):
    """Norms, head and biases are trained whole in every model; the adapters keep them."""
    transformers = pytest.importorskip("transformers")
    paths = zoo.merge_family(
        tmp_path,
        bert,
        target_modules=["query", "word_embeddings"],
        modules_to_save=["LayerNorm", "classifier"],
    )
    auto = transformers.AutoModelForSequenceClassification
    report = zoo.round_trip(paths, tmp_path / "out", auto, zoo.knows(tmp_path / "true"))
    status = zoo.statuses(report)
    assert status["bert.embeddings.LayerNorm.weight"] == "per_model"
    assert status["bert.embeddings.word_embeddings.weight"] == "recovered"
    assert not verify(tmp_path / "out", models=paths)["failures"]


def gpt_oss():
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
    )
    return transformers.GptOssForCausalLM(config)


def test_stacked_experts(tmp_path):
    transformers = pytest.importorskip("transformers")
    paths = zoo.merge_family(
        tmp_path,
        gpt_oss,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    auto = transformers.AutoModelForCausalLM
    report = zoo.round_trip(paths, tmp_path / "out", auto, zoo.knows(tmp_path / "true"))
    assert report["summary"]["exit_code"] == 0
    stack = zoo.entry(report, "model.layers.0.mlp.experts.gate_up_proj")
    assert stack["shape"] == [4, 32, 96]
    assert stack["slices"] == {"count": 4, "lowest_ranks": stack["ranks"], "not_ok": []}
    assert stack["ranks"] == [2, 3, 2]
    assert "experts" in stack["reason"]
    assert not verify(tmp_path / "out", tmp_path / "true", paths)["failures"]


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def llama(vocab_size=64, **config):
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    values = {**LLAMA, "vocab_size": vocab_size, "tie_word_embeddings": True, **config}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))


def test_tied_models_of_which_one_was_untied(tmp_path):
    """Loaded, merged and compared: also logits, which go through the head."""
    transformers = pytest.importorskip("transformers")
    import torch

    paths = zoo.merge_family(tmp_path, llama, target_modules=["q_proj", "embed_tokens"])
    with zoo.quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(paths[1])
        head = torch.nn.Linear(32, 64, bias=False)
        with torch.no_grad():
            update = torch.randn(64, 2) @ torch.randn(2, 32) / 10
            head.weight.copy_(llama().lm_head.weight + update)
        model.lm_head, model.config.tie_word_embeddings = head, False
        model.save_pretrained(paths[1])
    auto = transformers.AutoModelForCausalLM
    report = zoo.round_trip(paths, tmp_path / "out", auto, with_head(tmp_path / "true"))
    assert zoo.statuses(report)["lm_head.weight"] == "recovered"
    assert not verify(tmp_path / "out", models=paths)["failures"]


def with_head(true):
    """Knows that the base's head is its embedding."""
    known = zoo.knows(true)

    def recover(stacks, **options):
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        found = dict(known({n: s for n, s in stacks.items() if n != head}, **options))
        if head in stacks:
            found[head] = known({embedding: stacks[head]})[embedding]
        return found

    return recover


def test_a_resized_vocabulary_with_a_tied_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoModelForCausalLM
    paths = zoo.merge_family(tmp_path, llama, target_modules=["q_proj", "embed_tokens"])
    with zoo.quiet():
        model = auto.from_pretrained(paths[0])
        model.resize_token_embeddings(70, mean_resizing=False)
        model.save_pretrained(paths[0])
    report = zoo.round_trip(
        paths, tmp_path / "out", auto, zoo.knows(tmp_path / "true"), rows={"tune-0": 70}
    )
    assert report["summary"]["exit_code"] == 0
    with zoo.quiet():
        assert auto.from_pretrained(tmp_path / "out" / "base").config.vocab_size == 64


def mixtral():
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.MixtralConfig(vocab_size=64, num_local_experts=4, **LLAMA)
    return transformers.MixtralForCausalLM(config)


def test_experts_stored_one_by_one(tmp_path):
    """Transformers fuses them when it loads, and PEFT fuses the factors."""
    transformers = pytest.importorskip("transformers")
    paths = zoo.merge_family(
        tmp_path,
        mixtral,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    auto = transformers.AutoModelForCausalLM
    report = zoo.round_trip(paths, tmp_path / "out", auto, zoo.knows(tmp_path / "true"))
    assert report["summary"]["recovered"] == 13
