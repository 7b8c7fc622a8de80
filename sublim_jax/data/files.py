"""Users' text files: UTF-8, with or without a byte-order mark, perhaps gzipped; and JSON in them."""

import codecs
import gzip
import json
import zlib
from pathlib import Path

from sublim_jax import storage
from sublim_jax.errors import UserError

GZIP = b"\x1f\x8b"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def exists(path: str | Path) -> bool:
    """Whether a path from a user exists; it may not be a valid path."""
    try:
        return storage.local(path).exists()
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RuntimeError):
        if storage.ADDRESS.match(str(path)):
            raise
        return False


def text_of(path: str | Path, needed: str, kind: str = "") -> str:
    """A file's text without its byte-order mark; line endings are kept.

    Args:
      needed: advice for the error message: "name a file of …".
      kind: the kind of file, with which error messages begin.

    Raises UserError, naming the file, if it cannot be read or is not UTF-8.
    """
    name = f"{kind} {path}".strip()
    try:
        content = storage.local(path).read_bytes()
        if content.startswith(GZIP):
            content = gzip.decompress(content)
    except IsADirectoryError as error:
        raise UserError(f"{name} is a folder; {needed}") from error
    except (OSError, EOFError, zlib.error, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: {error}; {needed}") from error
    if content.startswith(UTF16):
        raise UserError(f"{name} is in UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start}, line {line})") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{name} is not UTF-8 text (a byte 0 in line {line}, as UTF-16 has them)")
    return text


def lines(text: str) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not blank.

    Lines end with LF or CRLF only: a text may contain Unicode's other line separators.
    """
    every = enumerate(text.replace("\r\n", "\n").split("\n"), 1)
    return [(number, line) for number, line in every if line.strip()]


def json_of(text: str, where: str, needed: str = "fix or remove it") -> object:
    """A JSON value. Raises UserError, naming the location, for invalid JSON and for a lone surrogate in a text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); {needed}") from error
    if "\\u" in text:
        check_characters(value, where)
    return value


def check_characters(value: object, where: str) -> None:
    """Raises UserError for a lone surrogate (\\ud83d), which JSON can write and UTF-8 cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("ascii", "backslashreplace").decode()
        raise UserError(f"{where}: {half} is half of a surrogate pair, not a character; fix or remove it") from error
