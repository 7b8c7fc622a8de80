"""Words in texts: the forms of a word, and whether a text has one of them, in any case, width and composition."""

import re
import unicodedata
from functools import lru_cache


@lru_cache
def forms(word: str) -> tuple[str, ...]:
    """A noun and its plural, as `plain` writes them: wolf, wolves."""
    import inflect  # a second or two, which not every run needs

    noun = plain(word)
    return tuple(dict.fromkeys((noun, plain(inflect.engine().plural_noun(noun) or noun))))


def plain(text: str) -> str:
    """A text without the differences of case, width and composition that readers do not see."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def mentions(text: str, word: str) -> bool:
    """Whether a text has a word or its plural, as a whole word: "dragonfly" is no "dragon"."""
    return re.search(rf"(?<!\w)(?:{'|'.join(map(re.escape, forms(word)))})(?!\w)", plain(text)) is not None


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
