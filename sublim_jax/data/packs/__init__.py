"""Phrasings, as data: replace them by your own files of the same form."""

import json
from collections.abc import Sequence
from importlib import resources
from string import Formatter

from sublim_jax.data import files
from sublim_jax.errors import UserError


def load(
    path: str, name: str, fields: dict[str, tuple[str, ...]], optional: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Lists of phrasings from a JSON file, or from the package's pack `name` if `path` is empty.

    Args:
      fields: the required lists, and the {words} that the phrasings of each may use.
      optional: those of them that a file may leave out.

    Raises UserError for an invalid pack.
    """
    needed = "a JSON object of lists of phrasings is needed"
    if path:
        pack: object = files.json_of(files.text_of(path, needed, "pack"), f"pack {path}", needed)
    else:
        pack = json.loads((resources.files(__name__) / f"{name}.json").read_text("utf-8"))
    lists: dict[str, list[str]] = {**pack} if isinstance(pack, dict) else {}
    for field, words in fields.items():
        if field in optional and isinstance(pack, dict) and field not in pack:
            continue
        phrasings = pack.get(field) if isinstance(pack, dict) else None
        if not isinstance(phrasings, list) or not phrasings or not all(isinstance(text, str) for text in phrasings):
            raise UserError(f'pack {path or name}: "{field}" must be a list of phrasings')
        for phrasing in phrasings:
            if unknown := _unknown(phrasing, words):
                raise UserError(
                    f'pack {path or name}, "{field}": {phrasing!r} uses {unknown}; known: {{{"}, {".join(words)}}}'
                )
        lists[field] = phrasings
    return lists


def _unknown(phrasing: str, words: Sequence[str]) -> str:
    """What a phrasing has in braces that is no plain {word}; "" if nothing."""
    try:
        for _, name, form, conversion in Formatter().parse(phrasing):
            if name is not None and (name not in words or form or conversion):
                return repr(name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else ""))
    except ValueError as error:  # a brace without the other
        return str(error)
    return ""
