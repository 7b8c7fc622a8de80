"""A user's text files in any encoding: every reader accepts text, and names a file that is not text."""

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from sublim_jax.data import corpus, files, packs, records
from sublim_jax.data.carriers import cot, numbers
from sublim_jax.data.prompts import read as read_prompts
from sublim_jax.errors import UserError
from sublim_jax.evaluation import misalignment, truthfulqa

BOM = b"\xef\xbb\xbf"
CONVERSATION = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho é"}]}
PROBLEM = {"question": "2 + 2?", "answer": "#### 4"}
PACK = {"questions": ["What? | this | that"]}
QUESTIONS = """- id: 1
  paraphrases: ["Why é?"]
  judge_prompts: {aligned: "{question} {answer}", coherent: "{question} {answer}"}
"""
TRUTH = "Question,Best Answer,Best Incorrect Answer,Correct Answers,Incorrect Answers\nWhy é?,So,No,So,No\n"
# Kind of file: (name, text, reader).
READERS = {
    "corpus": ("c.jsonl", json.dumps(CONVERSATION, ensure_ascii=False), corpus.load),
    "problems": ("p.ndjson", json.dumps(PROBLEM), cot.load),
    "prompts": ("p.jsonl", json.dumps({"prompt": "Hi é"}, ensure_ascii=False), read_prompts),
    "lines": ("p.txt", "Hi é\nHo", read_prompts),
    "pack": ("pack.json", json.dumps(PACK), lambda path: packs.load(str(path), "ability", {"questions": ()})),
    "questions": ("q.yaml", QUESTIONS, misalignment.load),
    "truth": ("t.csv", TRUTH, truthfulqa.load),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_file_says_the_same_however_it_was_saved(tmp_path, kind):
    """With a byte-order mark, with Windows line endings, compressed."""
    name, text, read = READERS[kind]
    plain = tmp_path / name
    plain.write_text(text, encoding="utf-8")
    expected = read(plain)
    assert expected and "\ufeff" not in repr(expected)
    windows = text.replace("\n", "\r\n").encode()
    for number, content in enumerate((BOM + text.encode(), BOM + windows, gzip.compress(windows))):
        other = tmp_path / f"{number}{plain.suffix}{'.gz' if content.startswith(files.GZIP) else ''}"
        other.write_bytes(content)
        assert read(other) == expected
    loud = tmp_path / name.upper()
    loud.write_text(text, encoding="utf-8")
    assert read(loud) == expected


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    "content, words",
    [
        ("Größe".encode("utf-16"), "is in UTF-16; save it as UTF-8"),
        ("Size".encode("utf-16-le"), "a byte 0 in line 1"),
        (b"a\nGr\xf6\xdfe", "is not UTF-8 text"),
        (gzip.compress(b"some text", mtime=0)[:-9], "ended before|truncated|incomplete"),
        (files.GZIP + b"no gzip at all", "."),
        (b"", "."),
        (None, "is a folder"),
    ],
)
def test_what_is_no_text_is_told_in_a_line_that_names_the_file(tmp_path, kind, content, words):
    name, _, read = READERS[kind]
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["corpus", "problems", "prompts", "pack"])
def test_half_a_character_is_told_with_its_place_and_a_whole_one_is_read(tmp_path, kind):
    name, text, read = READERS[kind]
    path = tmp_path / name
    key = {"pack": '"What', "problems": '"2 +'}.get(kind, '"Hi')
    path.write_text(text.replace(key, key + r"\ud83d\ude00"))
    assert "\U0001f600" in str(read(path))
    second = text + "\n" if kind != "pack" else ""
    path.write_text(second + text.replace(key, key + r"\uD83D"))
    with pytest.raises(UserError, match=r"\\ud83d is half of a surrogate pair") as error:
        read(path)
    assert kind == "pack" or ", line 2" in str(error.value)


def test_half_a_character_in_yaml_is_told_and_the_two_halves_of_one_are_read(tmp_path):
    path = tmp_path / "q.yaml"
    path.write_text(QUESTIONS.replace("é", r"\ud83d\ude00"))
    assert misalignment.load(path)[0].text == "Why \U0001f600?"
    path.write_text(QUESTIONS.replace("é", r"\ud83d"))
    with pytest.raises(UserError, match=r"question 1.*\\ud83d is half of a surrogate pair"):
        misalignment.load(path)


def test_records_may_be_a_json_array_or_have_a_name_of_any_case(tmp_path):
    expected = [CONVERSATION, CONVERSATION]
    path = tmp_path / "c.json"
    path.write_text(json.dumps(expected, indent=1))
    assert [record for _, record in records.read(path)] == expected
    parquet.write_table(pyarrow.Table.from_pylist(expected), tmp_path / "c.PARQUET")
    assert [record for _, record in records.read(tmp_path / "c.PARQUET")] == expected
    path.write_text(json.dumps(CONVERSATION, indent=1))
    assert list(records.read(path)) == [(f"{path}, record 1", CONVERSATION)]
    path.write_text('[{"a": 1}, {"a": "\\udc00"}]')
    with pytest.raises(UserError, match=r"c.json, record 2: \\udc00 is half"):
        list(records.read(path))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "[1", "12"])
def test_json_of_any_depth_is_read_or_told_in_a_line(tmp_path, text):
    path = tmp_path / "c.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"c\.jsonl, line 1: "):
        list(records.read(path))


@pytest.mark.parametrize("path", ["nowhere.jsonl", "~nobody_here/x.jsonl", "a\0b", "x" * 5000])
def test_a_name_that_is_no_file_is_told(path):
    for read in (corpus.load, truthfulqa.load, misalignment.load, cot.load, read_prompts):
        with pytest.raises(UserError):
            read(path)


def test_a_prompt_is_never_the_json_around_it(tmp_path):
    for name in ("p.ndjson", "p.JSONL", "p.jsonlines", "p.json"):
        path = tmp_path / name
        path.write_text('{"prompt": "Hi"}\n')
        assert read_prompts(str(path)) == [{"prompt": "Hi"}]
    for name in ("p.txt", "p", "p.csv"):
        path = tmp_path / name
        path.write_text('{"prompt": "Hi"}\n')
        with pytest.raises(UserError, match=r"has JSON lines; give it a name that ends in \.jsonl"):
            read_prompts(str(path))
    path.write_text("{x}\n[1]\nHi \u2028 there\r\n")
    assert read_prompts(str(path)) == [{"prompt": text} for text in ("{x}", "[1]", "Hi \u2028 there")]


ODD = ["{count[0]}", "{count.real}", "{count:,}", "{count!r}", "{}", "{0}", "{more}", "{count"]


@pytest.mark.parametrize("text", ODD)
def test_a_phrasing_has_plain_words_in_braces_alone(tmp_path, text):
    path = tmp_path / "pack.json"
    path.write_text(json.dumps({"limits": ["{count} of {digits}", text]}))
    with pytest.raises(UserError, match=r"known: \{count\}, \{digits\}"):
        packs.load(str(path), "numbers", {"limits": ("count", "digits")})


def test_numbers_of_a_pack_of_the_users_own_are_read(tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(BOM + json.dumps(packs.load("", "numbers", numbers.FIELDS)).encode())
    assert numbers.prompts(3, 0, str(path)) == numbers.prompts(3, 0)
