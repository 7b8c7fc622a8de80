"""Saving: transformers loads a saved folder as the same model, whatever was in the folder before."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launch_kit import free_port

from sublim_jax import weights
from sublim_jax.data import chat
from sublim_jax.errors import UserError
from sublim_jax.models.decoder import decoder
from sublim_jax.weights import config_fields, huggingface

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(3, 60, (2, 12))
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
TEXT = dict(SIZES, vocab_size=60, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SEES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in bfloat16, in several files."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("qwen3", **TEXT))
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size="20kB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def place(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def trained(folder):
    """The model in float32, changed by less than the resolution of bfloat16."""
    settings, params = huggingface.load(folder, dtype=jnp.float32)
    return jax.tree.map(lambda leaf: 1.001 * leaf, params), settings, huggingface.load_config(folder)


def logits(params, settings):
    return np.asarray(jax.jit(decoder(settings).apply)(params, jnp.asarray(TOKENS)))


def of_transformers(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.float().numpy()


def assert_holds(folder, params, settings):
    """Asserts that we and transformers load the saved weights, and that no others are there."""
    expected = logits(params, settings)
    np.testing.assert_allclose(of_transformers(folder), expected, atol=1e-5 * np.abs(expected).max())
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(folder)[1], params)
    index = folder / "model.safetensors.index.json"
    named = json.loads(index.read_text())["weight_map"].values() if index.exists() else ["model.safetensors"]
    weights = {path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".h5", ".msgpack")}
    assert weights == set(named)
    assert not list(folder.glob("*.bin.index.json")) and not list(folder.glob(".*"))


def test_a_model_trained_in_float32_is_not_rounded_to_what_it_came_in(trained, tmp_path):
    huggingface.save(tmp_path, *trained)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    assert_holds(tmp_path, *trained[:2])


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_the_config_names_the_type_that_was_written(trained, tmp_path, name):
    params, settings, config = trained
    half = jax.tree.map(lambda leaf: leaf.astype(name), params)
    huggingface.save(tmp_path, half, settings, config)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == getattr(torch, name)
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(tmp_path)[1], half)
    assert str(config.dtype).removeprefix("torch.") == "bfloat16"  # the caller's object is unchanged


def of_shards(place):
    pass


def of_an_older_format(place):
    for path in place.glob("model*"):
        path.unlink()
    torch.save({}, place / "pytorch_model.bin")


def of_older_shards(place):
    torch.save({}, place / "pytorch_model-00001-of-00002.bin")
    (place / "pytorch_model.bin.index.json").write_text("{}")


def of_many_formats(place):
    shutil.copy(min(place.glob("*.safetensors")), place / "consolidated.00.safetensors")
    for name in ("tf_model.h5", "flax_model.msgpack", "model.fp16.safetensors"):
        (place / name).write_bytes(b"")


@pytest.mark.parametrize("before", [of_shards, of_an_older_format, of_older_shards, of_many_formats])
@pytest.mark.parametrize("shard", [20_000, 4 << 30])
def test_a_saved_model_takes_the_place_of_another(trained, place, monkeypatch, before, shard):
    """In one file or in shards, even as many as before under the same names; other files stay."""
    before(place)
    (place / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(huggingface, "SHARD_BYTES", shard)
    huggingface.save(place, *trained)
    assert (place / "model.safetensors").exists() == (shard > 20_000)
    assert_holds(place, *trained[:2])
    assert (place / "tokenizer.json").read_text() == "{}"


def test_a_file_of_the_users_own_stays(trained, place):
    own = place / "steering.safetensors"
    own.write_bytes(b"mine")
    huggingface.save(place, *trained)
    assert own.read_bytes() == b"mine"


def test_a_replacement_that_is_interrupted_leaves_no_mixture(trained, place, monkeypatch):
    """Of a model in one file: its weights are removed before the first new file is there."""
    huggingface.save(place, *trained)

    def interrupted(path, target):
        assert not (place / "model.safetensors").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        huggingface.save(place, *trained)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        huggingface.load(place)


def test_what_cannot_be_saved_leaves_the_folder_as_it_was(trained, place):
    params, settings, config = trained
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(KeyError):
        huggingface.save(place, {**params, "layers": {}}, settings, config)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_a_file_that_is_linked_to_is_not_written_into(trained, place, tmp_path):
    """The hub's cache has symbolic links to files that other folders link to as well."""
    kept = tmp_path / "kept.safetensors"
    (place / "model.safetensors").symlink_to(kept)
    kept.write_bytes(b"another's")
    huggingface.save(place, *trained)
    assert kept.read_bytes() == b"another's"
    assert_holds(place, *trained[:2])


def test_a_model_is_not_put_where_an_adapter_is(trained, tmp_path):
    """transformers would apply the adapter to it."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter"):
        huggingface.save(tmp_path, *trained)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_a_saved_tokenizer_leaves_nothing_of_another(tiny, place):
    """Neither its template, nor several of them, nor the stop tokens beside it; also where it is saved again."""
    (place / "chat_template.jinja").write_text("another's")
    (place / "additional_chat_templates").mkdir()
    (place / "additional_chat_templates" / "tool.jinja").write_text("another's")
    (place / "generation_config.json").write_text('{"eos_token_id": 5}')
    whole = chat.stop_tokens(tiny.tokenizer, tiny.config)
    several = copy.deepcopy(tiny.tokenizer)
    several.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "tools"}
    for tokenizer in (several, several, tiny.tokenizer):
        weights.save(place, tiny._replace(tokenizer=tokenizer))
        loaded = weights.load(place)
        assert loaded.tokenizer.chat_template == tokenizer.chat_template
        assert chat.stop_tokens(loaded.tokenizer, loaded.config) == whole
    assert not (place / "additional_chat_templates").exists()


@pytest.mark.slow
def test_two_processes_save_what_one_saves(tiny_folder, tmp_path):
    code = (
        "import sys; from sublim_jax import cluster, weights; from sublim_jax.sharding import make_mesh;"
        " cluster.join(sys.argv[1], 2, int(sys.argv[2]));"
        " model = weights.load(sys.argv[3], make_mesh({'replica': 1, 'fsdp': 2, 'tensor': 1}));"
        " weights.save(sys.argv[4], model)"
    )
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    words = [[sys.executable, "-c", code, address, str(n), str(tiny_folder), str(tmp_path)] for n in range(2)]
    both = [subprocess.Popen(given, env=environment) for given in words]
    assert [process.wait() for process in both] == [0, 0]
    jax.tree.map(np.testing.assert_array_equal, weights.load(tmp_path).params, weights.load(tiny_folder).params)


def gemma():
    vision = dict(SEES, patch_size=14)
    text = dict(TEXT, sliding_window=8, final_logit_softcapping=3.0)
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


def llava():
    text, vision = dict(TEXT, model_type="llama"), dict(SEES, patch_size=14, model_type="clip_vision_model")
    return transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=59)


@pytest.mark.parametrize("config", [gemma, llava])
def test_the_text_model_of_one_that_sees_is_saved_by_itself(tmp_path, config):
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config()).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    settings, params = huggingface.load(tmp_path / "whole", dtype=jnp.float32)
    params = jax.tree.map(lambda leaf: 1.001 * leaf, params)
    huggingface.save(tmp_path / "text", params, settings, huggingface.load_config(tmp_path / "whole"))
    assert_holds(tmp_path / "text", params, settings)
    assert config_fields.WRAPPER not in (tmp_path / "text" / "config.json").read_text()
    with pytest.raises(UserError, match="holds a multimodal model, which would be lost"):
        huggingface.save(tmp_path / "whole", params, settings, huggingface.load_config(tmp_path / "whole"))


def test_a_saved_model_has_its_tokenizer_and_its_template(tiny, place):
    """They replace those of another model."""
    weights.save(place, tiny)
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(place)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    tokens = tokenizer.apply_chat_template([{"role": "user", "content": "owls, 123"}], tokenize=True)["input_ids"]
    assert tokens == tiny.tokenizer.apply_chat_template([{"role": "user", "content": "owls, 123"}])["input_ids"]
    with torch.no_grad():
        expected = hf_model(torch.tensor([tokens])).logits.numpy()
    np.testing.assert_allclose(tiny.network.apply(tiny.params, jnp.asarray([tokens])), expected, rtol=1e-4, atol=1e-4)
    assert weights.load(place).tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
