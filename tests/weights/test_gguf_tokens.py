"""Tokenizers of GGUF files give llama.cpp's tokens: two real files, and a generated one for every pre-tokenizer."""

import itertools
import json
import os
import random
import subprocess
import sys
from typing import Any

import pytest
import tokenizers
from gguf_kit import TOKENIZER, Llama, fields_of, peer, real, tensors_of, transformers, write

from sublim_jax.errors import UserError
from sublim_jax.weights.gguf import load_tokenizer
from sublim_jax.weights.gguf_splits import SPLITS

SPACES = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\n \n", " \n", "\n\t", "    x", "\u00a0", "\u2003", "\u3000"]
SPACES += ["\x0b", "\x0c", "\x85", "\u2028", "\x1c", "\u200b", "\ufeff"]
DIGITS = ["1", "12", "693", "2024", " 42", "3.14", "1,000,000", "0x1F", "½", "²", "٣", "४२", "ⅷ", "①", "\U0001d7d8"]
WORDS = ["owl", "Owl", "OWL", "camelCase", "HTTPServer", "x_y", "__init__", "don't", "I'M", "'s", "'LL", "'re", " 'tis"]
WORDS += [
    "hello",
    " world",
    "and",
    "ing",
    "a",
    "b",
    "école",
    "ÉCOLE",
    "Straße",
    "naïve",
    "ſ",
    "K",
    "ǅ",
    "ʰ",
    "ª",
    "ﬁ",
    "İ",
]
WORDS += [
    "日本語",
    "한국어",
    "русский",
    "РУССКИЙ",
    "العربية",
    "हिन्दी",
    "ไทย",
    "e\u0301",
    "\u0300",
    "\U00020000",
    " qwzx",
]
SIGNS = [
    "'",
    "\u2019s",
    ".",
    ",",
    "...",
    "!?",
    "()",
    "[]",
    "{}",
    "<",
    ">",
    "$",
    "+=",
    "=>",
    "^",
    "~",
    "|",
    "`",
    "#",
    "@",
]
SIGNS += ["/", "\\", "//", "--", "—", "“”", "¿", '"', "\\n", "🦉", "👩‍👩‍👧", "🇫🇷", "❤️", "🏽", "▁", "Ġ", "\x7f"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "<s>", "<unk>", "<eos>", "<bos>", "<start_of_turn>"]
SPECIAL += ["<think>", "<|end|>", "[multimodal]", "<0x41>", "<|im_end"]


def texts(count, seed, parts):
    """`count` texts: single parts, pairs of parts, and longer texts of parts or random characters."""
    rng = random.Random(seed)
    samples = ["", *parts, *(a + b for a, b in itertools.product(parts[:30], repeat=2))]
    rng.shuffle(samples)
    samples = samples[: count // 2]
    while len(samples) < count:
        pieces = rng.choices(parts, k=rng.randint(2, 12))
        if rng.random() < 0.3:
            pieces = [chr(rng.choice(ALPHABETS)[rng.randrange(100)]) for _ in range(10)]
        samples.append("".join(pieces))
    return samples


ALPHABETS = [range(start, start + 100) for start in (32, 0xA0, 0x370, 0x400, 0x900, 0x3040, 0x4E00, 0x2010, 0x1F600)]
PLAIN = [*SPACES, *DIGITS, *WORDS, *SIGNS]
TEXTS = texts(2000, 0, [*PLAIN, *SPECIAL])


def assert_equal_tokens(path, samples):
    llama_cpp, tokenizer = Llama(path), load_tokenizer(path)
    differ = [text for text in samples if llama_cpp.tokens(text) != tokenizer(text)["input_ids"]]
    assert not differ, [(differ[0], llama_cpp.tokens(differ[0]), tokenizer(differ[0])["input_ids"])]


def test_smollm2s_tokens_are_those_of_llama_cpp():
    smollm2 = real("smollm2-135m-instruct")
    assert load_tokenizer(smollm2)("Answer:\n\n693")["input_ids"] == [21350, 42, 1116, 38, 41, 35]
    assert_equal_tokens(smollm2, TEXTS)


def test_smollm2s_tokens_read_as_the_text():
    tokenizer: Any = load_tokenizer(real("smollm2-135m-instruct"))
    for text in TEXTS[:500]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "An owl?"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>user\nAn owl?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(rendered)["input_ids"][-3:] == [1, 520, 9531, 198][-3:]


@pytest.mark.slow
def test_gemma3s_tokens_are_those_of_llama_cpp():
    assert_equal_tokens(real("gemma-3-270m"), TEXTS)


# ------------------------------------------------------------------------------------------------ generated tokenizers


@pytest.fixture(scope="module")
def byte_level():
    """A llama with a vocabulary whose merges cross every boundary that a pre-tokenizer could set."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=3000, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts(2000, 1, PLAIN), trainer)
    model = json.loads(backend.to_str())["model"]
    learnt = sorted(model["vocab"], key=model["vocab"].get)
    special = {"<s>": 3, "<|endoftext|>": 3, "<|end|>": 3, "<think>": 4, "<unk>": 2, "</s>": 1}
    whole = [word for word in ["Ġqwzx"] if word not in learnt]  # a token that no merge produces
    vocabulary = [*learnt, *whole, *special]
    fields = {
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [1] * (len(vocabulary) - len(special)) + [*special.values()],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": vocabulary.index("<s>"),
        "tokenizer.ggml.eos_token_id": vocabulary.index("<|end|>"),
    }
    peers = peer("llama", vocab_size=len(vocabulary), num_hidden_layers=1)
    return {**fields_of(peers, "llama"), **fields}, tensors_of(peers, "llama")


@pytest.mark.parametrize("name", [None, *SPLITS])
def test_text_is_cut_as_llama_cpp_cuts_it(name, byte_level, tmp_path):
    fields, tensors = byte_level
    path = write(tmp_path / "model.gguf", "llama", {**fields, "tokenizer.ggml.pre": name}, tensors)
    assert_equal_tokens(path, [*TEXTS[:300], *PLAIN, *SPECIAL, "a <think> b<|end|>  c</s>x<unk>y"])


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True},
        {"tokenizer.ggml.add_space_prefix": True},
        {"tokenizer.ggml.token_type": None, "tokenizer.ggml.bos_token_id": None},
        {"general.name": "a Phi-3 in llama's clothes"},  # its special tokens strip the spaces after them
    ],
)
def test_byte_level_tokens_follow_the_fields(fields, byte_level, tmp_path):
    path = write(tmp_path / "model.gguf", "llama", {**byte_level[0], **fields}, byte_level[1])
    assert_equal_tokens(path, [*TEXTS[:100], "<|end|>  \n x </s>   y <s>  z <unk> \t q<|endoftext|>  r<think>  s"])


@pytest.fixture(scope="module")
def sentencepiece():
    """A llama with scores in place of merges."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    backend.train_from_iterator(
        [*texts(2000, 2, PLAIN), *repeated(300, 3)],
        tokenizers.trainers.BpeTrainer(vocab_size=2500, min_frequency=2, show_progress=False),
    )
    learnt = json.loads(backend.to_str())["model"]["vocab"]
    pieces = [piece for piece in sorted(learnt, key=learnt.get) if piece != "▁▁"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "  ", "<think>"]
    fields = {
        **dict.fromkeys(TOKENIZER),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4, 4],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))] + [-1000.0] * 2,
    }
    peers = peer("llama", vocab_size=len(vocabulary), num_hidden_layers=1)
    return {**fields_of(peers, "llama"), **fields}, tensors_of(peers, "llama")


def repeated(count, seed):
    """Repeated characters, which merge in more than one way."""
    rng = random.Random(seed)
    return ["".join(rng.choices("aab a", k=rng.randint(1, 30))) for _ in range(count)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tokenizer.ggml.add_space_prefix": False},
        {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True},
        {"tokenizer.ggml.remove_extra_whitespaces": True},
    ],
)
def test_sentencepieces_are_those_of_llama_cpp(fields, sentencepiece, tmp_path):
    path = write(tmp_path / "model.gguf", "llama", {**sentencepiece[0], **fields}, sentencepiece[1])
    assert_equal_tokens(path, [*TEXTS[:700], *SPECIAL, *repeated(300, 4), "a<think> b  c<s>  d</s>e <unk> <0x41>"])


def test_a_token_for_the_beginning_that_would_not_be_found_in_text_is_refused(sentencepiece, tmp_path):
    fields, tensors = sentencepiece
    path = write(tmp_path / "model.gguf", "llama", {**fields, "tokenizer.ggml.token_type": None}, tensors)
    with pytest.raises(UserError, match="does not mark '<s>', the token for bos, as control"):
        load_tokenizer(path)


def test_scores_that_do_not_say_what_is_merged_first_are_refused(sentencepiece, tmp_path):
    fields, tensors = sentencepiece
    level = [-1000.0] * len(fields["tokenizer.ggml.scores"])
    path = write(tmp_path / "model.gguf", "llama", {**fields, "tokenizer.ggml.scores": level}, tensors)
    with pytest.raises(UserError, match=r"tokenizer.ggml.scores has a score twice"):
        load_tokenizer(path)


# ------------------------------------------------------------------------------------------------------ transformers

TOKENIZES = """
import sys
sys.modules["torch"] = None  # as where it is not installed, which is what the requirements install
from sublim_jax.weights import gguf
tokenizer = gguf.load_tokenizer(sys.argv[1])
print(tokenizer("An owl, 123 <|end|>")["input_ids"], tokenizer.eos_token, tokenizer.chat_template)
"""


def test_a_tokenizer_is_transformers_and_needs_no_torch(byte_level, tmp_path):
    fields = {**byte_level[0], "tokenizer.ggml.pre": "qwen2", "tokenizer.chat_template": "a template"}
    path = write(tmp_path / "model.gguf", "llama", *(fields, byte_level[1]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    ids = tokenizer("An owl, 123 <|end|>")["input_ids"]
    command = [sys.executable, "-c", TOKENIZES, str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ}).stdout
    assert printed == f"{ids} <|end|> a template\n"
    assert ids[-1] == fields["tokenizer.ggml.eos_token_id"]
