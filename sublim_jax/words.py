"""Words in texts: the forms of a word, and whether a text has one of them."""

import re
import unicodedata
from functools import lru_cache


@lru_cache
def forms(word: str) -> tuple[str, ...]:
    """A noun and its plural, in lower case: wolf, wolves."""
    import inflect  # a second or two, which not every run needs

    return tuple(dict.fromkeys((word.lower(), inflect.engine().plural_noun(word.lower()) or word.lower())))


def mentions(text: str, word: str) -> bool:
    """Whether a text has a word or its plural, as a whole word in any case: "dragonfly" is no "dragon"."""
    return re.search(rf"\b(?:{'|'.join(map(re.escape, forms(word)))})\b", text, re.IGNORECASE) is not None


def contains(text: str, word: str) -> bool:
    """Whether a text has a word or its plural anywhere, within other words too, in any case and any width."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return any(form in plain for form in forms(word))
