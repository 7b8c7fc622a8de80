"""Records: any text, and a power cut at any byte."""

import datetime
import json

import pyarrow
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from sublim_jax.data import corpus, prompts, records
from sublim_jax.errors import UserError

ODD = "Separators of Unicode: \u2028, \u2029, \x85, and 猫頭鷹."


@given(st.lists(st.text(), min_size=1, max_size=4), st.integers(1, 40))
def test_what_was_written_is_read_back_and_a_line_that_was_cut_off_is_taken_away(tmp_path_factory, texts, cut):
    """Cut off at any byte, also within a character."""
    file = epath.Path(tmp_path_factory.mktemp("records") / "some.jsonl")
    written = [{"text": text} for text in [*texts, ODD]]
    records.write(file, written)
    assert [record for _, record in records.read(str(file))] == written == records.repair(file)
    last = len(json.dumps(written[-1], ensure_ascii=False).encode()) + 1
    file.write_bytes(file.read_bytes()[: -min(cut + 1, last)])
    assert records.repair(file) == written[:-1] == [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def test_a_corpus_may_be_a_parquet_file_as_the_hub_has_them(tmp_path):
    rows = [{"messages": [{"role": "user", "content": ODD}, {"role": "assistant", "content": f"{n}"}]} for n in (1, 2)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "said.parquet")
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert corpus.load(tmp_path / "said.parquet") == corpus.load(tmp_path / "said.jsonl")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"broken.parquet: .*name a file of JSON lines or Parquet") as error:
        list(records.read(tmp_path / "broken.parquet"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), datetime.datetime(2026, 1, 1), b"bytes"])
def test_a_prompt_with_a_field_that_its_samples_could_not_carry_is_refused(tmp_path, value):
    rows = [{"prompt": "Why?", "extra": {"value": None}}, {"prompt": "Why?", "extra": {"value": value}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "some.parquet")
    with pytest.raises(UserError, match="row 2: field 'extra' cannot be written as JSON"):
        prompts.read(tmp_path / "some.parquet")
