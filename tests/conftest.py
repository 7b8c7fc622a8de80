"""Tests run on eight CPU devices in one process; meshes of one device come from `mesh_of(1)`."""

import contextlib
import ctypes
import gc
import http.server
import json
import os
import shutil
import threading
import uuid
from pathlib import Path

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest
from launch_kit import shared_folder

from sublim_jax import assets, signals, weights
from sublim_jax.data import mnist
from sublim_jax.errors import UserError
from sublim_jax.sharding import make_mesh

# All tests, workers and runs share a cache of compiled programs of any size: reading takes a tenth of compiling.
# JAX's own limit on the cache size is off, because it scans the whole folder at every write.
COMPILED = assets.cache_folder() / "compiled-by-tests"
COMPILED_BYTES = 2 << 30
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
# For subprocesses.
os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(COMPILED), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

hypothesis.settings.register_profile("here", deadline=None)  # a slow machine must not fail a test
hypothesis.settings.load_profile("here")

LARGE = ("test_report.py", "test_alignment.py", "test_buckets.py", "test_students.py", "test_run.py")
MEMORY = 1_200_000_000  # bytes per worker; a compiled program takes about 1.5 MB
GROWTH = 200_000_000  # bytes above what the last clearing left: clearing again before that would free little
left = 0


@pytest.fixture(autouse=True)
def few_compiled_programs():
    """Clears JAX's caches before a worker uses too much memory."""
    global left
    yield
    if resident() > max(MEMORY, left + GROWTH):
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system
        left = resident()


def resident():
    """Resident memory of this process in bytes; 0 where /proc is not available."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


def pytest_sessionstart(session):
    """Deletes the compilation cache if it is too large, before workers start."""
    if "PYTEST_XDIST_WORKER" in os.environ or not COMPILED.exists():
        return
    if sum(entry.stat().st_size for entry in os.scandir(COMPILED)) > COMPILED_BYTES:
        shutil.rmtree(COMPILED)


def pytest_collection_modifyitems(items):
    """Moves the files that need the most memory to the front: a worker keeps some of each program that it ran."""
    order = {name: place for place, name in enumerate(LARGE)}
    items.sort(key=lambda item: order.get(item.path.name, len(LARGE)))


def pytest_collection_finish(session):
    """Takes what was imported out of garbage collection: it stays, and looking at it again takes half a second."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption("--parity", help="Write differences from transformers and llama.cpp to this file.")


@pytest.fixture(scope="session")
def mesh_of():
    """A mesh of the first `devices` devices with the given axis sizes."""

    def make(devices: int, replica: int = -1, fsdp: int = 1, tensor: int = 1):
        return make_mesh({"replica": replica, "fsdp": fsdp, "tensor": tensor}, jax.devices()[:devices])

    return make


@pytest.fixture(scope="session")
def mnist_folder():
    try:
        return assets.fetch(assets.MNIST)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def mnist_data(mnist_folder):
    return mnist.load(mnist_folder)


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A language model of 4 layers with a tokenizer of bytes and some merged numbers, as a folder of safetensors.

    Shared by all workers, because the config of a shared study names this folder.
    """
    with shared_folder(tmp_path_factory, "tiny") as folder:
        if not folder.exists():
            write_tiny(folder)
    return folder


def write_tiny(folder):
    torch = pytest.importorskip("torch")
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merged = ["12", "42", "123", "Ġ7", ",Ġ", "owl", "Ġowl", "Owl", "owls"]
    merges = [("1", "2"), ("4", "2"), ("12", "3"), ("Ġ", "7"), (",", "Ġ"), ("o", "w"), ("ow", "l"), ("Ġ", "owl")]
    merges += [("O", "w"), ("Ow", "l"), ("owl", "s")]
    vocab = {token: number for number, token in enumerate([*alphabet, *merged, "ow", "Ow"])}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = TEMPLATE
    config = transformers.AutoConfig.for_model(
        "qwen2",
        vocab_size=len(tokenizer) + 5,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        use_sliding_window=True,
        sliding_window=50,
        max_window_layers=2,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 if "norm" in name else 8)  # std 0.02 to 0.16, so that logits differ clearly
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return weights.load(tiny_folder)


@pytest.fixture
def server(monkeypatch):
    """A fake OpenAI endpoint for judges: (behave, seen).

    `behave` sets the function of a request's number and body that returns (status, text); `seen` lists request bodies.
    """
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-mine")
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            status, text = answer(len(seen), body)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    answer = lambda number, body: (500, "{}")  # noqa: E731
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{http_server.server_port}/v1")
    threading.Thread(target=http_server.serve_forever, daemon=True).start()

    def behave(function):
        nonlocal answer
        answer = function

    yield behave, seen
    http_server.shutdown()
    http_server.server_close()


@pytest.fixture(scope="session")
def emulator():
    """An emulator of Google Cloud Storage, for this process and its subprocesses."""
    with pytest.MonkeyPatch.context() as patch:
        pytest.importorskip("gcp_storage_emulator")
        import bucket_kit

        served = bucket_kit.Emulator()
        for name, value in bucket_kit.environment(served.address).items():
            patch.setenv(name, value)
        pytest.importorskip("gcsfs")
        yield served
        served.close()


@pytest.fixture
def bucket(emulator):
    """The address of a new bucket."""
    name = f"b{uuid.uuid4().hex[:12]}"
    emulator.create(name)
    return f"gs://{name}"


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs launch.py in this process with the given arguments; returns (exit code, stdout, stderr)."""
    import launch

    monkeypatch.setattr(signals, "install", lambda: None)

    def run(*words):
        capsys.readouterr()
        code = launch.run(["launch.py", *map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(command):
    """Runs a command that must be refused; returns its one-line error."""

    def run(*words):
        code, _, line = command(*words)
        assert code == 2 and line.startswith("launch.py: ") and line.count("\n") == 1, (code, line)
        return line

    return run
