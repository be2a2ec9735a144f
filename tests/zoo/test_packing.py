"""Models go into a store and come back byte for byte."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest

from jdetune.checkpoint import save_safetensors
from jdetune.errors import InputError, OutputError, VerificationError
from jdetune.solvers.known_base import Update
from jdetune.status import Status
from jdetune.zoo import finishing, packing, unpacking, zstd
from jdetune.zoo.packing import Options
from jdetune.zoo.store import read_manifest
from tests import pico
from tests.zoo.zoo_files import files_of, same, unusual_header, zoo


@pytest.fixture(autouse=True)
def no_siblings_as_bases(monkeypatch):
    """Their solver takes seconds to compile; one test has it."""
    monkeypatch.setattr("jdetune.zoo.jobs._TRIES", 0)


def pack(family, out, options=None, **statuses):
    teller = pico.truth_teller(family.base, statuses)
    return packing.run(family.paths, out, options, recover_fn=teller)


def kinds(store):
    return [item.kind for item in read_manifest(store).items]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_file_comes_back(tmp_path, dtype):
    family = zoo(tmp_path / "zoo", 4, dtype)
    unusual_header(family.paths[1] / "model.safetensors")
    report = pack(family, tmp_path / "store")
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == [
        *["blobs", "manifest.json", "report.json"]
    ]
    unpacking.run(tmp_path / "store", tmp_path / "back")
    assert same(family.paths, tmp_path / "back")
    size = sum(len(d) for p in family.paths for d in files_of(p).values())
    assert report["bytes_in"] == size
    on_disk = files_of(tmp_path / "store")
    del on_disk["report.json"]
    assert report["bytes_out"] == sum(map(len, on_disk.values()))
    assert report["bytes_out"] == sum(report["by_kind"].values())


def test_differing_matrices_are_merged_again_and_equal_tensors_kept_once(tmp_path):
    family = zoo(tmp_path / "zoo", 4)
    report = pack(family, tmp_path / "store")
    assert kinds(tmp_path / "store").count("merge") == 4 * 4
    # pooling, attributes, config, tokenizer, vocabulary, code, broken; header; 5 tensors; 4 notes
    assert kinds(tmp_path / "store").count("plain") == 4 + 7 + 1 + 5 + 4
    assert report["residual"]["elements"] == 4 * 4 * 48 * 32
    assert report["others"]["dedup"] < report["others"]["per_file_zstd"]
    assert 0 < report["by_kind"]["factors"] < report["bytes_out"]


def test_models_in_other_shards_and_dtypes(tmp_path):
    family = pico.make(tmp_path / "zoo", 4)
    for index, (shards, dtype) in enumerate([(1, None), (3, None), (2, np.float16)]):
        path, model = family.paths[index], family.models[index]
        (path / "model.safetensors").unlink()
        stored = model if dtype is None else {n: t.astype(dtype) for n, t in model.items()}
        pico.write(path, stored, shards=shards)
    pack(family, tmp_path / "store")
    # one matrix is fine-tuned in no model, and comes in two dtypes
    assert kinds(tmp_path / "store").count("merge") == 16 + 2
    unpacking.run(tmp_path / "store", tmp_path / "back")
    assert same(family.paths, tmp_path / "back")


def test_progress_is_told_in_megabytes(tmp_path):
    family = zoo(tmp_path / "zoo", 3)
    told = []
    packing.run(
        family.paths,
        tmp_path / "store",
        progress=lambda *step: told.append(step),
        recover_fn=pico.truth_teller(family.base),
    )
    for stage in ("read", "pack", "check"):
        assert [s for s in told if s[0] == stage][-1] == (stage, 1, 1)


@pytest.mark.slow
def test_real_recovery_explains_the_models(tmp_path):
    family = pico.make(tmp_path / "zoo", 4)
    report = packing.run(family.paths, tmp_path / "store", Options(polish=False, compare=False))
    assert kinds(tmp_path / "store").count("merge") == 16
    assert report["others"] == {"per_file_zstd": None, "dedup": None, "dedup_zstd": None}
    unpacking.run(tmp_path / "store", tmp_path / "back")
    assert same(family.paths, tmp_path / "back")


def test_one_model(tmp_path):
    family = zoo(tmp_path / "zoo", 1)
    report = packing.run(family.paths, tmp_path / "store")
    assert set(kinds(tmp_path / "store")) == {"plain"}
    assert report["residual"] == {"elements": 0, "bits": None, "entropy_bits": None}
    unpacking.run(tmp_path / "store", tmp_path / "back")
    assert same(family.paths, tmp_path / "back")


def by_svd(base, merged):
    """A stand-in for ``extract_update``: low rank if a few directions hold everything."""
    u, s, vt = np.linalg.svd(merged.astype(np.float64) - base.astype(np.float64))
    rank = int(np.sum(s > 1e-5))
    left = (u[:, :rank] * s[:rank]).astype(np.float32)
    return Update(left, vt[:rank].astype(np.float32), rank < 10, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("extract", [by_svd, pytest.param(None, marks=pytest.mark.slow)])
def test_two_models_and_what_has_no_base_lean_on_a_sibling(tmp_path, monkeypatch, extract):
    monkeypatch.setattr("jdetune.zoo.jobs._TRIES", 2)
    if extract is not None:
        monkeypatch.setattr("jdetune.solvers.known_base.extract_update", extract)
    family = pico.make(tmp_path / "zoo", 2, dtype=np.float32)
    name = "encoder.layer.0.dense.weight"
    family.models[1][name] = (family.models[0][name] * np.float32(1.0001)).astype(np.float32)
    pico.write(family.paths[1], family.models[1])
    packing.run(family.paths, tmp_path / "store")
    # a multiple of the sibling has full rank: its difference is kept in steps
    assert kinds(tmp_path / "store").count("merge") == 4
    assert kinds(tmp_path / "store").count("delta") == 1
    unpacking.run(tmp_path / "store", tmp_path / "back")
    assert same(family.paths, tmp_path / "back")


def test_a_refused_matrix_is_kept_all_the_same(tmp_path):
    family = zoo(tmp_path / "zoo", 3)
    name = "encoder.layer.0.query.weight"
    teller = pico.truth_teller(family.base, {name: Status.SHARED_DIRECTIONS})
    report = packing.run(family.paths, tmp_path / "store", recover_fn=teller)
    assert kinds(tmp_path / "store").count("merge") == 3 * 3
    assert name in report["warnings"][-1]
    unpacking.run(tmp_path / "store", tmp_path / "back")
    assert same(family.paths, tmp_path / "back")


def test_other_models_files_and_duplicates_are_kept(tmp_path):
    family = zoo(tmp_path / "zoo", 3)
    rng = np.random.default_rng(9)
    odd = {
        "half": rng.standard_normal((7, 3)),
        "whole": rng.integers(0, 9, (4, 4, 4)),
        "nan": np.full((48, 32), np.nan, np.float32),
        "scalar": np.array(3, np.float32),
        "eight": rng.standard_normal(40).astype(ml_dtypes.float8_e4m3fn),
    }
    alone = tmp_path / "alone.safetensors"
    save_safetensors(alone, odd)
    shutil.copytree(family.paths[0], tmp_path / "again" / "tune-0")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(rng.bytes(1000))
    paths = [*family.paths, alone, tmp_path / "again" / "tune-0", pickled]
    teller = pico.truth_teller(family.base)
    report = packing.run(paths, tmp_path / "store", recover_fn=teller)
    assert any("pickled" in text for text in report["warnings"])
    names = [m["name"] for m in report["models"]]
    assert names == ["tune-0", "tune-1", "tune-2", "alone", "tune-0-2", "pickled"]
    unpacking.run(tmp_path / "store", tmp_path / "back")
    back = tmp_path / "back"
    assert (back / "alone" / "alone.safetensors").read_bytes() == alone.read_bytes()
    assert files_of(back / "tune-0-2") == files_of(family.paths[0])
    assert files_of(back / "pickled") == files_of(pickled)


def test_non_finite_values_in_a_recovered_matrix_come_back(tmp_path):
    family = zoo(tmp_path / "zoo", 4)
    name = "encoder.layer.0.query.weight"
    model = family.models[2]
    model[name] = model[name].copy()
    model[name].reshape(-1)[:4] = [np.nan, np.inf, -np.inf, -0.0]
    pico.write(family.paths[2], model)
    good = pico.make(tmp_path / "good", 4)
    stacks = {n: np.stack([m[n] for m in good.models]) for n in pico.SHAPES}
    teller = pico.truth_teller(family.base)
    honest = teller(stacks)
    packing.run(
        family.paths, tmp_path / "store", recover_fn=lambda s, **o: {n: honest[n] for n in s}
    )
    assert kinds(tmp_path / "store").count("merge") == 16
    unpacking.run(tmp_path / "store", tmp_path / "back")
    assert same(family.paths, tmp_path / "back")


def test_a_wrong_base_and_wrong_factors_only_cost_bytes(tmp_path):
    family = zoo(tmp_path / "zoo", 3)
    wrong = {n: (v * 1.01).astype(v.dtype) for n, v in family.base.items()}
    teller = pico.truth_teller(wrong)
    packing.run(family.paths, tmp_path / "store", recover_fn=teller)
    unpacking.run(tmp_path / "store", tmp_path / "back")
    assert same(family.paths, tmp_path / "back")


def test_a_decoder_that_errs_is_noticed_before_anything_is_in_place(tmp_path, monkeypatch):
    family = zoo(tmp_path / "zoo", 3)
    honest = finishing.decode

    def erring(items, index, blobs):
        blocks = list(honest(items, index, blobs))
        if items[index].kind == "merge":
            blocks[-1] = blocks[-1][:-1] + bytes([blocks[-1][-1] ^ 1])
        yield from blocks

    monkeypatch.setattr(finishing, "decode", erring)
    with pytest.raises(VerificationError, match="decoding does not give back"):
        pack(family, tmp_path / "store")
    assert [p.name for p in (tmp_path / "store").iterdir()] == [".jdetune"]


def test_files_that_change_meanwhile_are_noticed(tmp_path, monkeypatch):
    family = zoo(tmp_path / "zoo", 3)
    teller = pico.truth_teller(family.base)

    def recover(stacks, **options):
        (family.paths[0] / "late.txt").write_text("new")
        return teller(stacks, **options)

    with pytest.raises(InputError, match="changed while"):
        packing.run(family.paths, tmp_path / "store", recover_fn=recover)
    assert [p.name for p in (tmp_path / "store").iterdir()] == [".jdetune"]


def test_matrices_in_several_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("jdetune.zoo.reading.BLOCK_ELEMENTS", 300)
    monkeypatch.setattr("jdetune.zoo.blocks.BLOCK", 1000)
    family = zoo(tmp_path / "zoo", 3)
    pack(family, tmp_path / "store")
    unpacking.run(tmp_path / "store", tmp_path / "back")
    assert same(family.paths, tmp_path / "back")


def test_what_is_no_model_s_file_is_refused(tmp_path):
    family = zoo(tmp_path / "zoo", 3)
    model, store = family.paths[0], tmp_path / "store"
    with pytest.raises(InputError, match="no such file"):
        packing.run([tmp_path / "nothing"], store)
    with pytest.raises(InputError, match="no model"):
        packing.run([], store)
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="holds no file"):
        packing.run([tmp_path / "bare"], store)
    for name, text in (("CON.txt", "reserved|reserve"), ("a\nb", "character"), ("a ", "space")):
        (model / name).touch()
        with pytest.raises(InputError, match=text):
            packing.run(family.paths, store)
        (model / name).unlink()
    (model / "secret").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="outside of the model"):
        packing.run(family.paths, store)
    (model / "secret").unlink()
    (model / "folder").symlink_to(tmp_path)
    with pytest.raises(InputError, match="link to a folder"):
        packing.run(family.paths, store)
    (model / "folder").unlink()
    os.mkfifo(model / "pipe")
    with pytest.raises(InputError, match="no regular file"):
        packing.run(family.paths, store)
    assert not store.exists()


def test_links_of_a_hub_cache_are_followed(tmp_path):
    family = pico.make(tmp_path / "zoo", 1)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    shutil.copytree(family.paths[0], blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    packing.run([snapshot], tmp_path / "store")
    unpacking.run(tmp_path / "store", tmp_path / "back")
    assert files_of(tmp_path / "back" / "0123") == files_of(family.paths[0])


def test_out_is_refused_where_it_holds_or_is_a_model(tmp_path):
    family = zoo(tmp_path / "zoo", 3)
    for out in (family.paths[0], family.paths[0] / "store", tmp_path):
        with pytest.raises(OutputError):
            pack(family, out)
    pack(family, tmp_path / "store")
    with pytest.raises(OutputError, match="not empty"):
        pack(family, tmp_path / "store")
    report = pack(family, tmp_path / "store", Options(overwrite=True, level=9))
    assert report["level"] == 9
    (tmp_path / "store" / "mine.txt").touch()


def test_without_zstandard_the_message_says_what_to_install(tmp_path, monkeypatch):
    zstd.library.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(InputError, match="pip install"):
        packing.run([tmp_path], tmp_path / "store")
    zstd.library.cache_clear()


def test_the_report_is_json_and_kept(tmp_path):
    family = zoo(tmp_path / "zoo", 3)
    report = pack(family, tmp_path / "store")
    assert json.loads((tmp_path / "store" / "report.json").read_text()) == report
