"""Adapters in PEFT's format: read and saved with the same logits as in PEFT, or refused by name."""

import copy
import dataclasses
import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sublim_jax.errors import UserError
from sublim_jax.models import lora
from sublim_jax.models.decoder import decoder
from sublim_jax.models.lora import Lora
from sublim_jax.weights import huggingface, peft

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
hf_peft = pytest.importorskip("peft")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

TOKENS = np.random.default_rng(0).integers(3, 60, (2, 12))
SIZES = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SEES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28)
KINDS = (
    *("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3", "gpt_neox", "gpt2"),
    *("gemma3", "llava", "mistral3"),
)


def config_of(kind):
    vision: dict[str, Any] = {**SEES, "patch_size": 14}
    if kind == "gemma3":
        return transformers.Gemma3Config(
            text_config={**SIZES, "head_dim": 8, "sliding_window": 8}, vision_config=vision, mm_tokens_per_image=4
        )
    if kind in ("llava", "mistral3"):
        inner = {"llava": ("llama", "clip_vision_model"), "mistral3": ("mistral", "pixtral")}[kind]
        text, vision = ({**values, "model_type": model_type} for model_type, values in zip(inner, (SIZES, vision)))
        vision |= {"head_dim": 8} if kind == "mistral3" else {}
        places = dict(image_token_index=59, image_token_id=59, tie_word_embeddings=False)
        return transformers.AutoConfig.for_model(kind, text_config=text, vision_config=vision, **places)
    return transformers.AutoConfig.for_model(kind, **SIZES)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """(transformers' model, its folder, our settings, parameters and config) by model type."""
    made = {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            config = config_of(kind)
            auto = transformers.AutoModelForCausalLM
            if kind in ("llava", "mistral3"):
                auto = transformers.AutoModelForImageTextToText
            model = auto.from_config(config).eval()
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            model = auto.from_pretrained(folder, attn_implementation="eager").eval()
            made[kind] = (model, folder, *huggingface.load(folder), huggingface.load_config(folder))
        return made[kind]

    return make


def trained(model, folder, dtype=torch.float32, **given):
    """Saves a PEFT adapter with random weights; returns its folder."""
    torch.manual_seed(1)
    wrapped = hf_peft.get_peft_model(copy.deepcopy(model), hf_peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **given}))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
            parameter.data = parameter.data.to(dtype)
    wrapped.save_pretrained(folder)
    return folder


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rename(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path)


def with_peft(model, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        wrapped = hf_peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    with torch.no_grad():
        return wrapped(input_ids=torch.tensor(TOKENS)).logits.numpy()


def without(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.numpy()


def assert_same(actual, expected, of=1e-5):
    assert np.max(np.abs(actual - expected)) <= of * np.max(np.abs(expected))


def merged(settings, params, spec, adapters):
    return jax.jit(decoder(settings).apply)(lora.merge(params, adapters, spec.scale), jnp.asarray(TOKENS))


def beside(settings, params, spec, adapters):
    network = decoder(dataclasses.replace(settings, lora=spec))
    return jax.jit(network.apply)(lora.join(params, adapters), jnp.asarray(TOKENS))


def assert_read_as_peft_does(model_of, kind, folder, of=1e-5, compute=merged):
    model, _, settings, params, config = model_of(kind)
    expected = with_peft(model, folder)
    assert np.max(np.abs(expected - without(model))) > 1e-3 * np.max(np.abs(expected))
    spec, adapters = peft.load(folder, settings, config, params)
    assert_same(compute(settings, params, spec, adapters), expected, of)
    return spec


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_all_linear_layers_is_read(model_of, tmp_path, kind):
    """In multimodal models, the adapters of the vision tower do not change the text logits."""
    trained(model_of(kind)[0], tmp_path, target_modules="all-linear")
    assert_read_as_peft_does(model_of, kind, tmp_path)


def noise(spec, settings, params):
    adapters = lora.init(jax.random.key(0), params, spec)
    chosen = np.isin(np.arange(settings.layers), spec.layers or np.arange(settings.layers)).astype(np.float32)
    draw = lambda leaf: leaf + 0.1 * chosen[:, None, None] * jax.random.normal(jax.random.key(1), leaf.shape)  # noqa: E731
    return jax.tree.map(draw, adapters)


@pytest.mark.parametrize("spec", [Lora(4, 8), Lora(2, 3, True, ("query", "out", "down"), (0, 2))])
@pytest.mark.parametrize("kind", KINDS)
def test_our_adapter_moves_the_model_that_the_name_gives(model_of, tmp_path, kind, spec):
    model, base, settings, params, config = model_of(kind)
    adapters = noise(spec, settings, params)
    peft.save(tmp_path, adapters, spec, settings, config, str(base))
    expected = with_peft(model, tmp_path)
    assert_same(merged(settings, params, spec, adapters), expected)
    assert np.max(np.abs(expected - without(model))) > 1e-3 * np.max(np.abs(expected))
    assert_read_as_peft_does(model_of, kind, tmp_path)


HALF = dict(target_modules=["q_proj", "up_proj"])
READ = {  # unusual setting: (PEFT's arguments, edits of adapter_config.json)
    "another scale": (dict(HALF, use_rslora=True, lora_alpha=3), {}),
    "ranks by pattern": (dict(HALF, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}), {}),
    "scales by pattern": (dict(HALF, alpha_pattern={"layers.[01].self_attn.q_proj": 32, "up_proj": 1}), {}),
    "both, rank-stabilised": (
        dict(HALF, use_rslora=True, rank_pattern={"up_proj": 2}, alpha_pattern={"_proj": 99}),
        {},
    ),
    "the first pattern counts": (dict(HALF, alpha_pattern={".*": 1, "q_proj": 32}), {}),
    "layers by number": (dict(HALF, layers_to_transform=[0, 2]), {}),
    "layers by number and by name": (
        dict(target_modules=["q_proj", "model.layers.1.mlp.up_proj"], layers_to_transform=[0]),
        {},
    ),
    "one layer": (dict(HALF, layers_to_transform=1, layers_pattern="layers"), {}),
    "layers by a regular expression": (dict(target_modules=r".*layers\.(1|2)\..*q_proj"), {}),
    "other modules in other layers": (dict(target_modules=r".*layers\.(0\..*q_proj|2\.mlp\.\w+_proj)"), {}),
    "all but some": (dict(target_modules="all-linear", exclude_modules=["k_proj", "layers.0.mlp.up_proj"]), {}),
    "all but a regular expression": (dict(target_modules="all-linear", exclude_modules=r".*layers\.0\..*"), {}),
    "all linear layers, in the file": (dict(target_modules="all-linear"), dict(target_modules="all-linear")),
    "PEFT's usual layers": (dict(target_modules=["q_proj", "v_proj"]), dict(target_modules=None)),
    "gaussian": (dict(HALF, init_lora_weights="gaussian"), {}),
    "orthogonal": (dict(HALF, init_lora_weights="orthogonal"), {}),
    "not initialised": (dict(HALF, init_lora_weights=False), {}),
    "mica": (dict(HALF, init_lora_weights="mica"), {}),
    "eva": (dict(HALF), dict(init_lora_weights="eva", eva_config={"rho": 3.0})),
    "lora_ga": (dict(HALF), dict(init_lora_weights="lora_ga", lora_ga_config={})),
    "pissa": (dict(HALF, init_lora_weights="pissa"), {}),
    "pissa of several ranks": (dict(HALF, init_lora_weights="pissa", use_rslora=True, rank_pattern={"q_proj": 2}), {}),
    "olora": (dict(HALF, init_lora_weights="olora", lora_alpha=2), {}),
    "what is of training": (dict(HALF, lora_dropout=0.5, bias="all"), dict(fan_in_fan_out=True, use_qalora=True)),
    "what is of the file": (dict(HALF, task_type="CAUSAL_LM", revision="main"), dict(runtime_config={"x": 1})),
    "another base by name": (dict(HALF), dict(base_model_name_or_path="some/other", peft_version="0.3.0")),
}


@pytest.mark.parametrize("given, edited", READ.values(), ids=READ)
def test_what_peft_reads_is_read(model_of, tmp_path, given, edited):
    trained(model_of("llama")[0], tmp_path, **given)
    edit(tmp_path, **edited)
    assert_read_as_peft_does(model_of, "llama", tmp_path, of=1e-4 if "init_lora_weights" in given else 1e-5)


@pytest.mark.parametrize("kind, target", [("phi3", "qkv_proj"), ("gpt_neox", "query_key_value"), ("gpt2", "c_attn")])
@pytest.mark.parametrize("start", [True, "pissa"])
def test_one_adapter_of_several_of_our_layers_is_read(model_of, tmp_path, kind, target, start):
    given = dict(target_modules=[target], fan_in_fan_out=kind == "gpt2", init_lora_weights=start)
    trained(model_of(kind)[0], tmp_path, **given)
    assert set(assert_read_as_peft_does(model_of, kind, tmp_path, 1e-4).modules) == {"query", "key", "value"}


@pytest.mark.parametrize("compute", [beside, merged])
def test_an_adapter_in_bfloat16_is_computed_in_float32(model_of, tmp_path, compute):
    trained(model_of("llama")[0], tmp_path, torch.bfloat16, target_modules="all-linear")
    assert_read_as_peft_does(model_of, "llama", tmp_path, compute=compute)


def test_ranks_that_differ_are_computed_beside_the_kernels_too(model_of, tmp_path):
    trained(model_of("llama")[0], tmp_path, **HALF, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3})
    assert assert_read_as_peft_does(model_of, "llama", tmp_path, compute=beside).rank == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace("model.model.language_model.", "model.language_model.model."),
    ],
)
def test_other_names_that_peft_knows_are_read(model_of, tmp_path, change):
    """With the adapter's name in the path, and the names of multimodal models before transformers 4.52."""
    given = dict(alpha_pattern={r"^model\.language_model\.layers\.1\..*": 32})
    trained(model_of("gemma3")[0], tmp_path, target_modules=r".*language_model.*\.(q_proj|up_proj)", **given)
    rename(tmp_path, change)
    assert_read_as_peft_does(model_of, "gemma3", tmp_path)


def test_peft_has_no_usual_layers_of_a_model_with_other_senses(model_of, tmp_path):
    """It has some of gemma3_text, the text model by itself."""
    model, _, settings, params, config = model_of("gemma3")
    trained(model, tmp_path, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    edit(tmp_path, target_modules=None)
    with pytest.raises(ValueError, match="target_modules"):
        hf_peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    with pytest.raises(UserError, match="target_modules is missing"):
        peft.load(tmp_path, settings, config, params)


def test_names_of_the_text_model_alone_are_refused_where_it_stands_in_another(model_of, tmp_path):
    """PEFT warns about them and does not load them."""
    model, _, settings, params, config = model_of("gemma3")
    trained(model, tmp_path, target_modules=["q_proj", "up_proj"], exclude_modules=".*vision.*")
    rename(tmp_path, lambda name: name.replace("model.language_model.", "model."))
    assert_same(
        hf_peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)(torch.tensor(TOKENS)).logits.detach().numpy(),
        without(model),
    )
    with pytest.raises(UserError, match="is a name of the text model alone, and this one is part of a gemma3"):
        peft.load(tmp_path, settings, config, params)


def test_names_inside_a_model_with_other_senses_are_refused_for_a_text_model_that_stands_alone(model_of, tmp_path):
    model, _, settings, params, config = model_of("llama")
    trained(model, tmp_path, target_modules=["q_proj", "up_proj"])
    rename(tmp_path, lambda name: name.replace("model.layers.", "model.language_model.layers."))
    assert_same(
        hf_peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)(torch.tensor(TOKENS)).logits.detach().numpy(),
        without(model),
    )
    with pytest.raises(UserError, match="is a name inside a multimodal model, and this llama stands alone"):
        peft.load(tmp_path, settings, config, params)


# Message: (PEFT's arguments, edits of adapter_config.json).
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "use_dora=True is not supported": (dict(HALF, use_dora=True), {}),
    "lora_bias=True is not": (dict(HALF, lora_bias=True), {}),
    r"modules_to_save=\['lm_head'\] is not": (dict(HALF, modules_to_save=["lm_head"]), {}),
    "trainable_token_indices=.* is not": (dict(HALF, trainable_token_indices=[3, 4]), {}),
    r"layer_replication=\[\[0, 2\], \[1, 3\]\] is not": (dict(HALF, layer_replication=[[0, 2], [1, 3]]), {}),
    r"alora_invocation_tokens=\[5\] is not": (dict(HALF, task_type="CAUSAL_LM", alora_invocation_tokens=[5]), {}),
    "init_lora_weights='pissa_niter_4' changes the base": (dict(HALF, init_lora_weights="pissa_niter_4"), {}),
    "init_lora_weights='loftq' changes the base": (dict(HALF), dict(init_lora_weights="loftq")),
    "init_lora_weights='corda' changes the base": (dict(HALF), dict(init_lora_weights="corda")),
    "init_lora_weights='of tomorrow' changes": (dict(HALF), dict(init_lora_weights="of tomorrow")),
    "v_proj.lora_A.weight is missing, and init_lora_weights=False": (
        dict(HALF),
        dict(init_lora_weights=False, target_modules=["q_proj", "v_proj", "up_proj"]),
    ),
    r"arrow_config=\{'top_k': 3\} is not": (dict(HALF), dict(arrow_config={"top_k": 3})),
    r"target_parameters=\['mlp.up'\] is not": (dict(HALF), dict(target_parameters=["mlp.up"])),
    "megatron_config=.* is not": (dict(HALF), dict(megatron_config={"a": 1})),
    "a_field_of_tomorrow=7 is not": (dict(HALF), dict(a_field_of_tomorrow=7)),
    "peft_type='ADALORA', and only LORA": (dict(HALF), dict(peft_type="ADALORA")),
    "peft_type=None": (dict(HALF), dict(peft_type=None)),
    "r='8': a whole number above 0": (dict(HALF), dict(r="8")),
    "r=0: a whole number above 0": (dict(HALF), dict(r=0)),
    r"lora_alpha=\[8\]: a number": (dict(HALF), dict(lora_alpha=[8])),
    r"rank_pattern=\['q_proj'\]: an object": (dict(HALF), dict(rank_pattern=["q_proj"])),
    r"target_modules: '\(' is not a regular expression": (dict(HALF), dict(target_modules="(")),
    r"layers_pattern: '\(' is not a regular expression": (
        dict(HALF),
        dict(layers_pattern=["("], layers_to_transform=[0]),
    ),
    "layers_to_transform beside target_modules='all-linear'": (
        dict(HALF),
        dict(target_modules="all-linear", layers_to_transform=[0]),
    ),
    r"layers_pattern beside target_modules='.\*q_proj'": (
        dict(HALF),
        dict(target_modules=".*q_proj", layers_pattern="h"),
    ),
    "layers_pattern without layers_to_transform": (dict(HALF), dict(layers_pattern=["layers"])),
    r"rank_pattern: '\(\?i\)Q' is not a regular expression": (dict(HALF), dict(rank_pattern={"(?i)Q": 2})),
    r"lora_alpha=nan: a number": (dict(HALF), dict(lora_alpha=float("nan"))),
    r"lora_alpha=inf: a number": (dict(HALF), dict(lora_alpha=float("inf"))),
    "use_rslora='yes': true or false": (dict(HALF), dict(use_rslora="yes")),
    r"q_proj.lora_A.weight is not of target_modules": (dict(HALF), dict(target_modules=["up_proj", "proj"])),
    r"layers.1.*is not of target_modules": (dict(HALF), dict(layers_to_transform=[0, 2])),
    r"q_proj.lora_A.weight has shape \(4, 32\), and this model with rank 2": (
        dict(HALF),
        dict(rank_pattern={"q.*": 2}),
    ),
    "adapts .*embed_tokens.*; here only linear layers inside llama's layers have adapters": (
        dict(target_modules=["q_proj", "embed_tokens"]),
        {},
    ),
    "adapts .*lm_head.base_layer.weight": (dict(target_modules=["q_proj", "lm_head"]), {}),
    r"velora_config=\{'num_groups': 4\} is not": (dict(HALF), dict(velora_config={"num_groups": 4})),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_computed_is_refused_by_name(model_of, tmp_path, words):
    """In one line, even if the base weights are given."""
    model, _, settings, params, config = model_of("llama")
    given, edited = REFUSED[words]
    trained(model, tmp_path, **given)
    edit(tmp_path, **edited)
    with pytest.raises(UserError, match=words) as error:
        peft.load(tmp_path, settings, config, params)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_biases_that_peft_trained_are_refused_by_name(model_of, tmp_path):
    model, _, settings, params, config = model_of("qwen2")
    trained(model, tmp_path, **HALF, bias="lora_only")
    with pytest.raises(UserError, match=r"adapts base_model.*q_proj.*bias.* merge the adapter"):
        peft.load(tmp_path, settings, config, params)


def test_a_start_that_moved_the_base_needs_the_base(model_of, tmp_path):
    model, _, settings, _, config = model_of("llama")
    trained(model, tmp_path, **HALF, init_lora_weights="pissa")
    with pytest.raises(UserError, match="init_lora_weights='pissa' took a part out of the base"):
        peft.load(tmp_path, settings, config)


def test_olora_of_conv1d_is_refused(model_of, tmp_path):
    model, _, settings, params, config = model_of("gpt2")
    trained(model, tmp_path, target_modules=["attn.c_proj"], fan_in_fan_out=True, init_lora_weights="olora")
    with pytest.raises(UserError, match=r"init_lora_weights='olora' of .*c_proj is not repeated"):
        peft.load(tmp_path, settings, config, params)


def test_an_adapter_of_another_model_is_refused(model_of, tmp_path):
    _, _, settings, params, config = model_of("llama")
    trained(model_of("llama")[0], tmp_path, **HALF)
    wider = dataclasses.replace(settings, mlp_width=64)
    with pytest.raises(UserError, match=r"up_proj.lora_B.weight has shape \(48, 4\), and this .* asks for \(64, 4\)"):
        peft.load(tmp_path, wider, config, params)
    shorter = dataclasses.replace(settings, layers=2)
    with pytest.raises(UserError, match=r"adapts base_model.model.model.layers.2"):
        peft.load(tmp_path, shorter, config, params)


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return "adapter_model.safetensors is damaged"


def without_a_half(folder):
    path = folder / "adapter_model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(path).items() if "layers.1.mlp.up_proj.lora_B" not in name}, path
    )
    return "layers.1.mlp.up_proj.lora_B.weight is missing"


def of_whole_numbers(folder):
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path)
    return "holds int8, no floating-point numbers"


def without_prefix(folder):
    rename(folder, lambda name: name.removeprefix("base_model.model."))
    return "lacks peft's prefix base_model.model."


def empty(folder):
    save_file({}, folder / "adapter_model.safetensors")
    return "has no adapter"


def pickled(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    return "adapter_model.bin is a pickle"


def no_object(folder):
    (folder / "adapter_config.json").write_text("[]")
    return "adapter_config.json holds a list and no JSON object"


def no_json(folder):
    (folder / "adapter_config.json").write_text("<html>")
    return "adapter_config.json is not JSON"


def no_config(folder):
    (folder / "adapter_config.json").unlink()
    return "is not a PEFT adapter: adapter_config.json is missing"


def no_tensors(folder):
    (folder / "adapter_model.safetensors").unlink()
    return "is not a PEFT adapter: adapter_model.safetensors is missing"


def pointers(folder):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 134\n")
    return "adapter_config.json is a pointer of Git LFS"


def pointer(folder):
    (folder / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return "adapter_model.safetensors is a pointer of Git LFS"


DAMAGES = [
    pointers,
    pointer,
    cut,
    without_a_half,
    of_whole_numbers,
    without_prefix,
    empty,
    pickled,
    no_object,
    no_json,
    no_config,
    no_tensors,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_with_an_adapters_folder_is_told_in_one_line(model_of, tmp_path, damage):
    model, _, settings, params, config = model_of("llama")
    words = damage(trained(model, tmp_path, **HALF))
    with pytest.raises(UserError) as error:
        peft.digest(str(tmp_path))
        peft.load(tmp_path, settings, config, params)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_another_adapter_left_in_the_folder_is_gone(model_of, tmp_path):
    model, base, settings, params, config = model_of("llama")
    trained(model, tmp_path, **HALF)
    torch.save({}, tmp_path / "adapter_model.bin")
    spec = Lora(2, 3, modules=("down",))
    adapters = noise(spec, settings, params)
    peft.save(tmp_path, adapters, spec, settings, config, str(base))
    names = {path.name for path in tmp_path.iterdir()} - {"README.md"}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    jax.tree.map(np.testing.assert_array_equal, peft.load(tmp_path, settings, config)[1], adapters)


def test_adapters_are_not_put_where_a_model_is(model_of, tmp_path):
    """transformers would load such a folder as the base with the adapter."""
    _, _, settings, params, config = model_of("llama")
    huggingface.save(tmp_path, params, settings, config)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="holds a model"):
        peft.save(tmp_path, noise(Lora(2, 3), settings, params), Lora(2, 3), settings, config)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_adapter_of_the_unembedding_is_not_lost_in_silence(model_of, tmp_path):
    _, _, settings, params, config = model_of("llama")
    spec = Lora(2, 3, modules=())
    with pytest.raises(UserError, match="an adapter of unembedding does not go into a PEFT folder"):
        peft.save(tmp_path, lora.init(jax.random.key(0), params, spec), spec, settings, config)
    assert not list(tmp_path.iterdir())
