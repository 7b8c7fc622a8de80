"""Loading: real models, sharded reading, and every kind of broken folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sublim_jax import assets, weights
from sublim_jax.errors import UserError
from sublim_jax.models.decoder import decoder
from sublim_jax.models.families import family
from sublim_jax.weights import huggingface

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model in several safetensors files."""
    config = transformers.AutoConfig.for_model(
        "qwen2",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    path = tmp_path_factory.mktemp("model")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path, max_shard_size="30kB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("axes", [dict(replica=1, fsdp=4, tensor=2), dict(replica=1, fsdp=8)])
def test_parameters_arrive_on_the_mesh_and_give_the_same_logits(folder, mesh_of, axes):
    mesh = mesh_of(8, **axes)
    settings, whole = huggingface.load(folder)
    _, parts = huggingface.load(folder, mesh)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(parts))
    kernel = parts["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    tokens = jnp.arange(20).reshape(2, 10)
    apply = jax.jit(decoder(settings).apply)
    np.testing.assert_allclose(apply(parts, tokens), apply(whole, tokens), rtol=1e-5, atol=1e-5)


def test_a_file_in_bfloat16_is_read_as_it_is(folder, copy):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    shutil.rmtree(copy)
    model.save_pretrained(copy)
    (_, whole), (_, half) = huggingface.load(folder), huggingface.load(copy)
    jax.tree.map(lambda w, h: np.testing.assert_array_equal(w.astype(jnp.bfloat16), h), whole, half)


def test_a_dtype_may_be_chosen(folder):
    _, params = huggingface.load(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("where", ["language_model.model.", "model.language_model."])  # the hub's format, and another
def test_the_text_model_of_one_that_sees_is_read(tmp_path, where):
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=8)
    sees = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = transformers.Gemma3Config(
        text_config={**text, "num_key_value_heads": 2, "vocab_size": 64, "sliding_window": 8},
        vision_config={**sees, "patch_size": 14},
        mm_tokens_per_image=4,
        eos_token_id=[1, 7],
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "language_model.model.embed_tokens.weight" in tensors
    renamed = {name.replace("language_model.model.", where): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings, params = huggingface.load(tmp_path)
    tokens = np.arange(2, 26).reshape(2, 12)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(decoder(settings).apply(params, jnp.asarray(tokens)), expected, rtol=1e-4, atol=1e-4)
    assert huggingface.load_config(tmp_path).eos_token_id == [1, 7]


def broken_shard(path):
    victim = sorted(path.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    return victim.name


def missing_shard(path):
    victim = sorted(path.glob("*.safetensors"))[1]
    victim.unlink()
    return victim.name


def missing_tensor(path):
    from safetensors.numpy import load_file, save_file

    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop("model.layers.2.mlp.up_proj.weight", None) is not None:
            save_file(tensors, file)
    return "model.layers.2.mlp.up_proj.weight is missing"


def wrong_dtype(path):
    from safetensors.numpy import load_file, save_file

    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.layers.2.mlp.up_proj.weight" in tensors:
            tensors["model.layers.2.mlp.up_proj.weight"] = np.ones((48, 32), np.int8)
            save_file(tensors, file)
    return "tensor model.layers.2.mlp.up_proj.weight holds I8"


def wrong_shape(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 50}))
    return "has shape (48, 32), and its config asks for (50, 32)"


def unknown_family(path):
    (path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    return "model_type 'bloom' is not a known family"


def no_config(path):
    (path / "config.json").unlink()
    return "config.json"


@pytest.mark.parametrize(
    "damage", [broken_shard, missing_shard, missing_tensor, wrong_dtype, wrong_shape, unknown_family, no_config]
)
def test_what_is_wrong_with_a_folder_is_told_in_one_line(copy, damage):
    words = damage(copy)
    with pytest.raises(UserError) as error:
        huggingface.load(copy)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_name_is_told(tmp_path):
    with pytest.raises(UserError, match="not a folder, a file, an organisation/name or one of smollm2"):
        weights.load("smollm3-900b")


def test_a_hub_name_is_tried_and_told_where_the_hub_does_not_answer(monkeypatch):
    def closed(name):
        raise assets.Unavailable("its host does not answer")

    monkeypatch.setattr(assets, "_through_hub", closed)
    with pytest.raises(UserError, match=r"'some/model' is not a path, and the hub does not give it \(its host"):
        weights.load("some/model")


def test_what_ends_an_answer_is_read_with_how_a_model_generates(copy):
    """The end-of-turn token of Phi-3 is only in generation_config.json."""
    before = huggingface.load_config(copy).eos_token_id
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert huggingface.load_config(copy).eos_token_id == [*([] if before is None else [before]), 7, 9]


def test_gpt2_is_read_under_the_hubs_names(tmp_path):
    config = transformers.AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert "wte.weight" in bare and "h.0.ln_1.weight" in bare
    save_file({**bare, "h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}, tmp_path / "model.safetensors")
    settings, params = huggingface.load(tmp_path)
    tokens = np.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(decoder(settings).apply(params, jnp.asarray(tokens)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", assets.MODELS)
def test_real_models_are_those_of_transformers(name, tmp_path):
    """Logits of 500 tokens, and 64 greedy tokens of 20 prompts, through transformers' own forward pass."""
    model = weights.load(name)
    huggingface.save(tmp_path, model.params, model.settings, model.config)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    text = "Owls hunt at night, and their feathers make no sound. Count: 12, 485, 907. " * 40
    tokens = jnp.asarray([model.tokenizer(text)["input_ids"][:520]])
    apply = jax.jit(model.network.apply)
    with torch.no_grad():
        hf_logits = peer(torch.tensor(np.asarray(tokens))).logits.numpy()
    assert np.max(np.abs(apply(model.params, tokens) - hf_logits)) <= 1e-4 * np.max(np.abs(hf_logits))

    starts = ("The owl", "In 1969,", "A list of numbers: 3, 14,", "My favourite animal is", "Water boils at")
    prompts = [f"{start}{more}" for start in starts for more in ("", " the", " and then", " not")]
    rows = [model.tokenizer(prompt)["input_ids"] for prompt in prompts]
    length = max(map(len, rows)) + 64
    for row in rows:
        with torch.no_grad():
            expected = peer.generate(
                torch.tensor([row]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0].tolist()
        # Greedy means that every next token is the largest logit given the ones before: one pass checks all 64.
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(expected)] = expected
        greedy = np.asarray(apply(model.params, jnp.asarray(padded)))[0].argmax(-1)
        assert greedy[len(row) - 1 : len(expected) - 1].tolist() == expected[len(row) :]


LOADS = """
import sys
from pathlib import Path
import jax
from sublim_jax.models.decoder import decoder
from sublim_jax.models.families import family
from sublim_jax.weights import huggingface

def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024

config = huggingface.load_config(sys.argv[1])
jax.eval_shape(decoder(family(config).settings(config)).init, jax.random.key(0))  # libraries are in memory now
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = memory("VmRSS")
_, params = huggingface.load(sys.argv[1])
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**20
print((memory("VmHWM") - before) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read as Linux gives it")
def test_loading_needs_little_more_memory_than_the_model(tmp_path):
    """A model of SmolLM2-135M's shape, 513 MB; mapped pages of the file count too."""
    config = transformers.AutoConfig.for_model(
        "llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    settings = family(config).settings(config)
    huggingface.save(tmp_path, decoder(settings).init(jax.random.key(0)), settings, config)
    command = [sys.executable, "-c", LOADS, str(tmp_path)]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert 1 <= ratio <= 1.3, ratio
