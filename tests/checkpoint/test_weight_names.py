import pytest

from jdetune.checkpoint.weight_names import index_name, weight_names, written_name
from jdetune.errors import InputError


def touch(root, *names):
    root.mkdir(exist_ok=True)
    for name in names:
        (root / name).touch()
    return root


def test_the_plain_file_comes_first(tmp_path):
    stem = "diffusion_pytorch_model"
    assert weight_names(touch(tmp_path))[0] == "model.safetensors"
    touch(tmp_path, f"{stem}.fp16.safetensors")
    assert weight_names(tmp_path) == (
        f"{stem}.fp16.safetensors",
        f"{stem}.safetensors.index.fp16.json",
    )
    touch(tmp_path, f"{stem}.safetensors.index.json")
    assert weight_names(tmp_path) == (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    touch(tmp_path, "model.safetensors")
    assert weight_names(tmp_path)[0] == "model.safetensors"


def test_the_only_variant_is_taken_and_several_are_refused(tmp_path):
    shards = [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    touch(tmp_path, *shards, "model.safetensors.index.fp16.json")
    assert weight_names(tmp_path)[1] == "model.safetensors.index.fp16.json"
    touch(tmp_path, "model.non_ema.safetensors")
    with pytest.raises(InputError, match=r"\(fp16, non_ema\) and no model.safetensors. Keep"):
        weight_names(tmp_path)


@pytest.mark.parametrize(
    ("file", "written"),
    [
        ("model.fp16.safetensors", "model.safetensors"),
        ("model.fp16-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
        ("vae/diffusion_pytorch_model.ema.safetensors", "vae/diffusion_pytorch_model.safetensors"),
        ("vae/other.safetensors", "vae/other.safetensors"),
        ("anything.safetensors", "model.safetensors"),
    ],
)
def test_written_under_the_name_that_loaders_look_for(file, written):
    assert written_name(file, [file]) == written


def test_odd_shards_keep_their_names_and_get_the_usual_index():
    files = ["part-1.safetensors", "part-2.safetensors"]
    assert [written_name(file, files) for file in files] == files
    assert index_name(files[0]) == "model.safetensors.index.json"
