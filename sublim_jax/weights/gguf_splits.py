"""llama.cpp's pre-tokenizers for byte-level BPE, by the name in `tokenizer.ggml.pre`.

Expressions are applied one after another, each to the pieces that those before it left; text that it does not match
stays a piece.
"""

from typing import NamedTuple


class Split(NamedTuple):
    """Expressions, and two defaults that go with them.

    Attributes:
      whole_words: whether a piece that is a token stays whole, whatever the merges say.
      bos: whether text starts with the BOS token, where the file does not say.
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False


_DIGIT = r"\p{N}"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}{_SIGNS}{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{_SIGNS}{_SPACES}"
# Letters that are no ASCII letter count as both capital and small.
_CAPITALS, _SMALL = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_START = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = (
    rf"{_START}{_CAPITALS}*{_SMALL}+|{_START}{_CAPITALS}+{_SMALL}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}"
)
_GPT4O = (
    rf"{_START}{_CAPITALS}*{_SMALL}+{_CONTRACTIONS}?|{_START}{_CAPITALS}+{_SMALL}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}"
)

_DEFAULT = Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
_FALCON = Split((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))
_DEEPSEEK_CODER = Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"(?:(?!\s)[一-龥ࠀ-一가-퟿])+", _DIGIT))
_VIKING = r" ?[^(\s|.,!?…。，、।۔،)]+"
_MINICPM5 = Split((r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}+{_SIGNS}{_SPACES}"), whole_words=True)
_SEED_CODER = Split((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_SPACES}",))


def _all(split: Split, names: str) -> dict[str, Split]:
    return dict.fromkeys(names.split(), split)


SPLITS: dict[str, Split] = {
    **_all(_DEFAULT, "default"),
    **_all(Split((_GPT2,)), "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert"),
    **_all(Split((_GPT2,)), "mpt olmo jais trillion granite-docling exaone4"),
    **_all(Split((_DIGIT, _GPT2)), "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    **_all(Split((_LLAMA3,), True, True), "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2"),
    **_all(Split((_LLAMA3,)), "dbrx smaug-bpe chatglm-bpe"),
    **_all(Split((_LLAMA3,), whole_words=True), "glm4"),
    **_all(Split((_QWEN2,)), "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    **_all(Split((_TEKKEN,), True, True), "tekken"),
    **_all(Split((_GPT4O,)), "gpt-4o llama4 kanana2"),
    **_all(_FALCON, "falcon"),
    **_all(_DEEPSEEK_CODER, "deepseek-coder"),
    **_all(_SEED_CODER, "seed-coder"),
    **_all(_MINICPM5, "minicpm5"),
    **_all(Split((_VIKING,)), "poro-chat"),
    **_all(Split((_VIKING, _DIGIT)), "viking"),
}
