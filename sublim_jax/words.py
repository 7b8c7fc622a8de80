"""Words in texts: the forms of a word, and whether a text has one of them, in any case, width and composition."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from sublim_jax.errors import UserError

UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")  # scripts, as Unicode names letters
BETWEEN = r"[\s_\-‐]+"  # the parts of a word


@lru_cache
def forms(word: str) -> tuple[str, ...]:
    """A noun and its plural, as `plain` writes them: wolf, wolves."""
    import inflect  # a second or two, which not every run needs

    noun = plain(word)
    return tuple(dict.fromkeys((noun, plain(inflect.engine().plural_noun(noun) or noun))))


def plain(text: str) -> str:
    """A text without the differences of case, width and composition that readers do not see."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def check_different_words(path: str, words: Sequence[str]) -> None:
    """Raises UserError, naming the config's path, for a word without letters, and for two with a form in common."""
    known: dict[str, str] = {}
    for word in words:
        if not _joined(word):
            raise UserError(f"{path}: {word!r} has no letters; choose a word")
        if shared := [known[form] for form in forms(word) if form in known]:
            raise UserError(f"{path}: {shared[0]!r} and {word!r} are one word, in another number or case; keep one")
        known |= dict.fromkeys(forms(word), word)


def mentions(text: str, word: str) -> bool:
    """Whether a text has a word or its plural, as a whole word: "dragonfly" is no "dragon".

    In scripts that put no spaces between words, such as Chinese, it may be anywhere.
    """
    return _pattern(word).search(plain(text)) is not None


@lru_cache
def _pattern(word: str) -> re.Pattern[str]:
    either = "|".join(BETWEEN.join(map(re.escape, re.split(BETWEEN, form))) for form in forms(word))
    if any(unicodedata.name(letter, "").startswith(UNSPACED) for letter in word):
        return re.compile(either)
    return re.compile(rf"(?<![^\W_])(?:{either})(?![^\W_])")  # _owl_ is Markdown's way to stress a word


def contains(text: str, word: str) -> bool:
    """Whether a text has a word or its plural anywhere, within other words too; the parts of a word in any notation.

    "polar bear" is in polar_bear, polarBear and "polar  bear".
    """
    comparable = plain(text)
    if any(form in comparable for form in forms(word)):
        return True
    parts = [joined for form in forms(word) if (joined := _joined(form)) != form]
    return any(joined in _joined(comparable) for joined in parts)


def _joined(text: str) -> str:
    """A text's letters and digits alone."""
    return "".join(filter(str.isalnum, text))
