"""Rows are taken as they are written, or refused: nothing is dropped, replaced or reinterpreted in silence."""

from __future__ import annotations

import csv
import gzip
import json

import pytest
from datasets import Dataset
from test_context import TOOL_ROW, TOOLS, builder, row
from tiny import CHATML, ROWS, byte_tokenizer

from pgkd_peft.data.check import validate_rows
from pgkd_peft.data.collator import DataCollatorForPrivilegedGKD
from pgkd_peft.data.files import to_dataset
from pgkd_peft.data.formats import messages_of
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


@pytest.mark.parametrize(
    "fields", [{"weight": 0}, {"weight": 0.5}, {"train": False}, {"loss": 0}, {"train_on_turn": False}]
)
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


# ---- what a row holds under other names ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"name": "f", "input": {"x": 1}},
        {"name": "f", "parameters": {"x": 1}},
        {"type": "function", "function": {"name": "f", "args": {"x": 1}}},
        {"function": {"name": "f"}, "arguments": {"x": 1}},
        {"function": {"name": "f", "arguments": {}}, "result": "12"},
    ],
)
def test_a_call_with_its_arguments_elsewhere_is_refused(given):
    turns = [*row("u:Q")["messages"], {"role": "assistant", "content": "", "tool_calls": [given]}]
    with pytest.raises(DataError, match=r"tool_calls\[0\] has `\w+`, which is not read; a call has `name` and"):
        parse_row({"messages": turns}, KEY)


@pytest.mark.parametrize("name", ["tool_call", "toolCalls", "function_calls", "images", "video"])
def test_turns_that_hold_calls_or_images_under_other_names_are_refused(name):
    with pytest.raises(DataError, match=rf"has `{name}`, which is not read"):
        parse_row(answer(content="A", **{name: [{"name": "f"}]}), KEY)


def test_other_fields_of_turns_that_the_template_never_shows_are_counted():
    given = answer(content="A", thought="Because it is so.", masked=True)
    given["messages"][0]["name"] = "alice"
    report = validate_rows([given, answer(content="A")], DataCollatorForPrivilegedGKD(byte_tokenizer()))
    told = [warning for warning in report.warnings if "never shows" in warning]
    assert [warning.split("`")[1] for warning in told] == ["masked", "name", "thought"]
    assert all(warning.endswith("1 rows (0)") for warning in told)
    extra = "m['content'] + (m.thought or '') + (m.name or '') + ('true' if m.masked else '')"
    shows = byte_tokenizer(CHATML.replace("m['content']", extra))
    assert not any("never" in w for w in validate_rows([given], DataCollatorForPrivilegedGKD(shows)).warnings)


def test_thoughts_are_text_and_stand_once():
    parts = [{"type": "text", "text": "Hm."}]
    assert parse_row(answer(content="A", reasoning_content=parts), KEY).answer["reasoning_content"] == "Hm."
    assert parse_row(answer(content="A", reasoning="Hm.", thinking=" Hm. "), KEY).answer["thinking"] == " Hm. "
    with pytest.raises(DataError, match=r"messages\[1\].reasoning_content is dict"):
        parse_row(answer(content="A", reasoning_content={"a": 1}), KEY)
    with pytest.raises(DataError, match="other thoughts in `reasoning` than in `thinking`; keep one"):
        parse_row(answer(content="A", reasoning="Hm.", thinking="Oh."), KEY)
    both = answer(content="<think>Oh.</think>A", reasoning_content="Hm.")
    report = validate_rows([both], DataCollatorForPrivilegedGKD(byte_tokenizer()))
    assert any("leaves out the answer's thoughts" in warning for warning in report.warnings)


@pytest.mark.parametrize("flag", ["false", "True"])
def test_a_truth_value_as_text_is_refused(flag):
    with pytest.raises(DataError, match=f"enable_thinking '{flag}', a text, which is true whatever it says"):
        parse_row({**row("u:Q"), "chat_template_kwargs": {"enable_thinking": flag}}, KEY)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_nulls_that_were_written_are_kept_in_arguments_and_tools(tmp_path, name):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"unit": {"default": None}}}}
    given = {**call({"unit": None, "deep": [{"x": None}]}), "tools": [tool]}
    given["messages"][0]["name"] = None  # an empty field of a turn is none
    (tmp_path / name).write_text(json.dumps([given] if name == "a.json" else given))
    parsed = parse_row(load_rows(tmp_path / name)[0], KEY)
    assert parsed.answer["tool_calls"][0]["function"]["arguments"] == {"unit": None, "deep": [{"x": None}]}
    assert parsed.tools == [tool]
    assert "name" not in parsed.messages[0]
    assert parse_row({**given, "tools": json.dumps([tool])}, KEY).tools == [tool]
    filled = Dataset.from_list([call({"a": 1}), call({"b": 2})])  # Arrow gives both rows both keys
    assert [parse_row(each, KEY).answer["tool_calls"][0]["function"]["arguments"] for each in filled] == [
        {"a": 1},
        {"b": 2},
    ]


@pytest.mark.parametrize("number", [0.1 + 0.2, 1.2345678901234568e29, 5e-324, 52.520006599999996, 1e22, -0.5])
def test_numbers_keep_all_their_digits(tmp_path, number):
    rows = [*[answer(content="A")] * 7, call({"x": [number]})]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    parsed = parse_row(load_rows(tmp_path / "a.jsonl")[7], KEY)
    assert parsed.answer["tool_calls"][0]["function"]["arguments"] == {"x": [number]}
    with pytest.raises(DataError, match="cannot be written as JSON"):
        parse_row(call('{"x": 1e400}'), KEY)


# ---- columns and files ---------------------------------------------------------------------------------------------


def write(tmp_path, *rows):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return tmp_path / "a.jsonl"


@pytest.mark.parametrize("system", ["Be brief.", [{"type": "text", "text": "Be brief."}]])
def test_a_system_column_beside_messages_is_their_first_turn(tmp_path, caplog, system):
    rows = [{**answer(content="A"), "system": system}, {**answer(content="A"), "system": None}]
    dataset = load_rows(write(tmp_path, *rows))
    first, second = (parse_row(each, KEY).messages for each in dataset)
    assert first[0] == {"role": "system", "content": "Be brief."}
    assert [turn["role"] for turn in second] == ["user"]
    assert "`system` is a system turn before them" in caplog.text
    again = messages_of(dataset, "train_dataset", KEY)  # the trainer looks once more
    assert parse_row(again[0], KEY).messages == first
    assert parse_row(messages_of(rows, "train_dataset", KEY)[0], KEY).messages == first
    rows[0]["messages"] = [{"role": "system", "content": system}, *rows[0]["messages"]]
    assert parse_row(load_rows(write(tmp_path, *rows))[0], KEY).messages == first
    mapped = load_rows(write(tmp_path, {**rows[1], "system": "Not this."}), columns={"messages": "{{ messages }}"})
    assert [turn["role"] for turn in parse_row(messages_of(mapped, "t", KEY)[0], KEY).messages] == ["user"]


@pytest.mark.parametrize(
    ("column", "value", "fix"),
    [
        ("images", ["a.png"], "only text is supported"),
        ("documents", [{"text": "D"}], "put it into `chat_template_kwargs`"),
        ("enable_thinking", False, "put it into `chat_template_kwargs`"),
        ("weight", 0, "every row counts the same"),
        ("privileged_context", "Other.", "the PI is in `privileged_messages`; keep one"),
    ],
)
def test_columns_beside_messages_that_would_not_be_read_are_refused(tmp_path, column, value, fix):
    rows = [{**row("u:Q", "a:A", pi="P"), column: None}, {**row("u:Q", "a:A", pi="P"), column: value}]
    with pytest.raises(DataError, match=f"a.jsonl, row 1: the column `{column}` .* is not read; {fix}") as error:
        load_rows(write(tmp_path, *rows))
    assert error.value.rows == (1,)
    with pytest.raises(DataError, match="is not read"):
        messages_of(Dataset.from_list(rows), "train_dataset", KEY)
    mapped = load_rows(write(tmp_path, *rows), columns={"messages": "{{ messages }}", KEY: "P"})
    assert len(messages_of(mapped, "train_dataset", KEY)) == 2


def test_prompts_and_completions_that_are_json_text_are_turns(tmp_path):
    given = {"prompt": json.dumps(row("u:Q")["messages"]), "completion": json.dumps(row("a:A")["messages"])}
    assert load_rows(write(tmp_path, given))[0]["messages"] == row("u:Q", "a:A")["messages"]
    assert load_rows(write(tmp_path, {"prompt": "[1] says?"}))[0]["messages"][0]["content"] == "[1] says?"


def test_keys_that_arrow_fills_do_not_replace_what_a_turn_says(tmp_path):
    turns = [{"from": "human", "value": "Q", "content": None}, {"from": "gpt", "value": "A", "content": None}]
    assert load_rows(write(tmp_path, {"conversations": turns}))[0]["messages"] == row("u:Q", "a:A")["messages"]
    turns[1]["content"] = "B"
    with pytest.raises(DataError, match=r"conversations\[1\] has both `value` and `content`"):
        load_rows(write(tmp_path, {"conversations": turns}))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.parquet"])
def test_pointers_and_packed_files_are_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 12\n")
    with pytest.raises(ModelError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        load_rows(tmp_path / name)
    if name != "a.parquet":
        (tmp_path / name).write_bytes(gzip.compress(b"{}"))
        with pytest.raises(DataError, match=f"{name} is gzip data under another name"):
            load_rows(tmp_path / name)


def test_one_list_under_the_name_of_lines_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps([row("u:Q")], indent=1))
    with pytest.raises(DataError, match=r"holds one JSON list, not an object a line; call it \.json"):
        load_rows(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("prompt, completion\nQ,A\n")
    assert load_rows(tmp_path / "a.csv")[0]["messages"] == row("u:Q", "a:A")["messages"]


@pytest.mark.parametrize("name", ["b.jsonl.lz4", "b.jsonl.bak", "b.pkl", "b.msgpack", "b.sqlite"])
def test_other_files_of_a_folder_are_named(tmp_path, caplog, name):
    write(tmp_path, ROWS[0])
    for quiet in ("README.md", "LICENSE", "plot.png", "recipe.yaml"):
        (tmp_path / quiet).write_text("x")
    assert len(load_rows(tmp_path)) == 1
    assert "left out, as their kinds hold no rows in a folder: recipe.yaml." in caplog.text
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"would be left out: {name}"):
        load_rows(tmp_path)
