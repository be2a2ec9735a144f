"""Side files: what goes along with weights, and what never does."""

import json
import os

import numpy as np
import pytest

from jdetune import outfolder, pipeline
from jdetune.checkpoint import open_checkpoint, read_adapter, save_like
from jdetune.checkpoint.reader import read_tensor
from jdetune.errors import InputError
from tests import pico

SMALL = {"a.weight": np.ones((2, 3), np.float32)}
CODE = {"AutoModel": "modeling_evil.Evil"}
NEVER = ("consolidated.safetensors", "consolidated.00.pth", "model.gguf", "pytorch_model.bin")
NEVER += ("tokenizer.model.index.json", "modeling_evil.py", "training_args.bin", "setup.sh")


def with_code(folder):
    """Adds code, config that names it, and files that must stay behind."""
    config = json.loads((folder / "config.json").read_text())
    nested = {"hidden_size": 4, "auto_map": CODE}
    config |= {"auto_map": CODE, "text_config": nested, "limit": [0.0, float("inf")]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": CODE, "pad": "\u00e9"}))
    for name in NEVER[1:5]:
        (folder / name).write_text("{}")
    return folder


def written(folder, tmp_path, trusted):
    found = open_checkpoint(folder, trust_remote_code=trusted)
    save_like(found, tmp_path / "out", lambda name: read_tensor(found, name))
    return tmp_path / "out"


def test_code_and_what_names_it_stay_behind(tmp_path):
    folder = with_code(pico.write(tmp_path / "m", SMALL))
    out = written(folder, tmp_path, trusted=False)
    assert not {p.name for p in out.iterdir()} & set(NEVER)
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (out / name).read_text()
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"] == {"hidden_size": 4}
    assert config["limit"] == [0.0, float("inf")]
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"pad": "\u00e9"}
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_trusted_folder_keeps_both(tmp_path):
    folder = with_code(pico.write(tmp_path / "m", SMALL))
    out = written(folder, tmp_path, trusted=True)
    assert {p.name for p in out.iterdir()} & set(NEVER) == {"modeling_evil.py"}
    for name in ("config.json", "tokenizer_config.json", "modeling_evil.py"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_a_run_says_what_code_was_left_out(tmp_path):
    family = pico.make(tmp_path)
    for path in family.paths:
        with_code(path)
    teller = pico.truth_teller(family.base)
    report = pipeline.run(family.paths, tmp_path / "out", recover_fn=teller)
    said = [text for text in report["warnings"] if "trust_remote_code" in text]
    assert len(said) == 1
    assert "config.json, tokenizer_config.json, modeling_evil.py" in said[0]
    assert "auto_map" not in (tmp_path / "out" / "base" / "config.json").read_text()
    options = pipeline.Options(trust_remote_code=True)
    trusted = pipeline.run(family.paths, tmp_path / "trusted", options, recover_fn=teller)
    assert not [text for text in trusted["warnings"] if "trust_remote_code" in text]
    assert (tmp_path / "trusted" / "base" / "modeling_evil.py").exists()


def test_a_linked_python_file_is_not_followed_out(tmp_path):
    folder = pico.write(tmp_path / "m", SMALL)
    (tmp_path / "secret.py").write_text("secret")
    (folder / "more.py").symlink_to(tmp_path / "secret.py")
    assert open_checkpoint(folder).tensors
    with pytest.raises(InputError, match="out of its folder"):
        open_checkpoint(folder, trust_remote_code=True)


def test_a_huge_config_is_refused_unread(tmp_path):
    folder = pico.write(tmp_path / "m", SMALL)
    os.truncate(folder / "config.json", 2**40)
    with pytest.raises(InputError, match="are read at most"):
        open_checkpoint(folder)


@pytest.mark.parametrize("value", [{"model_type": [1]}, {"architectures": "x"}, {"model_type": 1}])
def test_config_of_other_types_is_refused(tmp_path, value):
    folder = pico.write(tmp_path / "m", SMALL, **value)
    with pytest.raises(InputError, match="model_type is not text"):
        open_checkpoint(folder)


def test_a_pickled_adapter_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_text("")
    with pytest.raises(InputError, match="pickled weights are refused.*Convert"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("key", ["(", "(a|a)*b", "(a+)+", "a*b*c*", "x" * 1001])
def test_patterns_that_do_not_end_are_refused(tmp_path, key):
    config = {"peft_type": "LORA", "alpha_pattern": {key: 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="alpha_pattern is not"):
        read_adapter(tmp_path)


NAMES = ["con", "NUL.x", "..", ".", "\u00e9" * 300, "\u4e2d" * 200, "a\x1b[2J", "a/b", "x. ", "-rf"]
NAMES += ["~", "$HOME", "a\u202eb", "A", "a", "\u212b", "\u00c5", "a\udcffb", "aux"]


def test_names_of_models_are_plain_unique_and_short(tmp_path):
    made = []
    for name in NAMES:
        found = open_checkpoint(pico.write(tmp_path / "m", SMALL))
        made.append(pipeline.dataclasses.replace(found, name=name))
    names = outfolder.model_names(made)
    assert len({name.casefold() for name in names}) == len(NAMES)
    for name in names:
        assert name == outfolder.safe_name(name)
        assert len(name.encode()) <= 110
        assert name.isprintable()
        (tmp_path / "out" / name).mkdir(parents=True)
    assert len(list((tmp_path / "out").iterdir())) == len(NAMES)


def test_models_of_one_basename_get_two_folders(tmp_path):
    family = pico.make(tmp_path / "zoo")
    paths = []
    for k, (path, name) in enumerate(zip(family.paths, ("tune", "TUNE", "tune"), strict=True)):
        (tmp_path / str(k)).mkdir()
        paths.append(path.rename(tmp_path / str(k) / name))
    report = pipeline.run(paths, tmp_path / "out", recover_fn=pico.truth_teller(family.base))
    assert [e["name"] for e in report["inputs"]] == ["tune", "TUNE-2", "tune-3"]
    assert len(list((tmp_path / "out" / "adapters").iterdir())) == 3
