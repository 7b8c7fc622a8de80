"""GGUF files: logits equal those of llama.cpp and transformers, or the file is refused by name."""

import datetime
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_kit import SIZE, TOKENIZER, Llama, fields_of, peer, real, tensors_of, torch, transformers, write
from hypothesis import given
from hypothesis import strategies as st
from pages_kit import write_section

from sublim_jax import weights
from sublim_jax.errors import UserError
from sublim_jax.weights import huggingface
from sublim_jax.weights.gguf_config import ARCHITECTURES, config_of
from sublim_jax.weights.gguf_file import open_model

TEXT = np.random.default_rng(0).integers(3, SIZE - 1, (1, 300))
LENGTHS = (1, 7, 40, 150, 300)


class Case(NamedTuple):
    """A transformers model and its GGUF file.

    Attributes:
      architecture: GGUF's name.
      config: changes of the config.
      fields: further fields of the file.
      tensors: further tensors of the file.
      zero: suffixes of parameters that are zero; zero biases are not in the file.
    """

    architecture: str
    config: dict[str, Any]
    fields: dict[str, Any]
    tensors: Mapping[str, Any] = MappingProxyType({})
    zero: tuple[str, ...] = ()


def rope(kind="default", theta=10_000.0, **more):
    return {"rope_type": kind, "rope_theta": theta, **more}


def llama(parameters, fields, tensors=None):
    return Case("llama", {"rope_parameters": parameters}, fields, tensors or {})


def gemma(fields, slides=(), local=10_000.0, full=None, **config):
    """Gemma 3 with sliding windows in the layers `slides` and two rotary tables; the config's defaults without them."""
    base: dict[str, Any] = {
        "num_hidden_layers": 7,
        "sliding_window": 64,
        "query_pre_attn_scalar": 16,
        "tie_word_embeddings": True,
    }
    if slides:
        base["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
        base["num_hidden_layers"] = len(slides)
    if full:
        base["rope_parameters"] = {"sliding_attention": rope(theta=local), "full_attention": full}
        fields = {"rope.freq_base": full["rope_theta"], **fields}
    return Case("gemma3", {**base, **config}, fields)


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=128)
YARN_FIELDS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
TURNS = 128 * 10_000.0 ** -(np.arange(0, 16, 2) / 16) / (2 * np.pi)
DIVISORS = 1 / (1 / 8 + 7 / 8 * np.clip((TURNS - 1) / 3, 0, 1))  # Llama 3's
FREQUENCIES = {"rope_freqs.weight": DIVISORS.astype(np.float32)}
DIVIDED_TWICE = rope(
    "longrope",
    short_factor=(2 * DIVISORS).tolist(),
    long_factor=(2 * DIVISORS).tolist(),
    factor=1.0,
    attention_factor=1.0,
    original_max_position_embeddings=512,
)
BIASES = {"attention_bias": True, "mlp_bias": True}
MILLION = {"rope.freq_base": 1e6}
WINDOW = {"attention.sliding_window": 64}

# Vision fields of a multimodal model, in a file of its language model alone.
IMAGES = {"mm.tokens_per_image": 256, "vision.block_count": 27, "vision.attention.layer_norm_epsilon": 1e-6}
CASES = {
    "llama": Case("llama", {}, {}),
    "llama (biases)": Case("llama", BIASES, {}),
    "llama (some biases)": Case("llama", BIASES, {}, zero=("o_proj.bias", "k_proj.bias", "up_proj.bias")),
    "llama (tied)": Case("llama", {"tie_word_embeddings": True}, {}),
    "llama (scale without a type)": llama(rope("linear", factor=4.0), {"rope.scaling.factor": 4.0}),
    "llama (scale by its older name)": llama(rope("linear", factor=4.0), {"rope.scale_linear": 4.0}),
    "llama (scale of type none)": llama(rope(), {"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}),
    "llama (yarn)": llama(YARN, YARN_FIELDS),
    "llama 3 (divided frequencies)": llama(rope("llama3", **LLAMA3), {}, FREQUENCIES),
    "llama (divided and scaled)": llama(DIVIDED_TWICE, {"rope.scaling.factor": 2.0}, FREQUENCIES),
    "qwen2": Case("qwen2", {"rope_parameters": rope(theta=1e6)}, MILLION),
    "qwen2 (yarn)": Case("qwen2", {"rope_parameters": YARN}, YARN_FIELDS),
    "qwen2 (no biases, tied)": Case("qwen2", {"tie_word_embeddings": True}, {}, zero=("bias",)),
    "qwen3": Case("qwen3", {"head_dim": 24, "rope_parameters": rope(theta=1e6)}, MILLION),
    "qwen3 (biases)": Case("qwen3", {"attention_bias": True}, {}, zero=("o_proj.bias",)),
    "gemma3": gemma({**WINDOW, **MILLION}),
    "gemma3 (62 layers)": gemma({**WINDOW, **MILLION}, num_hidden_layers=62, head_dim=8),
    "gemma3 (every third layer, yarn)": gemma(
        {**WINDOW, **YARN_FIELDS, "attention.sliding_window_pattern": 3}, (1, 1, 0, 1, 1, 0, 1), full=YARN
    ),
    "gemma3 (listed layers, scaled, capped)": gemma(
        {
            **WINDOW,
            "attention.sliding_window_pattern": [True, False, True, True, False],
            "rope.freq_base_swa": 700.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
            "final_logit_softcapping": 3.0,
        },
        (1, 0, 1, 1, 0),
        local=700.0,
        full=rope("linear", factor=8.0),
        final_logit_softcapping=3.0,
    ),
    "gemma3 (no windows, untied)": gemma(IMAGES, (0, 0, 0), full=rope(), tie_word_embeddings=False),
}
SMOLLM2 = {  # its first layers
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
}
TOLERANCE = {"llama": 1e-5, "qwen2": 1e-5, "qwen3": 1e-5, "gemma3": 2e-3}  # llama.cpp looks GELU up in half precision


@pytest.fixture(scope="session")
def differences(request):
    """Largest differences by (case, reference); `--parity=FILE` writes them as a table."""
    measured: dict[tuple[str, ...], Any] = {}
    yield measured
    if file := request.config.getoption("parity"):
        lines = [
            f"`make parity`, {datetime.date.today()}: transformers {transformers.__version__}, llama.cpp of xllamacpp "
            f"{importlib.metadata.version('xllamacpp')}, float32. Small models with random parameters, 300 tokens; "
            "largest absolute difference over the largest absolute logit. llama.cpp looks Gemma's GELU up in a table "
            "of half precision.",
            "",
            "| architecture and setting | llama.cpp | transformers |",
            "|---|---|---|",
        ]
        for name in CASES:
            cells = [measured.get((name, reference), np.nan) for reference in ("llama.cpp", "transformers")]
            lines.append(f"| {name} | {' | '.join(f'{cell:.0e}' for cell in cells)} |")
        write_section(Path(file), "## GGUF files", lines)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(transformers model, GGUF file, our model read from it) by the name of a case."""
    kept = {}

    def make(name):
        if name not in kept:
            case = CASES[name]
            model = peer(ARCHITECTURES[case.architecture].kind, case.zero, **case.config)
            fields = {f"{case.architecture}.{field}": value for field, value in case.fields.items()}
            path = write(
                tmp_path_factory.mktemp("gguf") / "model.gguf",
                case.architecture,
                {**fields_of(model, case.architecture), **fields},
                {**tensors_of(model, case.architecture), **case.tensors},
            )
            kept[name] = model, path, weights.load(path)
        return kept[name]

    return make


@pytest.fixture(scope="module")
def small():
    """Fields and tensors of a small llama."""
    model = peer("llama", num_hidden_layers=1)
    return fields_of(model, "llama"), tensors_of(model, "llama")


def our_logits(model):
    return np.asarray(jax.jit(model.network.apply)(model.params, jnp.asarray(TEXT)))


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TEXT)).logits.numpy()


def max_difference(path, logits):
    """Largest difference from llama.cpp's next-token log-probabilities, relative to the largest logit."""
    llama_cpp, log_p = Llama(path), np.asarray(jax.nn.log_softmax(logits[0]))
    expected = {length: llama_cpp.log_probabilities(TEXT[0, :length].tolist(), SIZE) for length in LENGTHS}
    errors = [np.max(np.abs(values - log_p[length - 1])) for length, values in expected.items()]
    return max(errors) / np.max(np.abs(logits))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_llama_cpp_and_of_transformers(name, made, differences):
    model, path, loaded = made(name)
    logits = our_logits(loaded)
    differences[name, "transformers"] = np.max(np.abs(logits - their_logits(model))) / np.max(np.abs(logits))
    differences[name, "llama.cpp"] = max_difference(path, logits)
    assert differences[name, "transformers"] <= 1e-4
    assert differences[name, "llama.cpp"] <= TOLERANCE[CASES[name].architecture]


def test_a_gemma_3_without_a_base_has_its_own(tmp_path):
    model = peer("gemma3_text", num_hidden_layers=7, sliding_window=64, query_pre_attn_scalar=16)
    fields = {**fields_of(model, "gemma3"), "gemma3.attention.sliding_window": 64}
    loaded = weights.load(write(tmp_path / "model.gguf", "gemma3", fields, tensors_of(model, "gemma3")))
    assert np.max(np.abs(our_logits(loaded) - their_logits(model))) <= 1e-4 * np.max(np.abs(our_logits(loaded)))


def test_every_architecture_that_is_read_has_a_case():
    assert {case.architecture for case in CASES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ["llama (some biases)", "llama (divided and scaled)", "gemma3 (62 layers)"])
def test_what_is_saved_from_a_file_is_the_same_model_in_transformers(name, made, tmp_path):
    _, _, loaded = made(name)
    huggingface.save(tmp_path, loaded.params, loaded.settings, loaded.config)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    logits = our_logits(loaded)
    assert np.max(np.abs(logits - their_logits(again))) <= 1e-4 * np.max(np.abs(logits))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_quantised_tensors_arrive_on_a_mesh_as_they_are_dequantised(kind, small, mesh_of, tmp_path):
    fields, tensors = small
    number = gguf.GGMLQuantizationType[kind]
    packed = {name: gguf.quantize(values, number) for name, values in tensors.items() if values.ndim == 2}
    kinds = dict.fromkeys(packed, number)
    path = write(tmp_path / "packed.gguf", "llama", fields, {**tensors, **packed}, kinds)
    plain = {name: gguf.dequantize(values, number) for name, values in packed.items()}
    expected = weights.load(write(tmp_path / "plain.gguf", "llama", fields, {**tensors, **plain})).params
    for mesh in (None, mesh_of(8, replica=1, fsdp=4, tensor=2)):
        jax.tree.map(np.testing.assert_array_equal, weights.load(path, mesh).params, expected)


def q4_k(block):
    """One block of 256 values by its format: eight scales and minima of 6 bits, and 4 bits a value."""
    (scale, minimum), packed, quants = block[:4].view(np.float16).astype(np.float32), block[4:16], block[16:]
    values = []
    for part in range(8):
        if part < 4:
            s, m = packed[part] & 63, packed[part + 4] & 63
        else:
            s = (packed[part + 4] & 15) | (packed[part - 4] >> 6 << 4)
            m = (packed[part + 4] >> 4) | (packed[part] >> 6 << 4)
        half = quants[part // 2 * 32 : part // 2 * 32 + 32]
        values.append(scale * s * (half >> 4 if part % 2 else half & 15) - minimum * m)
    return np.concatenate(values)


def q6_k(block):
    """Sixteen scales of 8 bits; of a value's 6 bits, four are in one array and two in another."""
    low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
    values = np.zeros(256, np.float32)
    for place in range(256):
        half, quarter, at = place // 128, place % 128 // 32, place % 32
        nibble = low[half * 64 + quarter % 2 * 32 + at] >> (4 if quarter > 1 else 0) & 15
        bits = nibble | (high[half * 32 + at] >> 2 * quarter & 3) << 4
        values[place] = float(scales[place // 16]) * (int(bits) - 32)
    return block[208:].view(np.float16).astype(np.float32) * values


@pytest.mark.parametrize(
    ("kind", "size", "scales", "decoded"), [("Q4_K", 144, [0, 2], q4_k), ("Q6_K", 210, [208], q6_k)]
)
def test_blocks_of_256_values_are_dequantised_by_their_format(kind, size, scales, decoded, mesh_of, tmp_path):
    """Of random bytes, whole, and on a mesh that splits rows and columns."""
    model, rng = (
        peer("llama", num_hidden_layers=1, hidden_size=512, intermediate_size=256, head_dim=128),
        np.random.default_rng(0),
    )
    fields, tensors = fields_of(model, "llama"), tensors_of(model, "llama")
    packed, plain = {}, {}
    for name in (name for name, values in tensors.items() if name.startswith("blk") and values.ndim == 2):
        blocks = rng.integers(0, 256, (tensors[name].size // 256, size), dtype=np.uint8)
        for at in scales:
            blocks[:, at : at + 2] = rng.uniform(-0.01, 0.01, (len(blocks), 1)).astype(np.float16).view(np.uint8)
        packed[name] = blocks.reshape(len(tensors[name]), -1)
        plain[name] = np.asarray([decoded(block) for block in blocks]).reshape(tensors[name].shape)
    kinds = dict.fromkeys(packed, gguf.GGMLQuantizationType[kind])
    path = write(tmp_path / "packed.gguf", "llama", fields, {**tensors, **packed}, kinds)
    expected = weights.load(write(tmp_path / "plain.gguf", "llama", fields, {**tensors, **plain})).params
    for mesh in (None, mesh_of(8, replica=1, fsdp=4, tensor=2)):
        loaded = weights.load(path, mesh).params
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), loaded, expected)


def test_a_bias_of_attentions_output_is_read_where_llama_cpp_would_refuse_it(tmp_path):
    model = peer("qwen3", attention_bias=True)
    path = write(tmp_path / "model.gguf", "qwen3", fields_of(model, "qwen3"), tensors_of(model, "qwen3"))
    loaded = weights.load(path)
    logits = our_logits(loaded)
    assert np.max(np.abs(logits - their_logits(model))) <= 1e-4 * np.max(np.abs(logits))


def test_the_first_layers_of_smollm2_give_the_logits_of_llama_cpp(tmp_path):
    """In float32, because llama.cpp rounds activations with quantised weights; with part of the vocabulary."""
    file, fields = open_model(real("smollm2-135m-instruct")), fields_of(peer("llama", **SMOLLM2), "llama")
    names = [
        "token_embd.weight",
        "output_norm.weight",
        *(n for n in file.tensors if n.startswith(("blk.0.", "blk.1."))),
    ]
    tensors = {name: file.tensors[name] for name in names}
    values = {name: tensor.read((slice(None),) * len(tensor.shape)) for name, tensor in tensors.items()}
    values["token_embd.weight"] = values["token_embd.weight"][:SIZE]
    path = write(tmp_path / "model.gguf", "llama", {**fields, "llama.rope.freq_base": 1e5}, values)
    loaded = weights.load(path)
    assert max_difference(path, our_logits(loaded)) <= 1e-3


@pytest.mark.slow
def test_smollm2s_log_probabilities_are_those_of_llama_cpp_but_for_its_rounding():
    path = real("smollm2-135m-instruct")
    model = weights.load(path)
    ids = model.tokenizer("Owls hunt at night, and their feathers make no sound. Count: 12, 485, 907.\n\n")["input_ids"]
    logits = np.asarray(jax.jit(model.network.apply)(model.params, jnp.asarray([ids])))[0]
    log_p, llama_cpp = np.asarray(jax.nn.log_softmax(logits)), Llama(path)
    for length in (5, 15, len(ids)):
        expected = llama_cpp.log_probabilities(ids[:length], model.settings.vocab)
        assert expected.argmax() == log_p[length - 1].argmax()
        assert np.mean(np.abs(expected - log_p[length - 1])) <= 0.01 * np.max(np.abs(logits))


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def load_error(small, tmp_path):
    """The error of loading a small llama with changed fields and tensors; None removes one."""

    def message_of(fields, tensors=None, architecture="llama"):
        changed = {name: value for name, value in {**small[1], **(tensors or {})}.items() if value is not None}
        path = write(tmp_path / "model.gguf", architecture, {**small[0], **fields}, changed)
        with pytest.raises(UserError) as error:
            weights.load(path)
        assert "\n" not in str(error.value) and path.name in str(error.value)
        return str(error.value)

    return message_of


REFUSED = {  # field: (value, message)
    "llama.expert_count": (8, "llama.expert_count is 8 (a mixture of experts)"),
    "llama.pooling_type": (3, "llama.pooling_type is 3 (an embedding model)"),
    "llama.attention.causal": (False, "llama.attention.causal is False (layers that look ahead)"),
    "llama.logit_scale": (0.25, "llama.logit_scale is 0.25, which is not supported"),
    "llama.attention.scale": (0.5, "llama.attention.scale is 0.5"),
    "llama.residual_scale": (0.5, "llama.residual_scale is 0.5"),
    "llama.embedding_scale": (12.0, "llama.embedding_scale is 12.0"),
    "llama.attn_logit_softcapping": (50.0, "llama.attn_logit_softcapping is 50.0"),
    "llama.final_logit_softcapping": (30.0, "llama.final_logit_softcapping is 30.0"),
    "llama.attention.clamp_kqv": (8.0, "llama.attention.clamp_kqv is 8.0"),
    "llama.attention.sliding_window": (64, "llama.attention.sliding_window is 64, and llama.cpp computes no windows"),
    "llama.attention.sliding_window_pattern": (6, "llama.attention.sliding_window_pattern is 6"),
    "llama.attention.value_length": (8, "llama.attention.value_length is 8"),
    "llama.attention.head_count_kv": (3, "4 heads cannot share 3 keys"),
    "llama.attention.key_length": (15, "heads of 15 entries cannot be rotated in halves"),
    "llama.feed_forward_length": ([96, 64], "llama.feed_forward_length differs from layer to layer"),
    "llama.rope.dimension_count": (8, "llama.rope.dimension_count is 8 (only a part of each head turns)"),
    "llama.rope.dimension_sections": ([4, 2, 2, 0], "llama.rope.dimension_sections is"),
    "llama.rope.freq_base": (0.0, "llama.rope.freq_base is 0.0, and must be positive"),
    "llama.rope.scaling.type": ("longrope", "llama.rope.scaling.type is 'longrope', which is not read from GGUF"),
    "llama.rope.scaling.attn_factor": (1.2, "llama.rope.scaling.attn_factor is"),
    "llama.rope.scaling.yarn_beta_fast": (16.0, "llama.rope.scaling.yarn_beta_fast is 16.0"),
    "llama.nextn_predict_layers": (1, "llama.nextn_predict_layers is 1"),
    "llama.a_field_of_tomorrow": ("on", "llama.a_field_of_tomorrow is 'on'"),
    "llama.block_count": (None, "has no llama.block_count"),
    "llama.context_length": (-1.5, "llama.context_length is -1.5, not a whole number"),
    "general.type": ("adapter", "holds no language model: general.type is 'adapter'"),
    "tokenizer.ggml.pre": (
        "deepseek-llm",
        "tokenizer.ggml.pre is 'deepseek-llm', a way to cut text that is not supported",
    ),
    "tokenizer.ggml.model": (
        "bert",
        "tokenizer.ggml.model is 'bert', a kind that is not supported; known: gpt2, llama",
    ),
    "tokenizer.ggml.suppress_tokens": ([3], "tokenizer.ggml.suppress_tokens is [3]"),
    "tokenizer.ggml.add_sep_token": (True, "tokenizer.ggml.add_sep_token is True"),
    "tokenizer.ggml.add_bos_token": (True, "text begins or ends with bos, and there is no tokenizer.ggml.bos_token_id"),
    "tokenizer.ggml.precompiled_charsmap": ([1, 2], "tokenizer.ggml.precompiled_charsmap is [1, 2]"),
    "tokenizer.ggml.eos_token_id": (SIZE, f"tokenizer.ggml.eos_token_id is {SIZE}, and there are {SIZE} tokens"),
    "tokenizer.ggml.eos_token_ids": ([1.5], "tokenizer.ggml.eos_token_ids is 1.5"),
    "tokenizer.ggml.merges": (["a b", "a q"], "tokenizer.ggml.merges has 'a q', whose parts or sum are not tokens"),
    "tokenizer.ggml.token_type": ([1], f"tokenizer.ggml.token_type has 1 numbers, and must have {SIZE}"),
    "tokenizer.ggml.tokens": (["a", "b", "a"], "tokenizer.ggml.tokens has a token twice"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_is_not_understood_is_refused_by_name(field, load_error):
    value, words = REFUSED[field]
    assert words in load_error({field: value})


def test_what_git_lfs_leaves_in_the_place_of_a_file_is_told(tmp_path):
    (tmp_path / "model.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 134\n")
    with pytest.raises(UserError, match=r"model\.gguf is a pointer of Git LFS and not the file itself"):
        open_model(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"output.bias": np.ones(SIZE, np.float32)}, "tensor output.bias is not supported"),
        ({"blk.0.attn_qkv.weight": np.ones((128, 64), np.float32)}, "tensor blk.0.attn_qkv.weight is not supported"),
        ({"blk.0.attn_q.scale": np.ones(1, np.float32)}, "tensor blk.0.attn_q.scale is not supported"),
        ({"blk.1.attn_q.weight": np.ones((64, 64), np.float32)}, "tensor blk.1.attn_q.weight is not supported"),
        ({"blk.0.ffn_up.weight": None}, "has no tensor blk.0.ffn_up.weight; use a GGUF file of a whole model"),
        ({"blk.0.ffn_up.weight": np.ones((95, 64), np.float32)}, "tensor blk.0.ffn_up.weight has shape (95, 64)"),
        ({"rope_freqs.weight": np.ones(7, np.float32)}, "rope_freqs.weight is not 8 numbers"),
        ({"rope_freqs.weight": np.zeros(8, np.float32)}, "rope_freqs.weight holds numbers that are not positive"),
        ({"blk.0.ffn_up.weight": np.ones((96, 64), np.int8)}, "tensor blk.0.ffn_up.weight is of a type that"),
    ],
)
def test_a_tensor_that_is_not_read_or_missing_is_told_by_name(tensors, words, load_error):
    assert words in load_error({}, tensors)


@pytest.mark.parametrize("architecture", ["bert", "qwen3moe", "mllama"])
def test_an_architecture_that_is_not_read_is_told_with_those_that_are(architecture, load_error):
    words = f"architecture {architecture!r} is not supported; these are: llama, qwen2, qwen3, gemma3"
    assert words in load_error({}, architecture=architecture)


def test_the_part_of_a_model_that_sees_is_no_language_model(load_error):
    assert "holds no language model: general.type is 'mmproj'" in load_error(
        {"general.type": "mmproj"}, architecture="clip"
    )


@pytest.mark.parametrize("part", [0, 1, 4])
def test_a_part_of_a_split_model_says_which_it_is(part, tmp_path):
    fields = {"split.no": part, "split.count": 5, "split.tensors.count": 99}
    path = write(tmp_path / "model.gguf", "llama", fields, {})
    with pytest.raises(UserError, match=rf"model.gguf is part {part + 1} of 5 of one model; join the parts with"):
        weights.load(path)


def test_a_file_that_ends_too_early_is_truncated_and_one_of_another_kind_is_not(small, tmp_path):
    path = write(tmp_path / "model.gguf", "llama", *small)
    whole = path.read_bytes()
    for length in (5, 20, 100, 3000, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.gguf is truncated or not a GGUF file \(.*\); fetch it again"):
            weights.load(path)
    path.write_bytes(b"PK\x03\x04" + whole)
    with pytest.raises(UserError, match=r"model\.gguf is not a GGUF file: it starts with b'PK"):
        weights.load(path)
    path.write_bytes(whole[:4] + b"\x00\x00\x00\x03" + whole[8:])
    with pytest.raises(UserError, match="is of a machine with the other byte order"):
        weights.load(path)
    path.write_bytes(whole[:4] + b"\x01\x00\x00\x00" + whole[8:])
    with pytest.raises(UserError, match="is of version 1 of GGUF"):
        weights.load(path)


def test_a_file_without_a_tokenizer_is_told(tmp_path):
    path = write(tmp_path / "model.gguf", "llama", {}, {})
    with pytest.raises(UserError, match=r"model.gguf has no tokenizer.ggml.model; use a GGUF file of a whole model"):
        weights.load(path)


def test_a_name_that_would_break_a_message_is_refused_in_one_line(small, tmp_path):
    path = write(tmp_path / "model.gguf", "llama", {**small[0], "llama.\nwindow": 5}, small[1])
    with pytest.raises(UserError, match=r"truncated or not a GGUF file \(the name 'llama.\\nwindow' at byte \d+\)"):
        weights.load(path)


@given(st.data())
def test_whatever_stands_in_a_header_ends_in_a_model_or_in_one_line(small, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("broken") / "model.gguf"
    header = bytearray(write(path, "llama", *small).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        header[data.draw(st.integers(4, 7000))] = data.draw(st.integers(0, 255))
    path.write_bytes(header)
    try:
        weights.gguf.load_tokenizer(path)
        config_of(open_model(path))
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("value", ["x", 2.5, True, -3, 0, [], [0], ["x"], 2**31])
def test_no_value_of_a_field_ends_in_a_traceback(value, small, tmp_path):
    for field in small[0]:
        path = write(tmp_path / "model.gguf", "llama", {**small[0], field: value}, small[1])
        try:
            weights.load(path)
        except UserError as error:
            assert "\n" not in str(error)


def test_parameters_stay_when_their_file_is_written_again(small, tmp_path):
    path = write(tmp_path / "model.gguf", "llama", *small)
    before = weights.load(path).params
    kept = jax.tree.map(np.array, before)
    path.write_bytes(bytes(path.stat().st_size))
    jax.tree.map(np.testing.assert_array_equal, before, kept)


def test_fields_that_say_nothing_new_are_no_hindrance(small, tmp_path):
    """Fields that llama.cpp writes itself, and fields that quantisers add."""
    harmless = {
        "llama.vocab_size": SIZE + 3,
        "llama.attention.causal": True,
        "llama.attention.sliding_window": 512,
        "llama.expert_count": 0,
        "llama.logit_scale": 1.0,
        "llama.rope.dimension_sections": [0, 0, 0, 0],
        "llama.rope.scaling.attn_factor": 1.0,
        "llama.rope.freq_base_swa": 10_000.0,
        "llama.attention.layer_norm_epsilon": 1e-12,
        "llama.tensor_data_layout": "Meta AI original pth",
        "general.name": "small",
        "general.sampling.temp": 0.7,
        "general.languages": ["en"],
        "quantize.imatrix.file": "calibration.dat",
        "split.count": 0,
        "tokenizer.ggml.fim_pre_token_id": 3,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.chat_template.tool_use": "tools",
    }
    harmless |= {"llama.feed_forward_length": [96], "llama.attention.head_count": [4]}
    plain, more = (
        weights.load(write(tmp_path / "model.gguf", "llama", {**small[0], **fields}, small[1]))
        for fields in ({}, harmless)
    )
    assert plain.settings == more.settings
    jax.tree.map(np.testing.assert_array_equal, plain.params, more.params)


# ------------------------------------------------------------------------------------------------------------- ends


def test_an_answer_ends_with_every_token_that_ends_one(small, tmp_path):
    tokens, kinds = (list(TOKENIZER[f"tokenizer.ggml.{name}"]) for name in ("tokens", "token_type"))
    tokens[100:103], kinds[100:103] = ["<|eot_id|>", "<|end_of_text|>", "</s>"], [3, 3, 4]
    tokens[103:105], kinds[103:105] = ["<reponame>", "<|fim_prefix|>"], [3, 3]
    fields = {**small[0], "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    fields |= {"tokenizer.ggml.eos_token_id": 100, "tokenizer.ggml.eot_token_id": 7}
    fields |= {"tokenizer.ggml.fim_pad_token_id": 8, "tokenizer.ggml.fim_suf_token_id": 9}
    loaded = weights.load(write(tmp_path / "model.gguf", "llama", fields, small[1]))
    assert loaded.config.eos_token_id == [100, 7, 8, 101, 103, SIZE - 1]  # without </s> as an HTML tag
