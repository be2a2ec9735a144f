"""``--adapter_format`` of recover and extract, from the command line to what verify makes of it."""

import json

import numpy as np
import pytest

from jdetune import solving
from jdetune.checkpoint import load_adapter, open_checkpoint, save_safetensors, stream
from jdetune.cli import main as program
from tests import pico, pico_pipeline

#: Names of the original layout for pico's matrices of one shape.
NAMES = {
    f"encoder.layer.{i}.{word}.weight": (
        f"model.diffusion_model.input_blocks.1.1.transformer_blocks.{i}.attn1.{new}.weight"
    )
    for i in (0, 1)
    for word, new in (("query", "to_q"), ("value", "to_v"))
}


@pytest.fixture
def solved(monkeypatch):
    """Stands in for the solver, which is no subject here; called with the base's tensors."""

    def know(base):
        teller = pico.truth_teller(base)
        stand_in = lambda stacks, max_memory=None, **options: teller(stacks, **options)  # noqa: E731
        monkeypatch.setattr(solving, "default_recover", stand_in)

    return know


def call(capsys, *argv):
    code = program.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def single_files(root, solved):
    """The models of a pico family as files in the original layout, and the base."""
    family = pico.make(root / "folders")
    paths = []
    for i, tensors in enumerate([family.base, *family.models]):
        named = {new: tensors[old] for old, new in NAMES.items()}
        paths.append(root / f"sd-{i}.safetensors")
        save_safetensors(paths[-1], named, {"modelspec.title": f"sd {i}"})
    solved({new: family.base[old] for old, new in NAMES.items()})
    return paths[0], paths[1:]


def test_a_single_stable_diffusion_file_gets_kohya_files(tmp_path, capsys, solved):
    base, models = single_files(tmp_path, solved)
    out = tmp_path / "out"
    code, text, err = call(capsys, "recover", *models, f"--out={out}")
    assert (code, err) == (0, "")
    assert f"adapters  {out}/adapters/{{sd-1, sd-2, sd-3}} (kohya)" in text
    arrays, header = stream.open_tensors(out / "adapters" / "sd-1" / "sd-1.safetensors")
    assert header["ss_network_dim"] == "2"
    assert len(arrays) == 3 * len(NAMES)
    assert stream.open_tensors(out / "base" / "model.safetensors")[1]["modelspec.title"] == "sd 1"
    code, text, _ = call(capsys, "verify", out, f"--reference={base}", "--max_error=-14")
    assert code == 0, text
    code, _, err = call(capsys, "recover", *models, "--out=x", "--adapter_format=peft")
    assert code == 2
    assert "--adapter_format=peft" in err
    assert "Choose diffusers, kohya or none" in err


def test_none_leaves_the_adapters_out(tmp_path, capsys, solved):
    base, models = single_files(tmp_path, solved)
    out = tmp_path / "out"
    code, text, _ = call(capsys, "recover", *models, f"--out={out}", "--adapter_format=none")
    assert code == 0
    assert "adapters  " not in text
    assert f"next: jdetune verify {out} --reference=BASE" in text
    assert {p.name for p in out.iterdir()} == {"base", "report.html", "report.json"}
    code, _, err = call(capsys, "verify", out)
    assert code == 3
    assert "wrote no adapters (--adapter_format=none)" in err
    assert call(capsys, "verify", out, f"--reference={base}")[0] == 0


@pytest.mark.parametrize("form", ["kohya", "none"])
def test_extract_takes_the_flag(tmp_path, capsys, solved, form):
    base, models = single_files(tmp_path, solved)
    out = tmp_path / "out"
    flags = [f"--base={base}", f"--out={out}", f"--adapter_format={form}"]
    code, text, _ = call(capsys, "extract", models[0], *flags)
    report = json.loads((out / "report.json").read_text())
    assert code == 0
    assert report["adapter_format"] == form
    assert report["summary"]["extracted"] == len(NAMES)
    assert report["inputs"][0]["written"] is (form == "kohya")
    assert (out / "adapters" / "sd-1" / "sd-1.safetensors").exists() is (form == "kohya")
    assert ("no adapter was written" in text) is (form == "none")


def test_plain_models_keep_peft(tmp_path, capsys, solved):
    family = pico.make(tmp_path)
    solved(family.base)
    out = tmp_path / "out"
    code, _, err = call(capsys, "recover", *family.paths, f"--out={out}", "--adapter_format=kohya")
    assert code == 2
    assert "no names for the modules of this kind of model. Choose peft or none." in err
    assert not out.exists()
    flags = ["--dry_run", "--adapter_format=kohya"]
    assert call(capsys, "recover", *family.paths, *flags)[0] == 2
    assert call(capsys, "recover", *family.paths, f"--out={out}")[0] == 0
    assert set(load_adapter(out / "adapters" / "tune-0")) == set(family.factors[0])


def test_a_pipeline_folder_from_end_to_end(tmp_path, capsys, solved):
    truth, models = pico_pipeline.family(tmp_path)
    solved(truth)
    reference = pico_pipeline.write(tmp_path / "truth", truth)
    out = tmp_path / "out"
    code, text, _ = call(capsys, "recover", *models, f"--out={out}")
    assert code == 0
    assert "3 of 3 differing matrices recovered" in text
    assert "(diffusers)" in text
    found = open_checkpoint(out / "base")
    assert set(found.tensors) == set(truth)
    assert np.isin(list(found.side_files), ["model_index.json", "vae/config.json"]).sum() == 2
    code, text, _ = call(capsys, "verify", out, f"--reference={reference}", "--max_error=-14")
    assert code == 0, text
    assert call(capsys, "inspect", *models)[0] == 0
