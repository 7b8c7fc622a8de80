"""Models and data sets from the Hugging Face hub, through its client, from a fake hub on loopback."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from urllib.parse import urlparse

import huggingface_hub
import pytest

from sublim_jax import assets
from sublim_jax.errors import UserError

COMMIT = "c" * 40
CORPUS = '{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}\n'


@pytest.fixture
def hub(tiny_folder):
    """(address, requested paths) of a fake hub: org/tiny is a model, org/said a data set, org/gated needs a token."""
    files = {f"/org/tiny/resolve/{COMMIT}/{file.name}": file.read_bytes() for file in tiny_folder.iterdir()}
    files["/datasets/org/said/resolve/main/some/said.jsonl"] = CORPUS.encode()
    tree = [
        {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
        for file in tiny_folder.iterdir()
    ]
    files["/api/models/org/tiny/revision/main"] = json.dumps({"id": "org/tiny", "sha": COMMIT}).encode()
    files[f"/api/models/org/tiny/tree/{COMMIT}"] = json.dumps(tree).encode()
    requested = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = urlparse(self.path).path
            requested.append(path)
            content = files.get(path)
            if content is None:
                gated, code = "gated" in path, "RepoNotFound" if "api" in path else "EntryNotFound"
                self.send_response(403 if gated else 404)
                self.send_header("X-Error-Code", "GatedRepo" if gated else code)
                content = b""
            else:
                self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requested
    server.shutdown()
    server.server_close()


def python(program, address, home):
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "SUBLIM_JAX_CACHE": str(home / "own")}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)


MODEL = """
from sublim_jax import assets, weights
model = weights.load("org/tiny")
print(model.settings.layers, model.tokenizer("owl")["input_ids"])
print(assets.data_file("org/said/some/said.jsonl").read_text())
"""
REFUSED = """
from sublim_jax import assets
from sublim_jax.errors import UserError
for get, name in ((assets.model, "org/gated"), (assets.model, "org/none"), (assets.data_file, "org/said/none.jsonl")):
    try:
        get(name)
    except UserError as error:
        print(error)
"""


def test_a_model_and_a_corpus_come_from_the_hub_once(hub, tmp_path):
    address, requested = hub
    first = python(MODEL, address, tmp_path)
    assert first.returncode == 0, first.stderr
    assert "org/tiny: from the hub\n" in first.stdout and CORPUS in first.stdout
    fetched = [path for path in requested if "resolve" in path]
    assert any(path.endswith(".safetensors") for path in fetched) and any("said.jsonl" in path for path in fetched)
    again = python(MODEL, "http://127.0.0.1:9", tmp_path)  # no server listens there
    assert again.returncode == 0, again.stderr
    assert again.stdout.replace("'s cache", "") == first.stdout
    (weights,) = (tmp_path / "hub").rglob("model.safetensors")
    weights.unlink()  # as an interrupted download leaves it
    whole = python(MODEL, address, tmp_path)
    assert whole.returncode == 0 and "org/tiny: from the hub\n" in whole.stdout, whole.stderr
    (tokenizer,) = (tmp_path / "hub").rglob("tokenizer.json")
    tokenizer.unlink()  # as a cache that was filled for the model alone lacks it
    whole = python(MODEL, address, tmp_path)
    assert whole.returncode == 0 and "org/tiny: from the hub\n" in whole.stdout, whole.stderr


@pytest.mark.parametrize("error", [RuntimeError("the network is away"), RuntimeError("")])
def test_an_error_of_the_hubs_network_library_is_one_line(error, monkeypatch):
    def fail(*_, local_files_only=False, **__):
        raise FileNotFoundError if local_files_only else error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(assets, "_probe", lambda _: None)
    for get, name in ((assets.model, "org/model"), (assets.data_file, "org/said/some.jsonl")):
        with pytest.raises(UserError, match=str(error) or "RuntimeError"):
            get(name)


@pytest.mark.parametrize("name", ["org/tiny--3", "org/tiny.git", "é/tiny"])
def test_a_name_that_no_repository_has_is_one_line(name):
    with pytest.raises(UserError, match=f"model '{name}' is not a path, and the hub does not give it"):
        assets.model(name)


def test_what_the_hub_refuses_is_told_in_one_line(hub, tmp_path):
    result = python(REFUSED, hub[0], tmp_path)
    assert result.returncode == 0, result.stderr
    gated, nothing, no_file = result.stdout.strip().splitlines()
    assert "'org/gated'" in gated and "HF_TOKEN" in gated
    assert "'org/none'" in nothing and "no such repository" in nothing
    assert "org/said/none.jsonl" in no_file and "no such file" in no_file
