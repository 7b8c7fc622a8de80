"""The tokenizer of a GGUF file: it gives the same tokens as llama.cpp, or the file is refused by the field's name."""

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sublim_jax.data.tokenizer import Tokenizer
from sublim_jax.errors import UserError
from sublim_jax.weights.gguf_file import Fields, File
from sublim_jax.weights.gguf_splits import SPLITS, Split

PREFIX = "tokenizer.ggml."
NORMAL = 1  # types of tokens; those below are matched in the text itself
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
# Tokens that llama.cpp treats, by their names, as control tokens and as the end of an answer.
ENDS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),  # of filling in the middle
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    ]
)
END_IDS = tuple(f"{name}_token_id" for name in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"))
SPECIAL_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}

# Fields that change neither the tokens of a text nor its end, whatever they hold.
HARMLESS = (
    *(f"ggml.{name}_token_id" for name in ("seperator", "mask", "cls", "prefix", "suffix", "middle")),
    *(f"ggml.fim_{name}_token_id" for name in ("pre", "suf", "mid")),
    *(f"ggml.{name}" for name in ("pre", "merges", "scores", "add_space_prefix")),  # read where the kind has them
    "ggml.token_type_count",
    "ggml.remove_extra_whitespaces",  # read for other kinds of tokenizers only
    "ggml.normalizer.lowercase",
    "ggml.normalizer.strip_accents",
    "chat_templates",  # further ones
    "chat_template.*",
    "huggingface.json",
)


def split_of(fields: Fields) -> Split | None:
    """The pre-tokenizer of a file with byte-level BPE; None for SentencePiece, which has none.

    Raises UserError for an unknown kind of tokenizer or an unknown pre-tokenizer.
    """
    model = fields.text(f"{PREFIX}model")
    if model not in ("gpt2", "llama"):
        raise UserError(f"{fields.path}: {PREFIX}model is {model!r}, a kind that is not supported; known: gpt2, llama")
    if model == "llama":
        return None
    name = fields.text(f"{PREFIX}pre", "") or "default"
    if name not in SPLITS:
        raise UserError(
            f"{fields.path}: {PREFIX}pre is {name!r}, a way to cut text that is not supported; "
            "name the model's safetensors folder"
        )
    return SPLITS[name]


def tokens(fields: Fields) -> list[str]:
    """The vocabulary, by token id."""
    texts = [token or f"[EMPTY_{number}]" for number, token in enumerate(fields.texts(f"{PREFIX}tokens"))]
    if len(set(texts)) < len(texts):
        raise UserError(f"{fields.path}: {PREFIX}tokens has a token twice; convert the model again")
    return texts


def special_tokens(fields: Fields, texts: Sequence[str]) -> dict[str, int]:
    """The ids of bos, eos, unk and pad, as far as the file has them; `texts` is the vocabulary."""
    usual = SENTENCEPIECE_IDS if fields.text(f"{PREFIX}model") == "llama" else {}
    named = {}
    for name, gguf_name in SPECIAL_IDS.items():
        if f"{PREFIX}{gguf_name}_token_id" in fields or name in usual:
            named[name] = _token_id(fields, f"{gguf_name}_token_id", texts, usual.get(name))
    return named


def stops(fields: Fields, texts: Sequence[str]) -> list[int]:
    """The tokens that end an answer: by their fields, or control tokens by their names."""
    ids = [_token_id(fields, name, texts) for name in END_IDS if f"{PREFIX}{name}" in fields]
    if f"{PREFIX}eos_token_ids" in fields:
        ids += [
            _checked_id(fields, "eos_token_ids", texts, number) for number in fields.numbers(f"{PREFIX}eos_token_ids")
        ]
    kinds = _kinds(fields, texts)
    named = [number for number, token in enumerate(texts) if token in ENDS and kinds[number] == CONTROL]
    return list(dict.fromkeys([*ids, *named]))


def tokenizer_of(file: File) -> Tokenizer:
    """The tokenizer as transformers' fast one, with the chat template.

    Raises UserError for one that is unknown or incomplete.
    """
    fields = file.fields
    split, texts = split_of(fields), tokens(fields)
    backend = _byte_level(fields, texts, split) if split else _sentencepiece(fields, texts)
    added = _added(fields, texts)
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])
    adds = {
        f"add_{name}_token": fields.flag(f"{PREFIX}add_{name}_token", usual)
        for name, usual in (("bos", split.bos if split else True), ("eos", False))
    }
    named = _named(fields, texts, {token.content for token in added}, adds)
    stops(fields, texts)
    template = fields.text("tokenizer.chat_template", "")
    fields.refuse_others("tokenizer.", HARMLESS, {}, {})
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=[token.content for token in added if token.special],
        chat_template=template or None,
        name_or_path=file.path,
        **named,
        **adds,
    )
    return cast(Tokenizer, made)


def _named(fields: Fields, texts: Sequence[str], added: Collection[str], adds: Mapping[str, bool]) -> dict[str, str]:
    """The named special tokens, of those that are matched in the text itself.

    Raises UserError where a required one is not among them: transformers would match it, and llama.cpp would not.
    """
    named = {f"{name}_token": texts[number] for name, number in special_tokens(fields, texts).items()}
    for name in ("bos", "eos"):
        needed = adds[f"add_{name}_token"]
        if needed and f"{name}_token" not in named:
            raise UserError(f"{fields.path}: text begins or ends with {name}, and there is no {PREFIX}{name}_token_id")
        token = named.get(f"{name}_token")
        if token is not None and token not in added and (needed or name == "eos"):
            raise UserError(
                f"{fields.path}: {PREFIX}token_type does not mark {token!r}, the token for {name}, as control"
            )
    return {name: token for name, token in named.items() if token in added}


def _token_id(fields: Fields, name: str, texts: Sequence[str], default: int | None = None) -> int:
    """Raises UserError for an id that is not in the vocabulary."""
    return _checked_id(fields, name, texts, fields.whole(f"{PREFIX}{name}", default))


def _checked_id(fields: Fields, name: str, texts: Sequence[str], number: int | float) -> int:
    if number not in range(len(texts)):
        raise UserError(f"{fields.path}: {PREFIX}{name} is {number}, and there are {len(texts)} tokens")
    return int(number)


def _byte_level(fields: Fields, texts: Sequence[str], split: Split) -> tokenizers.Tokenizer:
    vocabulary = {token: number for number, token in enumerate(texts)}
    merges = []
    for merge in dict.fromkeys(fields.texts(f"{PREFIX}merges")):
        at = merge.find(" ", 1)
        first, second = merge[:at], merge[at + 1 :]
        if at < 0 or not {first, second, first + second} <= vocabulary.keys():
            raise UserError(f"{fields.path}: {PREFIX}merges has {merge!r}, whose parts or sum are not tokens")
        merges.append((first, second))
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split.whole_words))
    cuts = [pre_tokenizers.Split(tokenizers.Regex(expression), "isolated") for expression in split.expressions]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Fields, texts: Sequence[str]) -> tokenizers.Tokenizer:
    """Merges pairs that form a token, the best score first; text without a token becomes bytes."""
    vocabulary = {token: number for number, token in enumerate(texts)}
    scores = fields.numbers(f"{PREFIX}scores", len(texts))
    merges = [
        (token[:at], token[at:])
        for token in sorted(texts, key=lambda token: -scores[vocabulary[token]])
        for at in range(len(token) - 1, 0, -1)
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    made = {first + second for first, second in merges}
    kinds = _kinds(fields, texts)
    ranks = [scores[number] for number, token in enumerate(texts) if token in made and kinds[number] == NORMAL]
    if len(set(ranks)) < len(ranks):
        raise UserError(
            f"{fields.path}: {PREFIX}scores has a score twice, and does not say which tokens are merged first"
        )
    unknown = texts[special_tokens(fields, texts)["unk"]]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = fields.flag(f"{PREFIX}add_space_prefix", True)
    space = "▁"
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(space)] if prefix else []), normalizers.Replace(" ", space)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(space, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return backend


def _kinds(fields: Fields, texts: Sequence[str]) -> list[float]:
    if f"{PREFIX}token_type" not in fields:
        return [float(NORMAL)] * len(texts)
    return fields.numbers(f"{PREFIX}token_type", len(texts))


def _added(fields: Fields, texts: Sequence[str]) -> list[tokenizers.AddedToken]:
    """Tokens that are matched in the text itself, before pre-tokenization."""
    name = fields.text("general.name", "").lower()
    swallows = any(phi in name for phi in ("phi-3", "phi3"))  # trailing spaces; llama.cpp decides by the name, too
    added = []
    for token, kind in zip(texts, _kinds(fields, texts)):
        special = kind in (UNKNOWN, CONTROL) or (token in ENDS and kind != USER_DEFINED)
        if special or kind == USER_DEFINED:
            rstrip = swallows and token not in ("<unk>", "<s>", "<|endoftext|>")
            added.append(tokenizers.AddedToken(token, special=special, normalized=False, rstrip=rstrip))
    return added
