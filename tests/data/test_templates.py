"""Chat templates of many kinds against transformers: positions of answers and of system prompts."""

import dataclasses

import pytest
import tokenizers
import transformers
from talk_kit import messages

from sublim_jax.data import chat, corpus, dialogue, templates
from sublim_jax.distillation.context import behind
from sublim_jax.errors import UserError
from sublim_jax.evaluation import judges

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPPED = CHATML.replace("m.content", "m.content | trim")
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    " {{ m.content | trim }}<|end|>{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DROPS_SYSTEM = CHATML.replace(
    "%}<|im_start|>{{ m.role }}", "if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}"
)
# Like Qwen3's: an empty thought in the generation prompt and in the last turn, no thoughts in earlier turns.
REWRITES = (
    "{% for m in messages %}{% set n = namespace(c=m.content, r='') %}"
    "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% set n.r = m.content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set n.c = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n{{ n.r }}\n</think>\n\n{% endif %}"
    "{{ n.c }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
# Like models that always think: the prompt opens a thought, and a finished answer has none.
OPENS = CHATML.replace("m.content", "m.content.split('</think>')[-1]").replace(
    "assistant\n{% e", "assistant\n<think>\n{% e"
)
# Like Qwen3's thinking-only models: a finished answer keeps its thought in the last turn.
OPENS_AND_KEEPS = REWRITES.replace("<think>\n\n</think>\n\n{% endif", "<think>\n{% endif")
IGNORES = CHATML.replace("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "")
ANSWERS = ("Hello!", " 42, 7 \n", "<think>two and two</think>\n<answer>4</answer>", "a\n\nb", "12")


@pytest.mark.parametrize("front", ["\n", "  ", "\n\n  ", "{# comment #}\n  ", "  {%- set x = 1 %}\n", ""])
def test_what_stands_in_front_of_a_template_is_rendered_as_by_transformers(tokenizer, front):
    tokenizer.chat_template = front + CHATML
    said = messages(("user", "Hi"))
    assert templates.render(tokenizer, said, generation=True) == tokenizer.apply_chat_template(
        said, tokenize=False, add_generation_prompt=True
    )


def test_a_template_gets_one_date_in_its_own_form(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%Y') | int + 1 }}, {{ strftime_now('%d %b %Y') }}: " + CHATML
    text = templates.render(tokenizer, messages(("user", "Hi")), generation=True)
    assert text.startswith("2025, 26 Jul 2024: <|im_start|>")


@pytest.fixture
def tokenizer(tiny_folder):
    return transformers.AutoTokenizer.from_pretrained(tiny_folder)


@pytest.mark.parametrize("template", [CHATML, STRIPPED, INST, GEMMA, REWRITES])
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_prompts_tokens_begin_the_whole_conversations_and_no_thought_is_lost(tokenizer, template, answer):
    tokenizer.chat_template = template
    before = messages(("user", "Hi"), ("assistant", "<think>so</think>Ho"), ("user", "Where?"))
    prompt = chat.prompt(tokenizer, before)
    whole = chat.conversation(tokenizer, [*before, *messages(("assistant", answer))])
    assert prompt == tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert whole[: len(prompt)] == prompt
    behind = tokenizer.decode(whole[len(prompt) :])
    assert behind.strip().removesuffix("<|end|>").strip() == answer.strip()
    for text, system in (("Where?", ""), ("12", "Be brief.")):
        start = chat.question(tokenizer, text, system)
        assert chat.exchange(tokenizer, text, answer, system)[: len(start)] == start
        alone = tokenizer.decode(chat.completion(tokenizer, text, answer, system))
        assert alone.strip() == answer.strip()


@pytest.mark.parametrize("template", [OPENS, OPENS_AND_KEEPS])
@pytest.mark.parametrize(
    "answer, behind",
    [
        ("<think>\nhm\n</think>\n\n4", "hm\n</think>\n\n4<|end|>\n"),
        ("<think>hm</think>4", "hm</think>4<|end|>\n"),
        ("hm\n</think>\n\n4", "hm\n</think>\n\n4<|end|>\n"),  # as it is sampled after the prompt
    ],
)
def test_an_answer_goes_on_with_the_thought_that_the_prompt_opens(tokenizer, template, answer, behind):
    tokenizer.chat_template = template
    prompt = chat.question(tokenizer, "2+2?")
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n")
    assert tokenizer.decode(chat.exchange(tokenizer, "2+2?", answer)[len(prompt) :]) == behind
    assert tokenizer.decode(chat.completion(tokenizer, "2+2?", answer)) == behind.removesuffix("<|end|>\n")


@pytest.mark.parametrize("template", [OPENS, OPENS_AND_KEEPS])
@pytest.mark.parametrize("answer", ["4", "<think>hm", "hm <think>"])
def test_an_answer_that_would_be_part_of_an_open_thought_is_refused_by_its_row(tokenizer, tiny, template, answer):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"row 2 \('2\+2\?'\): .*opens a thought \(<think>\)") as error:
        dialogue.rows(tiny._replace(tokenizer=tokenizer), [("1+1?", "<think>so</think>2"), ("2+2?", answer)])
    assert "\n" not in str(error.value)


def test_an_answer_that_would_end_early_and_a_token_that_the_model_lacks_are_refused_by_their_row(tiny):
    with pytest.raises(UserError, match=r"row 2 \('2\+2\?'\): the answer has '<\|end\|>' in it"):
        dialogue.rows(tiny, [("1+1?", "2"), ("2+2?", "4<|end|> or so")])
    small = tiny._replace(settings=dataclasses.replace(tiny.settings, vocab=5))
    with pytest.raises(UserError, match=r"row 1 has token \d+, and the model has 5"):
        dialogue.rows(small, [("1+1?", "2")])


def test_an_answer_stands_behind_its_header_where_a_template_writes_none_for_it(tokenizer):
    tokenizer.chat_template = IGNORES
    talk = messages(
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "Where?"), ("assistant", "There.")
    )
    rendered = tokenizer.apply_chat_template(talk, tokenize=False)
    prompt = chat.prompt(tokenizer, talk[:-1])
    assert tokenizer.decode(prompt) == rendered.removesuffix("There.<|end|>\n")
    whole, positions = corpus.answer_positions(tokenizer, talk, (tokenizer.eos_token_id,))
    assert tokenizer.decode(whole) == rendered
    assert tokenizer.decode([whole[at] for at in positions]) == "Ho<|end|>There.<|end|>"
    tokenizer.chat_template = IGNORES + "{{ '<|end|>' }}"
    with pytest.raises(UserError, match="ignores add_generation_prompt"):
        chat.prompt(tokenizer, talk[:-1])


@pytest.mark.parametrize("template", [CHATML, STRIPPED, INST, GEMMA])
def test_a_template_that_only_adds_is_followed_as_it_is(tokenizer, template):
    tokenizer.chat_template = template
    talk = messages(("user", "Hi"), ("assistant", " 42, 7"), ("user", "Where is 12?"), ("assistant", "Here. "))
    whole = tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
    tokens, positions = corpus.answer_positions(tokenizer, talk, (tokenizer.eos_token_id,))
    assert tokens == whole
    text = tokenizer.decode([tokens[at] for at in positions])
    assert [part.strip() for part in text.split("<|end|>")] == ["42, 7", "Here.", ""]


def test_a_conversation_whose_earlier_turns_are_rewritten_becomes_a_text_an_answer(tokenizer):
    tokenizer.chat_template, stops = REWRITES, (tokenizer.eos_token_id,)
    talk = messages(("user", "Hi"), ("assistant", "<think>so</think>Ho"), ("user", "Where?"), ("assistant", "There."))
    with pytest.raises(UserError, match="writes earlier turns otherwise"):
        corpus.answer_positions(tokenizer, talk, stops)
    texts = corpus.texts(tokenizer, talk, stops)
    for number, (tokens, positions) in zip((1, 3), texts, strict=True):
        prompt = chat.prompt(tokenizer, talk[:number])
        assert tokens[: len(prompt)] == prompt and positions[0] == len(prompt)
        assert tokenizer.decode([tokens[at] for at in positions]) == talk[number]["content"] + "<|end|>"
    tokenizer.chat_template = CHATML
    assert corpus.texts(tokenizer, talk, stops) == [corpus.answer_positions(tokenizer, talk, stops)]


def test_where_no_stop_token_ends_a_turn_the_users_next_one_is_not_the_assistants(tokenizer):
    talk = messages(("user", "Hi"), ("assistant", "Ho"), ("user", "Where?"), ("assistant", "There."))
    tokenizer.chat_template = CHATML.replace("<|end|>", "<end_of_turn>")
    tokens, positions = corpus.answer_positions(tokenizer, talk, (tokenizer.eos_token_id,))
    text = tokenizer.decode([tokens[at] for at in positions])
    assert text == "Ho<end_of_turn>\nThere.<end_of_turn>\n"


def test_no_token_reaches_from_the_prompt_into_the_answer(tokenizer):
    """The text "owl" is one token, but a model that has read "ow" continues with "l"."""
    tokenizer.chat_template = CHATML.replace("assistant\n{% endif", "assistant\now{% endif").replace(
        "{{ m.content }}", "{{ 'ow' if m.role == 'assistant' }}{{ m.content }}"
    )
    prompt, whole = chat.question(tokenizer, "Hi"), chat.exchange(tokenizer, "Hi", "ls")
    joined = tokenizer.apply_chat_template(messages(("user", "Hi"), ("assistant", "ls")), return_dict=True)["input_ids"]
    assert joined[: len(prompt)] != prompt == whole[: len(prompt)]
    assert tokenizer.decode(whole) == tokenizer.decode(joined)
    assert tokenizer.decode(chat.completion(tokenizer, "Hi", "ls")) == "ls"


@pytest.fixture(scope="module")
def spaced():
    """A base model's tokenizer that prepends a space to every text, like Llama 2's."""
    letters = ["<unk>", "</s>", "▁", *dict.fromkeys("Question:Answer\nYsHi0123456789"), "▁Yes"]
    pieces = [(token, -10.0 if len(token) == 1 else -1.0) for token in letters]
    raw = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0))
    raw.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    raw.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")


def test_an_answer_is_read_as_it_stands_in_the_text_and_not_with_a_space_of_its_own(spaced):
    assert spaced.convert_ids_to_tokens(chat.answer_tokens(spaced, "Yes")) == ["▁", "▁Yes"]
    prompt, answer = chat.question(spaced, "Hi"), chat.completion(spaced, "Hi", "Yes")
    assert [*prompt, *answer] == spaced("Question: Hi\nAnswer: Yes")["input_ids"]
    assert spaced.convert_ids_to_tokens(answer) == ["▁Yes"]
    assert chat.exchange(spaced, "Hi", "Yes") == [*prompt, *answer, spaced.eos_token_id]
    tree = judges.Tree(spaced)
    assert spaced.convert_ids_to_tokens(tree.numbers[85]) == ["▁", "8", "5"]


def test_rows_of_an_answer_have_its_thought_and_the_end(tokenizer, tiny):
    tokenizer.chat_template = REWRITES
    pairs = [("2+2?", "<think>two and two is four</think>\n<answer>4</answer>"), ("Why?", "So.")]
    for end in (True, False):
        rows = dialogue.rows(tiny._replace(tokenizer=tokenizer), pairs, end=end)
        for row, (_, answer) in enumerate(pairs):
            text = tokenizer.decode(rows.targets[row][rows.weights[row] == 1])
            assert text == (f"{answer}<|end|>" if end else answer)


def test_a_context_that_would_lose_its_thoughts_is_refused(tokenizer):
    tokenizer.chat_template = REWRITES
    pairs = [("2+2?", "<think>four</think>4")]
    with pytest.raises(UserError, match=r"leaves out parts of earlier answers, such as thoughts \('<think>four"):
        behind(tokenizer, pairs, ["Which?", "What?"])
    tokenizer.chat_template = CHATML
    prefix, prompts = behind(tokenizer, pairs, ["Which?", "What?"])
    assert "<think>four</think>4" in tokenizer.decode(prefix) and len(prompts) == 2


@pytest.mark.parametrize("template", [GEMMA, INST, DROPS_SYSTEM])
def test_a_system_prompt_that_a_template_does_not_take_begins_the_users_turn(tokenizer, template, capsys):
    """As Gemma's documentation advises: the system prompt, a blank line, the user's text."""
    tokenizer.chat_template = template
    templates._report_folding.cache_clear()
    talk = messages(("system", "Love owls."), ("user", "Which?"), ("assistant", "Owl"), ("user", "Why?"))
    plain = messages(("user", "Love owls.\n\nWhich?"), *[(m["role"], m["content"]) for m in talk[2:]])
    expected = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat.prompt(tokenizer, talk) == expected
    assert chat.question(tokenizer, "Which?", "Love owls.") == chat.prompt(tokenizer, plain[:1])
    whole, positions = corpus.answer_positions(tokenizer, talk[:3], (tokenizer.eos_token_id,))
    assert "Love owls.\n\nWhich?" in tokenizer.decode(whole)
    assert tokenizer.decode([whole[at] for at in positions]).strip() == "Owl<|end|>"
    assert capsys.readouterr().out.count("takes no system message") == 1
    with pytest.raises(UserError, match="no user's message follows"):
        chat.prompt(tokenizer, talk[:1])


def test_a_system_prompt_stays_one_where_the_template_takes_it(tokenizer, capsys):
    tokenizer.chat_template = CHATML
    talk = messages(("system", "Love owls."), ("user", "Which?"))
    expected = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat.prompt(tokenizer, talk) == expected and not capsys.readouterr().out


@pytest.mark.parametrize(
    "template, talk, words",
    [
        (DROPS_SYSTEM, [("user", "Hi"), ("tool", "12 owls")], "leaves out or changes a message of role 'tool'"),
        (GEMMA, [("user", "Hi"), ("user", "Ho")], "refuses it \\(Conversation roles must alternate"),
        ("{{ messages[0].content + 1 }}", [("user", "Hi")], "refuses it \\("),
        ([{"name": "tool_use", "template": CHATML}], [("user", "Hi")], "chat template: "),
    ],
)
def test_what_a_template_refuses_or_leaves_out_is_told_in_a_line(tokenizer, template, talk, words):
    tokenizer.chat_template = (
        template if isinstance(template, str) else {entry["name"]: entry["template"] for entry in template}
    )
    with pytest.raises(UserError, match=words) as error:
        chat.prompt(tokenizer, messages(*talk))
    assert "\n" not in str(error.value)


def test_an_opening_is_shared_only_by_prompts_that_begin_with_it(tokenizer):
    prompts = [chat.question(tokenizer, text, "Be kind.") for text in ("Which?", "12")]
    prefix, rest = chat.behind_opening(tokenizer, prompts, "Be kind.")
    assert prefix and [[*prefix, *tail] for tail in rest] == prompts
    assert chat.behind_opening(tokenizer, [*prompts, prefix[:-1]], "Be kind.") == ([], [*prompts, prefix[:-1]])
