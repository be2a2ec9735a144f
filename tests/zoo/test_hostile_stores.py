"""A store that was damaged or made to harm is refused, and nothing is written."""

import hashlib
import json
import shutil
import struct
import time

import numpy as np
import pytest

from jdetune.errors import InputError, JdetuneError, OutputError, VerificationError
from jdetune.zoo import packing, unpacking
from jdetune.zoo.paths import clash_of, problem_of
from jdetune.zoo.zstd import StoreError, library
from tests import pico
from tests.zoo.zoo_files import files_of, zoo


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    family = zoo(root / "zoo", 3)
    packing.run(family.paths, root / "store", recover_fn=pico.truth_teller(family.base))
    return root / "store"


@pytest.fixture
def store(good, tmp_path):
    return shutil.copytree(good, tmp_path / "store")


def change(store, edit):
    path = store / "manifest.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def refused(store, error: type[JdetuneError] = StoreError, match=None):
    out = store.parent / "out"
    before = {p for p in store.parent.rglob("*") if not p.is_relative_to(store)}
    begin = time.monotonic()
    with pytest.raises(error, match=match) as caught:
        unpacking.run(store, out)
    assert time.monotonic() - begin < 5
    assert caught.value.exit_code in (2, 3, 6)
    assert not out.exists()
    assert {p for p in store.parent.rglob("*") if not p.is_relative_to(store)} == before


def merge_of(content):
    return next(o for o in content["objects"] if o["kind"] == "merge")


BAD_PATHS = [
    *("../evil", "/etc/passwd", "a/../../evil", "a//b", "./a", "", ".", "..", "a/", "C:\\x", "C:x"),
    *("a\\..\\b", "nul", "COM1.txt", "sub/aux.json", "a\x00b", "a\nb", "a.", "a ", " a", "x" * 300),
    *("/".join("a" * 40), "a\u202eb", "\udc80"),
]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_paths_that_leave_the_folder_or_are_reserved(store, path):
    assert problem_of(path)
    change(store, lambda c: c["models"][0]["files"][0].update(path=path))
    refused(store, match="path|JSON")


@pytest.mark.parametrize("name", [*BAD_PATHS, "a/b", ".jdetune", ".hidden", 3, None])
def test_names_of_models_that_are_no_folder(store, name):
    change(store, lambda c: c["models"][0].update(name=name))
    refused(store, match="model name|JSON")


def edits():
    def double_file(c):
        c["models"][0]["files"].append(c["models"][0]["files"][0])

    def file_and_folder(c):
        c["models"][0]["files"][0]["path"] = "config.json/x"

    def double_model(c):
        c["models"].append({**c["models"][0], "name": c["models"][0]["name"].upper()})

    def later(c):
        merge_of(c)["of"] = len(c["objects"]) - 1

    def itself(c):
        merge_of(c)["of"] = c["objects"].index(merge_of(c))

    def on_a_merge(c):
        merges = [i for i, o in enumerate(c["objects"]) if o["kind"] == "merge"]
        c["objects"][merges[1]]["of"] = merges[0]

    return {
        "double_file": double_file,
        "file_and_folder": file_and_folder,
        "double_model": double_model,
        "later": later,
        "itself": itself,
        "on_a_merge": on_a_merge,
        "schema": lambda c: c.update(schema="jdetune.store/2"),
        "no_schema": lambda c: c.pop("schema"),
        "no_models": lambda c: c.pop("models"),
        "models_text": lambda c: c.update(models="x"),
        "size": lambda c: c["models"][0]["files"][0].update(size=10**12),
        "negative": lambda c: c["objects"][0].update(size=-1),
        "float": lambda c: c["objects"][0].update(size=1.5),
        "bool": lambda c: c["objects"][0].update(size=True),
        "huge": lambda c: c["objects"][0].update(size=1 << 60),
        "part": lambda c: c["models"][0]["files"][0].update(parts=[10**6]),
        "blob": lambda c: c["objects"][0].update(blob="../../etc/passwd"),
        "kind": lambda c: c["objects"][0].update(kind="pickle"),
        "list_kind": lambda c: c["objects"][0].update(kind=[]),
        "width": lambda c: c["objects"][0].update(width=3),
        "extra": lambda c: c["objects"][0].update(run="rm"),
        "rank": lambda c: merge_of(c).update(rank=1 << 40),
        "shape": lambda c: merge_of(c).update(shape=[1, 2]),
        "shape_text": lambda c: merge_of(c).update(shape="ab"),
        "dtype": lambda c: merge_of(c).update(dtype="object"),
        "base_dtype": lambda c: merge_of(c).update(base_dtype="float16"),
        "digest": lambda c: c["models"][0]["files"][0].update(sha256="0" * 63),
        "object": lambda c: c["objects"].insert(0, 7),
    }


@pytest.mark.parametrize("edit", edits())
def test_manifests_that_contradict_themselves(store, edit):
    change(store, edits()[edit])
    refused(store)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 200_000,
        '{"schema": "jdetune.store/1", "schema": "jdetune.store/1", "models": [], "objects": []}',
        '{"a": ' + "9" * 5000 + "}",
        "\ud800",
    ],
)
def test_manifests_that_are_no_json(store, text):
    (store / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    refused(store)


def test_a_manifest_too_large_is_not_read(store, monkeypatch):
    monkeypatch.setattr("jdetune.zoo.store.MAX_MANIFEST", 100)
    refused(store, match="larger than")


def test_a_folder_that_is_no_store(tmp_path):
    (tmp_path / "store").mkdir()
    refused(tmp_path / "store", match="no such file")


def blob_of(store, content, item):
    return store / "blobs" / item["blob"][:2] / item["blob"]


def replace_blob(store, pick, data):
    """Puts other bytes into a blob and makes the manifest agree with them."""

    def edit(content):
        item = pick(content)
        digest = hashlib.sha256(data).hexdigest()
        path = store / "blobs" / digest[:2] / digest
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        item.update(blob=digest, stored=len(data))

    change(store, edit)


def largest(content):
    return max((o for o in content["objects"] if o["kind"] == "plain"), key=lambda o: o["size"])


def test_a_bomb_is_refused_before_it_goes_off(store):
    frame = library().ZstdCompressor(level=1).compress(bytes(1 << 26))
    stream = library().ZstdCompressor(level=1).compressobj()
    unsaid = stream.compress(bytes(1 << 26)) + stream.flush()
    for bomb in (frame, unsaid):
        block = b"\x00\x01" + bomb
        replace_blob(store, largest, struct.pack("<I", len(block)) + block)
        refused(store, match="declares")


def test_a_bomb_by_declared_sizes_is_refused_by_the_free_disk(store):
    def edit(content):
        item = next(o for o in content["objects"] if o["size"] == 5000)  # a file of its own
        place = content["objects"].index(item)
        item.update(size=1 << 49)
        for model in content["models"]:
            for file in model["files"]:
                if file["parts"] == [place]:
                    file["size"] = 1 << 49

    change(store, edit)
    refused(store, OutputError, match="are free")


@pytest.mark.parametrize(
    "data",
    [b"", b"\x05", struct.pack("<I", 1 << 31), struct.pack("<I", 3) + b"\x00\x00\x00" + b"more"],
)
def test_blobs_of_wrong_structure(store, data):
    replace_blob(store, largest, data)
    refused(store)
    replace_blob(store, merge_of, data)
    refused(store)


def test_damaged_truncated_missing_and_linked_blobs(store, good):
    content = json.loads((store / "manifest.json").read_text())
    path = blob_of(store, content, largest(content))
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    refused(store, match="cut off")
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(store, VerificationError, match="another digest")
    path.unlink()
    refused(store, match="missing")
    path.symlink_to(good / path.relative_to(store))
    refused(store, match="no regular file")


def test_a_wrong_digest_of_a_file(store):
    change(store, lambda c: c["models"][0]["files"][0].update(sha256="0" * 64))
    refused(store, VerificationError, match="not the digest")


def test_random_damage_never_writes_wrong_bytes(store, good, tmp_path):
    """Any bit of any file: the store is refused, or gives back what it should."""
    rng = np.random.default_rng(0)
    files = sorted(p for p in store.rglob("*") if p.is_file() and p.name != "report.json")
    unpacking.run(good, tmp_path / "whole")
    whole = files_of(tmp_path / "whole")
    outcomes = {"refused": 0, "same": 0}
    for index in range(60):
        path = files[rng.integers(len(files))] if index % 2 else store / "manifest.json"
        data = bytearray(path.read_bytes())
        kept = bytes(data)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        out = tmp_path / f"out-{index}"
        try:
            unpacking.run(store, out)
        except JdetuneError:
            outcomes["refused"] += 1
            assert not out.exists()
        else:  # a name of a model or file may have changed, never bytes
            outcomes["same"] += 1
            assert sorted(files_of(out).values()) == sorted(whole.values())
        path.write_bytes(kept)
    assert outcomes["refused"] > 40


def test_only_what_is_there_can_be_asked_for(store, tmp_path):
    with pytest.raises(InputError, match="holds no model 'x'"):
        unpacking.run(store, tmp_path / "out", ["x"])
    assert not (tmp_path / "out").exists()


def test_clashes():
    assert clash_of(["a", "b/c", "b/d"]) is None
    assert clash_of(["a", "a"]) == "a"
    assert clash_of(["a", "a/b"]) == "a/b"
    assert clash_of(["a/b/c", "a/b"]) == "a/b"
