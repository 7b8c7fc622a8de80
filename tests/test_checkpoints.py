"""Unusual folders of safetensors: read as transformers reads them, or refused with the right reason."""

import json
import re
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from config_kit import LAYERS, TOKENS, VOCAB, config_of, difference, edited, expected_logits, logits, random_model
from safetensors.numpy import load_file, save_file

from sublim_jax import weights
from sublim_jax.errors import UserError
from sublim_jax.weights import huggingface
from sublim_jax.weights.replacing import INDEX

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHORT = TOKENS[:, :40]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Random checkpoints by kind and config changes, cached."""
    folders = {}

    def make(kind, **changes):
        key = (kind, str(changes))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(kind)
            random_model(config_of(kind, changes)).save_pretrained(folders[key])
        return folders[key]

    return make


@pytest.fixture
def copy(made, tmp_path):
    return lambda kind="llama", **changes: shutil.copytree(made(kind, **changes), tmp_path / "copy")


def with_tensors(folder, change):
    """Applies `change` to the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refusal(folder):
    with pytest.raises(UserError) as error:
        huggingface.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


# -------------------------------------------------------------------------------------------------------------- heads

EMBEDDINGS = {"llama": "model.embed_tokens.weight", "gpt_neox": "gpt_neox.embed_in.weight", "gpt2": "wte.weight"}


@pytest.mark.parametrize("kind, head", [("llama", "lm_head"), ("gpt_neox", "embed_out"), ("gpt_neox", "lm_head")])
def test_a_head_of_its_own_counts_whatever_the_config_says_of_tying(kind, head, copy):
    folder = copy(kind, tie_word_embeddings=True)
    untied = np.random.default_rng(1).normal(size=(VOCAB, 64)).astype(np.float32)
    with_tensors(folder, lambda tensors: {**tensors, f"{head}.weight": untied})
    assert difference(logits(folder, SHORT), expected_logits(folder, SHORT)) <= 1e-4
    assert huggingface.load_config(folder).tie_word_embeddings is False


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_a_head_that_is_the_embedding_again_stays_tied(kind, copy):
    folder = copy(kind, tie_word_embeddings=True)

    def twice(tensors):
        name = next(name for name in tensors if name.endswith(EMBEDDINGS[kind]))
        return {**tensors, "embed_out.weight" if kind == "gpt_neox" else "lm_head.weight": tensors[name].copy()}

    with_tensors(folder, twice)
    assert huggingface.load(folder)[0].tied
    assert difference(logits(folder, SHORT), expected_logits(folder, SHORT)) <= 1e-4


def test_an_untied_model_without_a_head_is_refused(copy):
    folder = copy("llama", tie_word_embeddings=True)
    assert "lm_head.weight is missing" in refusal(edited(folder, tie_word_embeddings=False))


# --------------------------------------------------------------------------------------------------- tensors not read


@pytest.mark.parametrize(
    "name, shape",
    [
        ("model.layers.0.self_attn.q_proj.bias", (64,)),
        ("model.layers.3.mlp.up_proj.weight", (96, 64)),
        ("model.layers.1.self_attn.sinks", (4,)),
        ("v_head.summary.weight", (1, 64)),
        ("score.weight", (2, 64)),
    ],
)
def test_a_tensor_that_would_not_be_read_is_refused_by_name(name, shape, copy):
    folder = with_tensors(copy(), lambda tensors: {**tensors, name: np.ones(shape, np.float32)})
    assert f"tensor {name} is in the file and not in the model" in refusal(folder)


@pytest.mark.parametrize(
    "kind, name, value",
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(8, np.float32)),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias", np.ones((1, 1, 512, 512), bool)),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias", np.asarray(np.float32(-1e9))),
        ("gpt2", "h.0.attn.bias", np.ones((1, 1, 512, 512), np.uint8)),
    ],
)
def test_tables_and_masks_in_a_file_carry_no_weight(kind, name, value, copy):
    folder = with_tensors(copy(kind), lambda tensors: {**tensors, name: value})
    assert difference(logits(folder, SHORT), expected_logits(folder, SHORT)) <= 1e-4


def test_a_tensor_under_two_names_is_refused(copy):
    name = "model.norm.weight"
    folder = with_tensors(copy(), lambda tensors: {**tensors, f"language_model.{name}": 2 * tensors[name]})
    assert f"holds tensor {name} twice" in refusal(folder)


def test_one_file_goes_before_an_index_as_for_transformers(copy):
    folder = copy()
    (folder / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "other.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with_tensors(folder, lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    assert difference(logits(folder, SHORT), expected_logits(folder, SHORT)) <= 1e-4


# ---------------------------------------------------------------------------------------------------- other than models


def bare(folder):
    return with_tensors(
        folder,
        lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items() if name != "lm_head.weight"},
    )


def no_config(folder, **files):
    (folder / "config.json").unlink()
    for name in files.values():
        (folder / name).write_text("{}")
    return folder


def pointer(path):
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 134\n")
    return path.parent


def index(folder, file):
    """Gives the folder an index that names `file`; the tensors move to the parent folder."""
    weights = folder / "model.safetensors"
    names = dict.fromkeys(load_file(weights), file)
    weights.rename(folder.parent / "other.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    return folder


OTHERS = {
    "a classifier": (
        lambda f: edited(f, architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification is a classifier or reward model",
    ),
    "an embedding model": (lambda f: edited(f, architectures=["LlamaModel"]), "LlamaModel has no language head"),
    "an embedding model's tensors": (bare, "holds a model without its language head"),
    "a pipeline": (lambda f: no_config(f, a="model_index.json"), "has several parts (model_index.json)"),
    "sentence-transformers": (lambda f: no_config(f, a="modules.json"), "has several parts (modules.json)"),
    "an adapter": (lambda f: no_config(f, a="adapter_config.json"), "is an adapter and no model"),
    "another family": (lambda f: edited(f, model_type="t5"), "model_type 't5' is not a known family"),
    "code of its own": (
        lambda f: edited(f, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaFlashForCausalLM"}),
        "auto_map names code of its own, modeling_llama.LlamaFlashForCausalLM",
    ),
    "quantised": (
        lambda f: edited(f, quantization_config={"quant_method": "awq", "bits": 4}),
        "quantization_config={'quant_method': 'awq', 'bits': 4} is of a quantised model, which is not read",
    ),
    "quantised by MLX": (
        lambda f: edited(f, quantization={"group_size": 64, "bits": 4}),
        "quantization={'group_size': 64, 'bits': 4} is of a quantised model, which is not read",
    ),
    "of code alone": (
        lambda f: edited(f, model_type="mine", auto_map={"AutoConfig": "configuration_mine.MineConfig"}),
        "model_type 'mine' is not a known family; it needs code of the folder's own",
    ),
    "read as another": (
        lambda f: edited(f, model_type="mistral", layer_types=["full_attention"] * 3),
        "layer_types=['full_attention', 'full_attention', 'full_attention'] lets transformers read a mistral as a mini",
    ),
    "no size": (lambda f: edited(f, hidden_size=0), "llama: hidden_size=0 is not a size"),
    "no heads": (lambda f: edited(f, num_attention_heads=0), "num_attention_heads=0 is not a size"),
    "of a wrong type": (
        lambda f: edited(f, num_hidden_layers="3"),
        "num_hidden_layers='3' is of a wrong type; it must be a whole number",
    ),
    "of another wrong type": (
        lambda f: edited(f, head_dim=[16]),
        "head_dim=[16] is of a wrong type; it must be a whole number or null",
    ),
    "no dtype": (lambda f: edited(f, dtype="bf-16"), "dtype='bf-16' is not a dtype"),
    "no list of architectures": (lambda f: edited(f, architectures=3), "architectures=3 is not a list of names"),
    "not understood": (
        lambda f: edited(f, a_gain=2.0),
        "a_gain=2.0 is not supported in a config of llama; if it changes nothing, remove it from config.json",
    ),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin").parent,
        "holds pytorch_model.bin and no model.safetensors: a pickle can run code",
    ),
    "a pointer": (lambda f: pointer(f / "model.safetensors"), "model.safetensors is a pointer of Git LFS"),
    "a config's pointer": (lambda f: pointer(f / "config.json"), "config.json is a pointer of Git LFS"),
    "an index of another folder": (
        lambda f: index(f, "../other.safetensors"),
        "names '../other.safetensors', which is",
    ),
    "an index of a whole path": (
        lambda f: index(f, "/etc/passwd"),
        "names '/etc/passwd', which is not a file beside it",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_another_kind_is_refused_with_the_true_reason(name, copy):
    change, words = OTHERS[name]
    assert words in refusal(change(copy()))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_folder_is_never_run(file, tiny_folder, tmp_path, monkeypatch):
    """Not even if standard input answers yes to transformers' prompt."""
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    marker = tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(marker)!r}, 'w')\nMineConfig = MineTokenizer = object\n")
    autos = {"AutoConfig": "mine.MineConfig", "AutoTokenizer": ["mine.MineTokenizer", None]}
    values = json.loads((folder / file).read_text()) | {"auto_map": autos, "tokenizer_class": "MineTokenizer"}
    if file == "config.json":
        values["model_type"] = "mine"
    (folder / file).write_text(json.dumps(values))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    try:
        weights.load(folder)
    except UserError as error:
        assert file == "config.json" and "which is never run" in str(error) and "\n" not in str(error)
    assert not marker.exists()


def test_an_adapter_beside_a_model_is_not_passed_over(copy):
    folder = copy()
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter beside a model" in refusal(folder)


BROKEN = {
    "a page": "<!DOCTYPE html><html></html>",
    "nothing": "",
    "a list": "[1, 2]",
    "a number": "3",
    "half": '{"a": ',
}


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", INDEX])
def test_a_file_that_is_no_json_object_is_named(file, content, copy):
    folder = copy()
    if file == INDEX:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / file).write_text(BROKEN[content])
    assert file in refusal(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_an_index_that_says_nothing_is_named(index, copy):
    folder = copy()
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps(index))
    assert "has no weight_map that says where tensors are" in refusal(folder)


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_cannot_be_read_is_told(file, content, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    (folder / file).write_text(BROKEN[content])
    with pytest.raises(UserError, match="has no tokenizer that transformers reads"):
        weights.load(folder)


@pytest.mark.parametrize(
    "stated, generating, expected",
    [
        ({"eos_token_id": 5}, {"eos_token_id": [6, 7]}, [5, 6, 7]),
        ({}, {"eos_token_id": 7}, 7),  # and not llama's own, 2, which transformers' generate does not read either
        ({}, {}, 2),
        ({"eos_token_id": 5}, {}, 5),
    ],
)
def test_stop_tokens_are_those_that_are_stated(stated, generating, expected, copy):
    folder = copy()
    config = json.loads((folder / "config.json").read_text())
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config | stated))
    (folder / "generation_config.json").write_text(json.dumps(generating))
    assert huggingface.load_config(folder).eos_token_id == expected


@pytest.mark.parametrize("kind", ["llama", "olmo2", "gpt_neox", "gpt2"])
def test_a_window_that_only_caches_read_is_refused(kind, copy):
    """A forward pass sees everything, and `generate` forgets what is outside of the window."""
    folder = edited(copy(kind), sliding_window=16)
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        whole, tokens = model(torch.tensor(TOKENS[:, :40])).logits[0, -1], torch.tensor(TOKENS[:, :40])
        cache = None
        for position in range(40):
            step = model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
    assert difference(step.logits[0, -1].numpy(), whole.numpy()) > 1e-2
    assert "sliding_window=16 is not supported" in refusal(folder)
    for harmless in ({"layer_types": ["full_attention"] * LAYERS}, {"sliding_window": 512, "layer_types": None}):
        edited(folder, **harmless)
        assert difference(logits(folder, TOKENS), expected_logits(folder, TOKENS)) <= 1e-4


@pytest.mark.parametrize("stops", ["two", [1, "two"], 1.5, {"a": 1}])
def test_stop_tokens_that_are_none_are_told(stops, copy):
    folder = copy()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    assert "is not a token" in refusal(folder)


def test_what_configs_of_the_hub_hold_besides_is_harmless(copy):
    more = {
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "rope_interleaved": False,
        "is_llama_config": True,
        "pretraining_tp": 2,
        "use_cache": False,
        "torch_dtype": "bfloat16",
        "unsloth_version": "2025.1",
        "temperature": 0.6,
        "attention_dropout": 0.1,
        "_name_or_path": "somewhere/else",
        "task_specific_params": {"text-generation": {"do_sample": True}},
        "full_attn_mod": 1,
        "sliding_window": 16,  # beside layers that are all full
        "partial_rotary_factor": 0.5,
        "layer_types": ["full_attention"] * 3,
        "tokenizer_class": "GPT2Tokenizer",
        "processor_class": "SomeProcessor",
        "author": "someone",
        "license": "apache-2.0",
        "created_date": "2024-01-01",
        "neftune_noise_alpha": 5.0,
        "num_nextn_predict_layers": 0,
        "seq_length": 8192,
        "use_cache_quantization": True,
        "auto_map": {
            "AutoTokenizer": ["Xenova/gpt-4o", None],
            "AutoProcessor": "processing_mine.MineProcessor",
            "AutoConfig": "configuration_llama.LlamaConfig",
            "AutoModel": "org/name--modeling_llama.LlamaModel",
        },
    }
    folder = edited(copy(), **more)
    assert difference(logits(folder, SHORT), expected_logits(folder, SHORT)) <= 1e-4


@pytest.mark.parametrize(
    "kind, more",
    [
        ("gpt2", {"n_special": 3, "predict_special_tokens": True, "output_past": True}),
        ("gemma2", {"sliding_window_size": 24}),
    ],
)
def test_what_a_familys_older_configs_hold_is_harmless(kind, more, copy):
    folder = edited(copy(kind), **more)
    assert difference(logits(folder, SHORT), expected_logits(folder, SHORT)) <= 1e-4


def test_another_window_of_the_same_name_is_refused(copy):
    assert "sliding_window_size=8 is not supported" in refusal(edited(copy("gemma2"), sliding_window_size=8))


# ------------------------------------------------------------------------------------------ models with a vision tower

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
}
SEES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WRAPPED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({"sliding_window": 8}, {}, {"mm_tokens_per_image": 4}),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", "projection_dim": 16}, {}),
    "mistral3": ({"model_type": "mistral", "sliding_window": None}, {"model_type": "pixtral", "head_dim": 8}, {}),
}


def wrapped(kind, folder, text=None, **outer):
    inner, vision, whole = WRAPPED[kind]
    config = transformers.AutoConfig.for_model(
        kind, text_config={**TEXT, **inner, **(text or {})}, vision_config={**SEES, **vision}, **whole, **outer
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def multimodal_logits(folder):
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(SHORT)).logits.numpy()


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_models_tying_goes_before_its_text_models(kind, tied, tmp_path):
    folder = wrapped(kind, tmp_path, {"tie_word_embeddings": not tied}, tie_word_embeddings=tied)
    assert difference(logits(folder, SHORT), multimodal_logits(folder)) <= 1e-4


@pytest.mark.parametrize("kind, text", [("gemma3", {}), ("llava", {"model_type": "gemma2", "head_dim": 8})])
def test_a_whole_model_does_not_cap_its_logits(kind, text, tmp_path):
    """The text model by itself does, and is therefore saved without its cap."""
    folder = wrapped(kind, tmp_path / "whole", {**text, "final_logit_softcapping": 0.5})
    expected = multimodal_logits(folder)
    assert np.max(np.abs(expected)) > 0.5 and difference(logits(folder, SHORT), expected) <= 1e-4
    settings, params = huggingface.load(folder, dtype=jnp.float32)
    huggingface.save(tmp_path / "text", params, settings, huggingface.load_config(folder))
    assert difference(expected_logits(tmp_path / "text", SHORT), expected) <= 1e-4


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_configs_that_see_hold_besides_is_harmless(kind, tmp_path):
    folder = edited(wrapped(kind, tmp_path), ignore_index=-100, vocab_size=VOCAB + 3, processor_class="MineProcessor")
    assert difference(logits(folder, SHORT), multimodal_logits(folder)) <= 1e-4


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"is_causal": False}, "is_causal=False is not supported in a config of gemma3"),
        ({"sliding_window": 4}, "sliding_window=4 is not supported in a config of gemma3"),
        ({"text_config": {**TEXT, "quantization_config": {"bits": 4}}}, "is of a quantised model"),
        ({"text_config": {**TEXT, "hidden_size": "32"}}, "hidden_size='32' is of a wrong type; it must be a whole"),
        ({"model_type": "qwen2_5_vl"}, "qwen2_5_vl"),
        (
            {"text_config": {**TEXT, "use_bidirectional_attention": True}},
            "use_bidirectional_attention=True is not supported",
        ),
    ],
)
def test_a_field_of_either_part_is_refused_by_name(changes, words, tmp_path):
    assert re.search(re.escape(words), refusal(edited(wrapped("gemma3", tmp_path), **changes)))
