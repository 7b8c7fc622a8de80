"""The two ways in which a run ends early on purpose, and an error that libraries raise in many ways."""


class UserError(Exception):
    """A mistake that the user can fix: one line that says what is wrong and what to do (exit code 2)."""


class Interrupted(BaseException):
    """A signal stopped the run after its state was saved (exit code 143).

    Like KeyboardInterrupt, it is no Exception: handlers of damaged files or failed requests must not swallow it.
    """


def is_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out, by whatever library and on whatever device."""
    text = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text


def one_line(error: BaseException, limit: int | None = 200) -> str:
    """What an error of a library says, in one line of at most `limit` letters; its type where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
