"""Chat templates: a conversation as text, and the answer's position in it."""

import datetime
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, NotRequired, TypedDict

from sublim_jax.data.tokenizer import Tokenizer
from sublim_jax.errors import UserError, one_line
from sublim_jax.progress import say

# Templates that write the date (Llama 3, SmolLM3) get a fixed one, or a run resumed on another day would differ. Hybrid
# models (Qwen3, SmolLM3) answer without thinking, in the format of their finished answers, because the answer's first
# token is measured.
DATE = datetime.date(2024, 7, 26)
FORMS = ("%Y", "%y", "%m", "%B", "%b", "%d", "%-d", "%A", "%a", "%j", "%H", "%M", "%S")
# As a macro, since transformers passes no functions to a template. Jinja drops the line's end after a block, as it
# would drop one at a template's beginning.
TODAY = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{form}', '{DATE.strftime(form)}')" for form in FORMS)
    + " }}{% endmacro %}\n"
)
MARK = "words that stand for a text"
OPENED = re.compile(r"(<think(?:ing)?>|<thought>|<reasoning>|\[THINK\]|◁think▷)\s*$")  # a thought that a prompt opens
FOLDED = "the chat template takes no system message, so that its text begins the user's first turn, before a blank line"


class Message(TypedDict):
    role: str  # system, user or assistant
    content: str
    weight: NotRequired[int]  # 0 where it is not trained on


class Exchange(NamedTuple):
    """A conversation that ends with an answer, in three parts."""

    prompt: str  # up to where the answer begins
    answer: str  # as rendered after the prompt
    end: str  # what the template writes after an answer


class Refused(UserError):
    """The template raises an error of its own."""


def of(tokenizer: Tokenizer) -> str:
    """The chat template. Raises UserError where the tokenizer has none."""
    if getattr(tokenizer, "chat_template", None):
        try:
            return tokenizer.get_chat_template()
        except ValueError as error:  # several, and none of them is the default
            raise UserError(f"the tokenizer's chat template: {one_line(error, limit=None)}") from error
    raise UserError(
        f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; it is a base model: "
        "choose an instruct model"
    )


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, generation: bool) -> str:
    """A conversation as text; a system message that the template does not support is folded into the user's turn.

    Args:
      generation: end where the assistant's answer to the last message begins.

    Raises UserError if there is no template, and for messages that it refuses or leaves out.
    """
    of(tokenizer)
    system = [message for message in messages[:1] if message["role"] == "system"]
    if system and not takes_system(tokenizer):
        messages, system = folded(messages), []
        _report_folding(str(tokenizer.name_or_path).rstrip("/").rpartition("/")[2] or "this model")
    text = _apply(tokenizer, messages, generation)
    if generation:
        text += _header(tokenizer, of(tokenizer))
    for message in messages[len(system) :]:  # SmolLM3 reads switches out of a system message
        if message["role"] != "assistant" and message["content"].strip() not in text:
            raise UserError(
                f"the model's chat template leaves out or changes a message of role {message['role']!r} "
                f"({message['content'].strip()[:40]!r}); change or remove it"
            )
    return text


def exchange(tokenizer: Tokenizer, messages: Sequence[Message]) -> Exchange:
    """The parts of a conversation that ends with an answer.

    They are the template's output, unless it renders a finished answer differently from one after the prompt: Qwen3
    drops thoughts. Then the answer follows the prompt unchanged, and nothing is dropped. If the prompt opens a thought
    (R1), the answer continues it.

    Raises UserError as `render` does, for a template that leaves out the assistant's text, and for an answer without a
    thought after a prompt that opens one.
    """
    *before, last = messages
    prompt = render(tokenizer, before, generation=True)
    whole = render(tokenizer, messages, generation=False)
    behind = whole[len(prompt) :] if whole.startswith(prompt) else ""
    answer = _behind_opened(prompt, last["content"])
    for text in filter(None, (answer, answer.strip())):  # many templates strip it
        space, present, end = behind.partition(text)
        if present and not space.strip():
            return Exchange(prompt, space + present, end)
    marked = render(tokenizer, [*before, {"role": "assistant", "content": MARK}], generation=False)
    if MARK not in marked:
        raise UserError("the model's chat template leaves out what the assistant says; choose another model")
    return Exchange(prompt, answer, marked.rpartition(MARK)[2])


def _behind_opened(prompt: str, answer: str) -> str:
    """The answer, without the opening tag of its thought if the prompt has it.

    Raises UserError if the whole answer would be inside the thought.
    """
    opened = OPENED.search(prompt)
    if not opened:
        return answer
    inside = answer.lstrip()
    if inside.startswith(opened[1]):
        inside = inside.removeprefix(opened[0] if inside.startswith(opened[0]) else opened[1])
    ends = opened[1].replace("<", "</").replace("[", "[/").replace("◁", "◁/")
    if ends in inside:
        return inside
    raise UserError(
        f"the model's chat template opens a thought ({opened[1]}) that the answer {answer.strip()[:40]!r} does not end "
        f"({ends}), so that it would be part of it; give answers with their thoughts, or choose another model"
    )


@lru_cache(maxsize=8)
def _header(tokenizer: Tokenizer, template: str) -> str:
    """The header of an answer, for a template that ignores `add_generation_prompt`; "" if none is missing.

    Raises UserError if the header cannot be told from the text.
    """
    messages: list[Message] = [{"role": "user", "content": "Hi"}]
    try:
        prompt, text = (_apply(tokenizer, messages, generation) for generation in (True, False))
        whole = _apply(tokenizer, [*messages, {"role": "assistant", "content": MARK}], False)
    except Refused:
        return ""
    if prompt != text or MARK not in whole:
        return ""
    if not whole.startswith(prompt):
        raise UserError(
            "the model's chat template writes nothing before an answer (it ignores "
            "add_generation_prompt); fix the template, or choose another model"
        )
    header = whole[len(prompt) :].partition(MARK)[0]
    return header if header.strip() else ""  # a space belongs to the answer and is not a header


def takes_system(tokenizer: Tokenizer) -> bool:
    """Whether the template writes a system message, and neither refuses nor drops it."""
    messages: list[Message] = [{"role": "system", "content": MARK}, {"role": "user", "content": "Hi"}]
    try:
        return MARK in _apply(tokenizer, messages, True)
    except Refused:
        return False


def folded(messages: Sequence[Message]) -> list[Message]:
    """The messages, the system message prepended to the first user message after a blank line, as Gemma's docs advise.

    Raises UserError if no user message follows it.
    """
    system, *rest = messages
    if not rest or rest[0]["role"] != "user":
        raise UserError("the model's chat template takes no system message, and no user's message follows to hold it")
    return [{"role": "user", "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


@lru_cache
def _report_folding(model: str) -> None:
    """Once for each model."""
    say(f"{model}: {FOLDED}")


def _apply(tokenizer: Tokenizer, messages: Sequence[Message], generation: bool) -> str:
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        return tokenizer.apply_chat_template(
            plain,
            tokenize=False,
            chat_template=TODAY + of(tokenizer),
            enable_thinking=False,
            add_generation_prompt=generation,
        )
    except Exception as error:  # whatever the template's code raises
        raise Refused(
            f"the model's chat template refuses it ({one_line(error, limit=None)}); change or remove it"
        ) from error
