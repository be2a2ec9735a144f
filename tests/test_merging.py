"""Merges by every rule: bit for bit PEFT's with its GEMM, and what is refused."""

import json
import warnings

import ml_dtypes
import numpy as np
import pytest

from jdetune import merging, metrics
from jdetune.checkpoint import (
    LoraUpdate,
    merge_peft,
    open_checkpoint,
    read_adapter,
    read_tensor,
    save_safetensors,
    write_adapter,
)
from jdetune.checkpoint.reader import raw_bytes
from jdetune.cli import main as program
from jdetune.errors import InputError
from tests import pico

NAME = "encoder.layer.0.query.weight"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture
def family(tmp_path):
    made = pico.make(tmp_path, n_models=1)
    pico.write(tmp_path / "base", made.base, shards=3)
    model = open_checkpoint(made.paths[0])
    write_adapter(tmp_path / "adapter", made.factors[0], model, ("classifier.bias",))
    return made


def call(capsys, *argv):
    code = program.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def merge(capsys, tmp_path, *flags):
    paths = (tmp_path / "base", tmp_path / "adapter", f"--out={tmp_path}/out")
    return call(capsys, "merge", *paths, *flags)


def edit(tmp_path, tensors=None, **config):
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if tensors:
        source = open_checkpoint(tmp_path / "adapter" / "adapter_model.safetensors")
        old = {name: read_tensor(source, name) for name in source.tensors}
        kept = {n: a for n, a in {**old, **tensors}.items() if a is not None}
        save_safetensors(tmp_path / "adapter" / "adapter_model.safetensors", kept)


def test_the_model_comes_back_with_the_shards_of_the_base(tmp_path, family, capsys):
    code, text, err = merge(capsys, tmp_path)
    assert (code, err) == (0, "")
    assert "4 matrices merged by R1" in text
    base, merged = (open_checkpoint(tmp_path / p) for p in ("base", "out/merged"))
    assert {n: i.file for n, i in merged.tensors.items()} == {
        n: i.file for n, i in base.tensors.items()
    }
    for name, array in family.models[0].items():
        np.testing.assert_array_equal(read_tensor(merged, name), array)
    assert merge(capsys, tmp_path)[0] == 2
    code, text, _ = merge(capsys, tmp_path, "--overwrite", "--json", "--rounding=r2")
    assert code == 0
    assert json.loads(text) == json.loads((tmp_path / "out" / "report.json").read_text())


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_the_base_comes_along_only_where_it_is_trusted(tmp_path, family, capsys, trusted):
    pico.write(tmp_path / "base", family.base, shards=3, auto_map={"AutoModel": "evil.Model"})
    _, text, _ = merge(capsys, tmp_path, *(["--trust_remote_code"] if trusted else []))
    out = tmp_path / "out" / "merged"
    assert (out / "modeling_evil.py").exists() == trusted
    assert ("auto_map" in json.loads((out / "config.json").read_text())) == trusted
    note = "note: code of base was left out (config.json, modeling_evil.py): the merged model has"
    assert (note in text) != trusted


def test_usage(tmp_path, family, capsys):
    assert call(capsys, "merge", tmp_path / "base", "--out=x")[0] == 2
    assert call(capsys, "merge", tmp_path / "base", tmp_path / "adapter")[0] == 2
    assert merge(capsys, tmp_path, "--rounding=r4")[0] == 2
    argv = ("merge", tmp_path / "base", tmp_path / "adapter", f"--out={tmp_path}/adapter")
    assert call(capsys, *argv)[0] == 2


def test_rules_round_once_twice_and_thrice():
    base = np.array([[1.0]], ml_dtypes.bfloat16)
    zero, one = np.zeros((1, 1), ml_dtypes.bfloat16), np.array([[1.0]], np.float32)
    # 1 + 2^-8 is a tie of bfloat16 (spacing 2^-7); the sum lies above it, the rounded update on it
    up = np.array([[2.0**-8 * (1 + 2.0**-10)]], np.float32)
    assert merge_peft(base, up, one, rounding="R1")[0, 0] == 1 + 2.0**-7
    assert merge_peft(base, up, one, rounding="R2")[0, 0] == 1
    # scaled by 3: rounded before, 3 * 2^-9 exactly; not rounded before, a little more
    part = np.array([[2.0**-9 * (1 + 2.0**-9)]], np.float32)
    thrice = {rule: merge_peft(zero, part, one, 3.0, rounding=rule) for rule in ("R2", "R3")}
    assert thrice["R3"][0, 0] == 3 * 2.0**-9
    assert thrice["R2"][0, 0] == 3 * 2.0**-9
    part = np.array([[2.0**-9 * (1 + 2.0**-8 * 0.9)]], np.float32)
    thrice = {rule: merge_peft(zero, part, one, 1.5, rounding=rule) for rule in ("R2", "R3")}
    assert thrice["R3"][0, 0] == 1.5 * 2.0**-9
    assert thrice["R2"][0, 0] > 1.5 * 2.0**-9


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"peft_type": "LOHA"}, "only plain LoRA"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path, family, capsys, config, words):
    edit(tmp_path, **config)
    code, _, err = merge(capsys, tmp_path)
    assert code == 3
    assert words in err
    assert not (tmp_path / "out").exists()


KEY = "base_model.model.encoder.layer.0.query.lora_"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({KEY + "magnitude_vector": np.ones(48, np.float32)}, "not understood"),
        ({KEY + "B.bias": np.ones(48, np.float32)}, "not understood"),
        ({KEY + "A.weight": None}, "only one of its factors"),
        ({KEY + "A.weight": np.ones((2, 3, 1, 1), np.float32)}, "not [rank, in]"),
        ({KEY + "A.weight": np.ones((2, 9), np.float32)}, "Give the adapter's own base"),
        ({"base_model.model.classifier.weight": np.ones((9, 32), np.float32)}, "own base"),
        ({"base_model.model.head.lora_A.weight": np.ones((2, 3), np.float32)}, "only one"),
        ({"base_model.model.other.weight": np.ones((2, 3), np.float32)}, "no such tensor"),
        ({KEY + "A.weight": np.full((2, 32), np.nan, np.float32)}, "NaN or infinity after"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, family, capsys, tensors, words):
    edit(tmp_path, tensors)
    code, _, err = merge(capsys, tmp_path)
    assert code == 3
    assert words in err
    assert not (tmp_path / "out" / "merged").exists()


def test_sensitive_elements_enclose_every_order_of_sums():
    rng = np.random.default_rng(0)
    update = LoraUpdate(*pico.pair(rng, (64, 48), 32), 0.7)
    base = (0.05 * rng.standard_normal((64, 48))).astype(np.float32)

    def shuffled(seed):
        order = np.random.default_rng(seed).permutation(32)

        def product(b, a):
            total = np.zeros((64, 48), np.float32)
            for k in order:
                total += b[:, k, None] * a[k]
            return total

        return merge_peft(base, update.left, update.right, 0.7, product=product)

    mask, far = merging.sensitive(base, update, "R1")
    every = np.stack([shuffled(seed) for seed in range(20)])
    moved = (every != every[0]).any(axis=0)
    assert moved.any()
    assert not (moved & ~mask).any()
    assert far >= 1
    half = base.astype(np.float16)
    # twice the bound is 0.03 units of a usual float16 element, and more of small ones
    assert merging.sensitive(half, update, "R1")[0].mean() < 0.1 < mask.mean()


def peft_model(tmp_path, kind, dtype, **config):
    """A tiny model, its PEFT adapter with random factors, saved; and the wrapped model."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = transformers.GPT2Config(
            n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=16
        )
        model = transformers.GPT2LMHeadModel(shape)
    else:
        shape = transformers.BertConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=16,
        )
        model = transformers.BertForSequenceClassification(shape)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "base")
    settings = {"r": 8, "lora_alpha": 6, "init_lora_weights": False, **config}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():  # a head that was trained
        for name, value in tuned.named_parameters():
            if "modules_to_save" in name:
                value += 0.25
    tuned.save_pretrained(tmp_path / "adapter")
    return tuned


def torch_product(left, right):
    """The product as PEFT computes it, in its orientation and with its GEMM."""
    import torch

    product = torch.from_numpy(np.ascontiguousarray(left)) @ torch.from_numpy(
        np.ascontiguousarray(right)
    )
    return product.numpy()


def turned_product(left, right):
    return torch_product(right.T, left.T).T


CASES = {
    "plain": ("bert", {"target_modules": ["query", "dense"]}),
    "rslora": ("bert", {"target_modules": ["query"], "use_rslora": True}),
    "patterns": (
        "bert",
        {
            "target_modules": ["query", "word_embeddings"],
            "rank_pattern": {"layer.1.attention.self.query": 3},
            "alpha_pattern": {"layer.1.attention.self.query": 5},
        },
    ),
    "head": ("bert", {"target_modules": ["value"], "modules_to_save": ["classifier"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
}


@pytest.mark.interop
@pytest.mark.parametrize("safe", [False, True], ids=["r1", "r2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_merges_are_those_of_peft(tmp_path, capsys, case, dtype, safe):
    kind, config = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft_model(tmp_path, kind, dtype, **config)
        theirs = tuned.merge_and_unload(safe_merge=safe).state_dict()
    rule = "r2" if safe else "r1"
    code, _, err = merge(capsys, tmp_path, f"--rounding={rule}")
    assert code == 0, err
    ours, base = (open_checkpoint(tmp_path / p) for p in ("out/merged", "base"))
    changes = merging.plan_changes(base, read_adapter(tmp_path / "adapter"), rule.upper())
    assert len([n for n in changes if changes[n].update]) >= 2
    equal = total = 0
    for name in base.tensors:
        expected = theirs[name].float().numpy().astype(DTYPES[dtype])
        found = read_tensor(ours, name)
        update = changes[name].update if name in changes else None
        if update is None:
            np.testing.assert_array_equal(raw_bytes(found), raw_bytes(expected), err_msg=name)
            continue
        before = read_tensor(base, name)
        # embeddings and Conv1D are products turned around in PEFT
        turned = "embeddings" in name or kind == "gpt2"
        same_gemm = merge_peft(
            before,
            update.left,
            update.right,
            update.scaling,
            rounding=changes[name].rounding,
            product=turned_product if turned else torch_product,
        )
        np.testing.assert_array_equal(raw_bytes(same_gemm), raw_bytes(expected), err_msg=name)
        mask, most = merging.sensitive(before, update, changes[name].rounding)
        assert not ((found != expected) & ~mask).any(), name
        assert metrics.ulp_distance(found, expected).max() <= most, name
        assert (found != before).mean() > 0.5
        equal += int((found == expected).sum())
        total += found.size
    with capsys.disabled():
        print(f"\n{case} {dtype} {rule}: {equal / total:.6f} of {total} elements equal PEFT's")
    # in float32 how many differ, within the bound, is a matter of the processor's order of sums
    assert equal / total > (0.5 if dtype == "float32" else 0.9)


def test_a_square_module_of_unknown_orientation_is_refused(tmp_path):
    made = pico.make(tmp_path, n_models=1)
    model = open_checkpoint(made.paths[0])
    square = "encoder.layer.0.dense.weight"
    pair = pico.pair(np.random.default_rng(0), (24, 24), 2)
    write_adapter(tmp_path / "adapter", {square: pair}, model)
    edit(tmp_path, fan_in_fan_out=True)
    with pytest.raises(InputError, match="does not say how"):
        merging.plan_changes(model, read_adapter(tmp_path / "adapter"), "R1")
