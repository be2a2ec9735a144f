import json

import numpy as np
import pytest

from jdetune.checkpoint import open_checkpoint, save_safetensors
from jdetune.errors import InputError
from tests import pico

TENSORS = {"a.weight": np.zeros((2, 3), np.float32), "b.weight": np.ones((4,), np.float16)}


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_reads_a_folder_and_a_file(tmp_path):
    folder = pico.write(tmp_path / "m", TENSORS)
    found = open_checkpoint(folder)
    assert found.name == "m"
    assert found.files == ("model.safetensors",)
    assert found.tensors["a.weight"].shape == (2, 3)
    assert found.tensors["b.weight"].dtype == "float16"
    assert found.side_files == ("config.json", "tokenizer.json", "vocab.txt")
    assert found.n_parameters == 10
    assert open_checkpoint(folder / "model.safetensors").tensors == found.tensors


def test_reads_shards(tmp_path):
    found = open_checkpoint(pico.write(tmp_path / "m", TENSORS, shards=2))
    assert set(found.tensors) == set(TENSORS)
    assert len(found.files) == 2
    assert found.tensors["b.weight"].file == found.files[1]


def test_a_matrix_is_a_two_dimensional_float(tmp_path):
    tensors = {**TENSORS, "ids": np.zeros((1, 4), np.int64)}
    found = open_checkpoint(pico.write(tmp_path / "m", tensors)).tensors
    assert [found[n].is_matrix for n in ("a.weight", "b.weight", "ids")] == [True, False, False]


def missing(folder):
    return folder / "nowhere"


def empty(folder):
    (folder / "model.safetensors").unlink()
    return folder


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def pickled_file(folder):
    (folder / "model.safetensors").rename(folder / "model.pt")
    return folder / "model.pt"


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    return folder


def broken_header(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 40)
    return folder


def quantised(folder):
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    return folder


def broken_config(folder):
    (folder / "config.json").write_text("{")
    return folder


def adapter_only(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing, "nowhere: no such file"),
        (empty, "no safetensors weights"),
        (pickled, "pytorch_model.bin: pickled weights.*Convert"),
        (pickled_file, "model.pt: pickled weights.*Convert"),
        (truncated, "model.safetensors: not a whole safetensors file.*again"),
        (broken_header, "not a whole safetensors file"),
        (quantised, "quantization_config"),
        (broken_config, "config.json: not readable as JSON"),
        (adapter_only, "an adapter, not a merged model"),
    ],
)
def test_refuses_with_cause_and_remedy(tmp_path, damage, words):
    folder = pico.write(tmp_path / "m", TENSORS)
    with pytest.raises(InputError, match=words):
        open_checkpoint(damage(folder))


@pytest.mark.parametrize(
    "name",
    ["../evil.safetensors", "/etc/evil.safetensors", "a/b.safetensors", "..", "a\\b.safetensors"],
)
def test_refuses_shards_outside_the_folder(tmp_path, name):
    folder = pico.write(tmp_path / "m", TENSORS, shards=2)
    save_safetensors(tmp_path / "evil.safetensors", {"a.weight": TENSORS["a.weight"]})
    edit_index(folder, lambda weight_map: weight_map.update({"a.weight": name}))
    with pytest.raises(InputError, match="not a plain file name"):
        open_checkpoint(folder)


def test_refuses_an_index_that_does_not_fit(tmp_path):
    folder = pico.write(tmp_path / "m", TENSORS, shards=2)
    first, second = open_checkpoint(folder).files
    edit_index(folder, lambda m: m.update({"c.weight": first}))
    with pytest.raises(InputError, match=r"tensor c\.weight is not in"):
        open_checkpoint(folder)
    edit_index(folder, lambda m: (m.pop("c.weight"), m.pop("b.weight")))
    edit_index(folder, lambda m: m.update({"a.weight": first, "x.weight": second}))
    with pytest.raises(InputError, match=r"x\.weight is not in"):
        open_checkpoint(folder)


def test_refuses_unlisted_duplicated_and_missing(tmp_path):
    folder = pico.write(tmp_path / "m", TENSORS, shards=2)
    first, second = open_checkpoint(folder).files
    extra = {"a.weight": TENSORS["a.weight"], "z.weight": TENSORS["b.weight"]}
    save_safetensors(folder / first, extra)
    with pytest.raises(InputError, match=r"tensor z\.weight of .* is not listed"):
        open_checkpoint(folder)
    save_safetensors(folder / first, TENSORS)
    with pytest.raises(InputError, match=r"tensor b\.weight is also in"):
        open_checkpoint(folder)
    (folder / second).unlink()
    with pytest.raises(InputError, match="this shard is named"):
        open_checkpoint(folder)
