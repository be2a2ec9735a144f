"""What may lie where a file is expected: pipes, links, and files that change under the reader."""

import os
import socket

import numpy as np
import pytest

from jdetune.checkpoint import files, open_checkpoint, read_tensor
from jdetune.checkpoint.reader import digest, tensor_digest
from jdetune.checkpoint.shapes import read_stack
from jdetune.errors import InputError
from tests import pico

BIG = {"a.weight": np.linspace(0, 1, 3_000_000, dtype=np.float32).reshape(3000, 1000)}
SMALL = {"a.weight": np.ones((2, 3), np.float32), "b.weight": np.zeros(4, np.float16)}


def folder(path):
    path.mkdir()


def pipe(path):
    os.mkfifo(path)


def sock(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the full path is too long for a socket
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def device(path):
    path.symlink_to("/dev/zero")


KINDS = {"a folder": folder, "a pipe": pipe, "a socket": sock, "out of its folder": device}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("words", KINDS)
@pytest.mark.parametrize("shards", [1, 2])
def test_what_is_no_file_is_refused_at_once(tmp_path, words, shards):
    model = pico.write(tmp_path / "m", SMALL, shards=shards)
    file = model / open_checkpoint(model).files[0]
    file.unlink()
    KINDS[words](file)
    with pytest.raises(InputError, match=words):
        open_checkpoint(model)


@pytest.mark.parametrize("make", [pipe, device, folder])
def test_a_config_that_is_no_file_does_no_harm(tmp_path, make):
    model = pico.write(tmp_path / "m", SMALL)
    (model / "config.json").unlink()
    make(model / "config.json")
    assert open_checkpoint(model).config == {}


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "no\0name", "n" * 5000])
def test_a_model_that_is_no_file_is_refused(path):
    with pytest.raises(InputError):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_out_of_the_folder_are_refused_but_not_those_of_the_hubs_cache(tmp_path, name):
    model = pico.write(tmp_path / "models--a--b" / "snapshots" / "0f", SMALL)
    blob = tmp_path / "models--a--b" / "blobs" / "1234"
    blob.parent.mkdir()
    (model / name).rename(blob)
    (model / name).symlink_to("../../blobs/1234")
    assert set(open_checkpoint(model).tensors) == set(SMALL)
    (model / "inside").mkdir()
    secret = tmp_path / "secret"
    blob.rename(secret)
    (model / name).unlink()
    (model / name).symlink_to(secret)
    with pytest.raises(InputError, match="out of its folder"):
        open_checkpoint(model)


def test_links_in_a_circle_and_into_nothing_are_refused(tmp_path):
    model = pico.write(tmp_path / "m", SMALL, shards=2)
    file = model / open_checkpoint(model).files[1]
    file.unlink()
    file.symlink_to(file.name)
    with pytest.raises(InputError, match="cannot be read"):
        open_checkpoint(model)
    file.unlink()
    file.symlink_to("nothing")
    with pytest.raises(InputError, match="is not there"):
        open_checkpoint(model)


def test_a_linked_model_is_read(tmp_path):
    model = pico.write(tmp_path / "m", SMALL)
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "one.safetensors").symlink_to(model / "model.safetensors")
    assert set(open_checkpoint(tmp_path / "link").tensors) == set(SMALL)
    assert set(open_checkpoint(tmp_path / "one.safetensors").tensors) == set(SMALL)


def shrink(path):
    os.truncate(path, path.stat().st_size // 2)


def vanish(path):
    path.unlink()


def rewrite(path):
    data = bytearray(path.read_bytes())
    path.unlink()
    path.write_bytes(data)


def touch(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("read", [read_tensor, tensor_digest, lambda c, n: read_stack([c], n)])
@pytest.mark.parametrize("harm", [shrink, vanish, rewrite, touch])
def test_a_file_that_changes_after_its_header_was_read_is_refused(tmp_path, harm, read):
    model = pico.write(tmp_path / "m", BIG)
    found = open_checkpoint(model)
    harm(model / "model.safetensors")
    with pytest.raises(InputError, match="changed while it was used|vanished"):
        read(found, "a.weight")


@pytest.mark.parametrize("read", [read_tensor, tensor_digest])
def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_signal(
    tmp_path, monkeypatch, read
):
    model = pico.write(tmp_path / "m", BIG)
    found, honest = open_checkpoint(model), files.Source.fill

    def shrinking(self, start, data):
        shrink(model / "model.safetensors")
        return honest(self, start, data)

    monkeypatch.setattr(files.Source, "fill", shrinking)
    with pytest.raises(InputError, match="shrank while it was read"):
        read(found, "a.weight")


@pytest.mark.parametrize("read", [read_tensor, tensor_digest, lambda c, n: read_stack([c], n)])
@pytest.mark.parametrize("longer", [0, 1])
def test_a_file_that_changes_in_place_while_it_is_read_is_refused(
    tmp_path, monkeypatch, read, longer
):
    model = pico.write(tmp_path / "m", BIG)
    found, honest = open_checkpoint(model), files.Source.fill

    def changing(self, start, data):
        honest(self, start, data)
        with (model / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?" * (1 + longer))

    monkeypatch.setattr(files.Source, "fill", changing)
    with pytest.raises(InputError, match="changed while it was used"):
        read(found, "a.weight")


def test_a_disk_that_fails_is_an_input_error(tmp_path, monkeypatch):
    found = open_checkpoint(pico.write(tmp_path / "m", SMALL))

    class Failing:
        def seek(self, start):
            raise OSError(5, "Input/output error")

        def close(self):
            pass

    monkeypatch.setattr(
        files.os, "fdopen", lambda descriptor, *_: os.close(descriptor) or Failing()
    )
    with pytest.raises(InputError, match="cannot be read.*Check the disk"):
        read_tensor(found, "a.weight")


def test_digests_in_pieces_are_those_of_the_whole(tmp_path):
    assert BIG["a.weight"].nbytes > 2 * files.CHUNK
    half = {"a.weight": BIG["a.weight"].astype(np.float16)}
    one = open_checkpoint(pico.write(tmp_path / "one", BIG))
    two = open_checkpoint(pico.write(tmp_path / "two", half))
    assert tensor_digest(one, "a.weight") == digest(BIG["a.weight"])
    wide = half["a.weight"].astype(np.float32)
    assert tensor_digest(two, "a.weight", widen=True) == digest(wide)
    stack = read_stack([one, two], "a.weight")
    np.testing.assert_array_equal(stack, np.stack([BIG["a.weight"], wide]))
