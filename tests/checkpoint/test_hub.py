"""Models of the hub: a cache in the library's own layout, and a small server with its API."""

import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import huggingface_hub.hf_api
import pytest

from jdetune import extraction, pipeline
from jdetune.checkpoint import hub, open_checkpoint
from jdetune.checkpoint.reader import read_tensor
from jdetune.checkpoint.stacks import load_stack
from jdetune.cli import main as program
from jdetune.errors import InputError
from jdetune.verification import verify
from tests import pico

COMMIT, OLD = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put(cache: Path, hub_id: str, folder: Path, commit: str = COMMIT, ref: str = "main") -> Path:
    """Caches a folder as the library does: blobs, links to them in a snapshot, and a ref."""
    root = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for path in (root / "blobs", root / "refs", snapshot):
        path.mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = f"{commit[:4]}{number:060d}"
        (root / "blobs" / blob).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob))
    return snapshot


def put_family(tmp_path, cache, n_models=3):
    family = pico.make(tmp_path / "zoo", n_models)
    ids = [f"org/{path.name}" for path in family.paths]
    for hub_id, path in zip(ids, family.paths, strict=True):
        put(cache, hub_id, path)
    return family, ids


def test_an_id_is_opened_from_the_cache(tmp_path, cache):
    family, ids = put_family(tmp_path, cache)
    found, local = open_checkpoint(ids[1]), open_checkpoint(family.paths[1])
    assert (found.name, found.hub_id, found.revision) == ("org--tune-1", "org/tune-1", COMMIT)
    assert found.source == "org/tune-1"
    assert local.source == str(family.paths[1])
    assert local.hub_id is local.revision is None
    assert found.root.name == COMMIT
    assert (found.root / "model.safetensors").is_symlink()
    assert found.side_files == local.side_files
    name = "encoder.layer.0.query.weight"
    assert (read_tensor(found, name) == read_tensor(local, name)).all()


def test_revisions_are_honoured(tmp_path, cache):
    family = pico.make(tmp_path / "zoo")
    put(cache, "org/tune", family.paths[0])
    put(cache, "org/tune", family.paths[1], OLD, "v1")
    for text, commit in (("@v1", OLD), (f"@{OLD}", OLD), ("@main", COMMIT), ("", COMMIT)):
        assert open_checkpoint(f"org/tune{text}").revision == commit
    with pytest.raises(InputError, match="org/tune@v2: .* in the cache, and HF_HUB_OFFLINE"):
        open_checkpoint("org/tune@v2")


def test_a_local_path_always_wins(tmp_path, cache):
    family, ids = put_family(tmp_path, cache)
    pico.write(tmp_path / "org" / "tune-0", family.models[2])
    assert open_checkpoint(ids[0]).hub_id is None
    assert open_checkpoint(f"{ids[0]}@main").hub_id == ids[0]


@pytest.mark.parametrize(
    "text",
    ["org", "org/a/b", "./org/a", "/org/a", "a/b.safetensors", "a/b.bin", "a/b@../c", "a/.."],
)
def test_what_is_no_id_is_never_looked_up(text, cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail(text))
    with pytest.raises(InputError, match="no such file or directory"):
        open_checkpoint(text)


def test_a_path_object_is_never_an_id(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked"))
    with pytest.raises(InputError, match="no such file or directory"):
        open_checkpoint(Path("org/tune"))


def test_errors_say_what_to_do(tmp_path, cache, monkeypatch):
    with pytest.raises(InputError, match="not .* in the cache, and HF_HUB_OFFLINE .*`hf download`"):
        open_checkpoint("org/nothing")
    snapshot = put(cache, "org/pickled", pico.make(tmp_path / "zoo").paths[0])
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(InputError, match="org/pickled: no safetensors .*save_pretrained"):
        open_checkpoint("org/pickled")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"org/nothing.*pip install 'jdetune\[hub\]'"):
        open_checkpoint("org/nothing")


def test_every_way_in_takes_ids(tmp_path, cache, capsys):
    family, ids = put_family(tmp_path, cache)
    assert len(load_stack(ids)) == 4
    out, teller = tmp_path / "out", pico.truth_teller(family.base)
    report = pipeline.run(ids, out, recover_fn=teller)
    assert [(e["name"], e["path"], e["revision"]) for e in report["inputs"]] == [
        (f"org--tune-{i}", f"org/tune-{i}", COMMIT) for i in range(3)
    ]
    assert (out / "adapters" / "org--tune-2" / "adapter_model.safetensors").exists()
    assert len(verify(out)["models"]) == 3  # found again in the cache, by id and commit
    assert program.main(["inspect", *ids[:2], "org/none"]) == 3
    assert "org/none: no such file or directory here" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_names_its_base_on_the_hub(tmp_path, cache):
    family, ids = put_family(tmp_path, cache)
    put(cache, "org/base", pico.write(tmp_path / "truth", family.base))
    found = extraction.run("org/base@main", ids[:1], tmp_path / "extracted")
    assert found["base_path"] == f"org/base@{COMMIT}"
    config = tmp_path / "extracted" / "adapters" / "org--tune-0" / "adapter_config.json"
    kept = json.loads(config.read_text())
    assert (kept["base_model_name_or_path"], kept["revision"]) == ("org/base", COMMIT)


def test_the_program_finds_the_cache_by_its_environment(tmp_path, cache):
    _, ids = put_family(tmp_path, cache)
    done = subprocess.run(
        [sys.executable, "-m", "jdetune", "recover", *ids, "--dry_run", "--json"],
        env={**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(done.stdout)["models"] == [f"org--tune-{i}" for i in range(3)]


class Hub(http.server.BaseHTTPRequestHandler):
    """A repository of the hub, or an error for every question."""

    folder: Path
    error: tuple[int, str] | None = None
    asked: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if self.error is not None:
            return self.answer(b"{}", self.error[0], {"X-Error-Code": self.error[1]})
        if path.startswith("/api/models/org/tune/revision/"):
            return self.answer(json.dumps({"id": "org/tune", "sha": COMMIT}).encode())
        if path.startswith("/api/models/org/tune/tree/"):
            files = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                for p in self.folder.iterdir()
            ]
            return self.answer(json.dumps(files).encode())
        file = self.folder / path.rpartition("/")[2]
        head = {"X-Repo-Commit": COMMIT, "ETag": f'"{file.name}"'}
        return self.answer(file.read_bytes(), 200, head)

    def answer(self, body, code=200, headers=None):
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(tmp_path, cache, monkeypatch):
    handler = type("Handler", (Hub,), {"folder": pico.make(tmp_path / "zoo").paths[0], "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{running.server_port}"
        for module in (huggingface_hub.constants, huggingface_hub.hf_api):
            monkeypatch.setattr(module, "ENDPOINT", endpoint, raising=False)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()
        yield handler
        huggingface_hub.close_session()
        running.shutdown()
        thread.join()


def test_weights_and_text_are_fetched_but_no_code_and_no_pickle(server):
    for name in ("pytorch_model.bin", "tokenizer.pkl", "consolidated.safetensors"):
        (server.folder / name).write_bytes(b"never")
    found = open_checkpoint("org/tune")
    assert found.revision == COMMIT
    names = sorted(path.name for path in found.root.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]
    never = (".py", ".bin", ".pkl", "consolidated.safetensors")
    assert not any(path.endswith(never) for path in server.asked)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ((404, "RepoNotFound"), "it is not found. Check the spelling; if it is private, log in"),
        ((403, "GatedRepo"), "is gated. Accept its terms .*, log in with `hf auth login`"),
        ((404, "RevisionNotFound"), "has no revision 'v9'"),
        ((418, "Teapot"), "Check the network"),
    ],
)
def test_answers_of_the_hub_become_plain_errors(server, error, words):
    server.error = error
    with pytest.raises(InputError, match=f"org/tune@v9: .*{words}"):
        open_checkpoint("org/tune@v9")


def test_no_network(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def fail(*args, **kwargs):
        cause = OSError("Name or service not known")
        raise huggingface_hub.errors.LocalEntryNotFoundError("long\nstory") from cause

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"cannot be reached \(Name or service not known\)"):
        open_checkpoint("org/tune")


def test_patterns_let_nothing_run():
    from huggingface_hub.utils import filter_repo_objects

    bad = [
        "x.py",
        "a/x.py",
        "pytorch_model.bin",
        "m.pt",
        "m.ckpt",
        "m.pkl",
        "tokenizer.bin",
        "x.sh",
    ]
    bad += ["onnx/model.json", "original/consolidated.00.safetensors"]
    good = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    good += ["unet/diffusion_pytorch_model.safetensors", "1_Pooling/config.json", "merges.txt"]
    good += [
        "tokenizer/vocab.json",
        "chat_template.jinja",
        "spiece.model",
        "vocab.txt",
        "a.tiktoken",
    ]
    kept = filter_repo_objects(
        bad + good, allow_patterns=list(hub.ALLOWED), ignore_patterns=list(hub.REFUSED)
    )
    assert list(kept) == good
