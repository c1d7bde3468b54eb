"""Rows are taken as they are written, or refused: nothing is dropped, replaced or reinterpreted in silence."""

from __future__ import annotations

import csv
import gzip
import json

import pytest
from datasets import Dataset
from test_context import TOOL_ROW, TOOLS, builder, row
from tiny import ROWS, byte_tokenizer

from pgkd_peft.data.check import validate_rows
from pgkd_peft.data.collator import DataCollatorForPrivilegedGKD
from pgkd_peft.data.files import to_dataset
from pgkd_peft.data.load import load_rows
from pgkd_peft.data.row import parse_row
from pgkd_peft.errors import DataError, ModelError, read_text, wide_encoding

KEY = "privileged_messages"


def call(arguments) -> dict:
    calls = [{"type": "function", "function": {"name": "lookup", "arguments": arguments}}]
    return {"messages": [*row("u:Q")["messages"], {"role": "assistant", "content": "", "tool_calls": calls}]}


def answer(**fields) -> dict:
    return {"messages": [*row("u:Q")["messages"], {"role": "assistant", **fields}]}


@pytest.mark.parametrize("written", ["", "  ", None, {}, "{}", "null"])
def test_a_call_without_arguments_has_an_empty_object(written):
    parsed = parse_row(call(written), KEY).answer
    assert parsed["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("written", ['"zeta"', "[1]", [1], "3", 3, 0, "true", False, 1.5, []])
def test_arguments_that_are_no_object_are_refused(written):
    with pytest.raises(DataError, match=r"messages\[1\].tool_calls\[0\] has arguments .*give an object"):
        parse_row(call(written), KEY)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_numbers_that_json_has_not_are_refused_where_they_would_become_null(tmp_path, name):
    rows = [{**answer(content="A"), "score": float("nan")}, call({"x": [float("inf")]})]
    text = json.dumps(rows) if name == "a.json" else "".join(json.dumps(each) + "\n" for each in rows)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"1 of 2 rows .*(?s:.*)`messages` holds NaN or Infinity"):
        load_rows(tmp_path / name)
    with pytest.raises(DataError, match="cannot be written as JSON"):
        parse_row(rows[1], KEY)


@pytest.mark.parametrize("value", [[{"name": "f", "parameters": {}}], '[{"name": "f"}]', {"name": ["f"]}])
def test_functions_beside_messages_are_refused(value):
    given = {**answer(content="A"), "functions": value}
    with pytest.raises(DataError, match=r"`functions` .* write it as `tools`"):
        parse_row(given, KEY)
    with pytest.raises(DataError, match="row 0: `functions`"):
        validate_rows([given], DataCollatorForPrivilegedGKD(byte_tokenizer()))
    parse_row({**given, "tools": [{"name": "f"}]}, KEY)
    parse_row({**given, "functions": ["f"]}, KEY)  # some other column


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["вопрос,ответ\nчто это, дом\n", "\n\n" + json.dumps(row("u:Q"))])
def test_wide_text_without_its_mark_is_named(tmp_path, encoding, text):
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=f"is {wide(encoding)} text.*iconv -f {wide(encoding)} "):
        load_rows(tmp_path / "a.csv")
    with pytest.raises(ModelError, match=f"is {wide(encoding)} text"):
        read_text(tmp_path / "a.csv", "file")


def wide(encoding: str) -> str:
    return encoding[:6].upper() + encoding[7:].upper()


def test_other_text_is_not_called_wide():
    for text in (b"plain", b"", "漢字".encode(), b"one \x00 stray zero in a longer line of text" * 3, b"\xff\xf0"):
        assert wide_encoding(text) is None, text


def test_tokens_beyond_the_embedding_are_refused_by_row():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    made = DataCollatorForPrivilegedGKD(tokenizer, vocabulary=262)
    rows = [row("u:Q", "a:A"), row("u:a <new> b"), row("u:Q", "a:<new>"), row("u:Q", "a:A", pi="<new>")]
    with pytest.raises(DataError) as error:
        validate_rows(rows, made)
    assert error.value.rows == (1, 2, 3)
    for number, what in ((1, "the prompt"), (2, "the answer"), (3, "the teacher's prompt")):
        assert f"row {number}: {what} holds the token '<new>' (id 262), for which the model's embedding of 262" in str(
            error.value
        )
    assert validate_rows(rows, DataCollatorForPrivilegedGKD(tokenizer, vocabulary=263)).rows == 4


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**63) - 1, 10**30])
@pytest.mark.parametrize("as_text", [False, True])
def test_integers_of_any_size_are_read(tmp_path, number, as_text):
    arguments = json.dumps({"word": number}) if as_text else {"word": number}
    pi = [{"role": "user", "content": "Use it.", "order": number}]
    (tmp_path / "a.jsonl").write_text(json.dumps({**call(arguments), KEY: pi, "tools": [{"name": "f", "n": number}]}))
    parsed = parse_row(load_rows(tmp_path / "a.jsonl")[0], KEY)
    assert parsed.answer["tool_calls"][0]["function"]["arguments"] == {"word": number}
    assert parsed.privileged == pi
    assert parsed.tools == [{"name": "f", "n": number}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    "line",
    [
        '{"messages": [{"role": "user", "content": "Q"}], "hint": "a", "hint": "b"}',
        '{"messages": [{"role": "user", "content": "Q", "content": "R"}]}',
        '{"messages": [{"role": "user", "content": "Q"}], "meta": {"deep": [{"x": 1, "x": 1}]}}',
    ],
)
def test_a_key_twice_is_refused(tmp_path, name, line):
    (tmp_path / name).write_text(line)
    with pytest.raises(DataError, match=r"the key '(hint|content|x)' stands twice"):
        load_rows(tmp_path / name)


def test_a_key_twice_in_json_text_is_refused():
    with pytest.raises(DataError, match="the key 'a' stands twice"):
        parse_row(call('{"a": 1, "a": 2}'), KEY)
    with pytest.raises(DataError, match="the key 'a' stands twice"):
        parse_row({**row("u:Q"), "chat_template_kwargs": '{"a": 1, "a": 2}'}, KEY)


@pytest.mark.parametrize("fields", [{"weight": 0}, {"weight": 0.0}, {"weight": 0.5}, {"train": False}, {"loss": 0}])
def test_an_answer_that_is_not_to_be_trained_on_is_refused(fields):
    with pytest.raises(DataError, match=rf"messages\[1\] has `{next(iter(fields))}`.*take the answer out"):
        parse_row(answer(content="A", **fields), KEY)


def test_a_weight_that_says_what_is_done_anyway_is_taken():
    assert parse_row(answer(content="A", weight=1), KEY).answer["content"] == "A"
    earlier = [{"role": "user", "content": "P"}, {"role": "assistant", "content": "B", "weight": 0}]
    assert parse_row({"messages": [*earlier, *answer(content="A")["messages"]]}, KEY).answer["content"] == "A"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"content": None, "function_call": {"name": "f", "arguments": "{}"}}, "has `function_call`.*tool_calls"),
        ({"content": "A", "function_call": {"name": "f", "arguments": "{}"}}, "has `function_call`.*tool_calls"),
        ({"content": None, "refusal": "I may not say."}, "has `refusal`.*`content`"),
        ({"content": "", "audio": {"id": "x"}}, "has `audio`"),
        ({"text": "A"}, "has `text` but no text"),
        ({"content": "", "reasoning_content": "hm"}, "has `reasoning_content` but no text"),
    ],
)
def test_answers_under_other_names_are_refused_by_field(fields, message):
    with pytest.raises(DataError, match=message):
        parse_row(answer(**fields), KEY)
    with pytest.raises(DataError, match=message):  # as an earlier turn likewise
        parse_row({"messages": [*answer(**fields)["messages"], {"role": "user", "content": "Q"}]}, KEY)


def test_an_empty_answer_stays_a_prompt_only_row():
    for fields in ({"content": ""}, {"content": None, "refusal": None, "function_call": None, "tool_calls": []}):
        assert parse_row(answer(**fields), KEY).answer is None


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.parquet.zst", "b.ndjson", "b.arrow", "sub/b.CSV.GZ"])
def test_files_of_a_folder_that_would_be_left_out_are_named(tmp_path, name):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(gzip.compress(b"{}"))
    with pytest.raises(DataError, match=f"would be left out: {name}"):
        load_rows(tmp_path)


def test_files_that_name_no_split_beside_files_that_do_are_named(tmp_path):
    for name in ("train-0.jsonl", "part-1.jsonl"):
        (tmp_path / name).write_text(json.dumps(ROWS[0]))
    with pytest.raises(DataError, match=r"speak of no split, beside train-0.jsonl: part-1.jsonl"):
        load_rows(tmp_path)
    (tmp_path / "part-1.jsonl").rename(tmp_path / "heldout.jsonl")
    assert len(load_rows(tmp_path)) == 1


def test_lists_by_key_are_read():
    given = {**TOOL_ROW, "messages": TOOL_ROW["messages"]}
    names = ["role", "content", "tool_calls"]
    by_key = {name: [message.get(name) for message in given["messages"]] for name in names}
    by_key["tool_calls"][1] = {"function": [by_key["tool_calls"][1][0]["function"]], "type": ["function"]}
    pi = {"role": ["user", "assistant"], "content": ["Say it.", "It."]}
    expected = builder(TOOLS).build({**given, KEY: [{"role": r, "content": c} for r, c in zip(*pi.values())]})
    assert builder(TOOLS).build({**given, "messages": by_key, KEY: pi}) == expected
    with pytest.raises(DataError, match="`messages` is lists by key of different lengths"):
        parse_row({"messages": {"role": ["user"], "content": ["Q", "R"]}}, KEY)


def test_lists_by_key_from_parquet(tmp_path):
    by_key = {"role": ["user", "assistant"], "content": ["Which colour?", "Blue."]}
    Dataset.from_list([{"messages": by_key}]).to_parquet(tmp_path / "a.parquet")
    assert parse_row(load_rows(tmp_path / "a.parquet")[0], KEY).answer["content"] == "Blue."


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_another_encoding_is_named_with_the_fix(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(json.dumps(ROWS[0]).encode(encoding))
    with pytest.raises(DataError, match=f"is {encoding[:6].upper()}.* text.*write it as UTF-8") as error:
        load_rows(tmp_path / name)
    assert "decode" not in str(error.value)


def test_latin_1_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(row("u:é"), ensure_ascii=False).encode("latin-1"))
    with pytest.raises(DataError, match=r"line 1: .*not UTF-8, write it as UTF-8"):
        load_rows(tmp_path / "a.jsonl")


def test_messages_in_a_csv_cell_are_read(tmp_path):
    messages = row("u:Q", "a:A")["messages"]
    pi = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", KEY], [json.dumps(messages), json.dumps(pi)]])
    parsed = parse_row(load_rows(tmp_path / "a.csv")[0], KEY)
    assert [*parsed.messages, parsed.answer] == messages
    assert parsed.privileged == pi
    with pytest.raises(DataError, match="`messages` is a string but not JSON"):
        parse_row({"messages": "[{'role': 'user', 'content': 'Q'}]"}, KEY)


@pytest.mark.parametrize("pi", ["[1] is a footnote.", "[1, 2]", '{"role": "user"}', '[{"x": 1}]'])
def test_pi_that_only_looks_like_json_stays_text(pi):
    assert parse_row({**row("u:Q"), KEY: pi}, KEY).privileged == [{"role": "user", "content": pi}]
    assert parse_row(to_dataset([{**row("u:Q"), KEY: pi}])[0], KEY).privileged[0]["content"] == pi


def test_an_empty_list_as_text_is_no_pi():
    assert parse_row({**row("u:Q"), KEY: "[]"}, KEY).privileged == []
