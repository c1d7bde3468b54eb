"""Loading, column mapping, and the one report on all bad rows."""

from __future__ import annotations

import copy
import json
import random

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet
from test_context import TOOL_ROW, TOOLS, WEATHER, row
from tiny import CHATML, DROPPING, ROWS, STRICT, byte_tokenizer

from pgkd_peft.data import load as data
from pgkd_peft.data.check import fingerprint, validate_rows
from pgkd_peft.data.collator import DataCollatorForPrivilegedGKD
from pgkd_peft.data.columns import ColumnMap
from pgkd_peft.data.files import to_dataset
from pgkd_peft.data.load import load_rows, map_columns
from pgkd_peft.errors import ConfigError, DataError, PGKDError


def collator(template: str = CHATML, **kwargs) -> DataCollatorForPrivilegedGKD:
    return DataCollatorForPrivilegedGKD(byte_tokenizer(template), **kwargs)


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def fails(expected_kind, function, *args, **kwargs) -> str:
    with pytest.raises(expected_kind) as error:
        function(*args, **kwargs)
    return str(error.value)


QA = [
    {"question": "2+2?", "answer": "4", "solution": "Two and two.", "id": 7},
    {"question": "Sky?", "answer": "blue", "solution": None, "id": 8},
]
QA_COLUMNS = {
    "messages": [{"role": "user", "content": "{{ question }}"}, {"role": "assistant", "content": "{{ answer }}"}],
    "privileged_messages": "Worked solution:\n{{ solution }}",
}


# --- loading -----------------------------------------------------------------------------------------------------


def test_jsonl_rows_come_back_as_written(tmp_path):
    """Rows of different shape: PI as text and as messages, tools of different types, keys that others lack."""
    other = {"type": "function", "function": {"name": "f", "parameters": {"x": {"enum": [1, "a", None]}}}}
    rows = [*ROWS, TOOL_ROW, {**row("u:Q", pi="42"), "tools": [other], "chat_template_kwargs": {"a": 1}, "n": 5}]
    dataset = load_rows(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert isinstance(dataset, Dataset)
    assert [{k: v for k, v in r.items() if v is not None} for r in dataset] == rows
    assert dataset.select([5, 0])[0]["tools"] == [other]


def test_columns_keep_their_values_whatever_their_types():
    values = {
        "text": ["1", "null", None],
        "number": [1, 2.5, None],
        "flag": [True, 1, False],
        "huge": [2**70, 1, None],
        "whole": [1, -5, None],
        "mixed": ["1", 1, [None, {"a": "2"}]],
        "nothing": [None, None, None],
    }
    rows = [dict(zip(values, column)) for column in zip(*values.values())]
    del rows[2]["nothing"]
    dataset = to_dataset(rows)
    for name, expected in values.items():
        if name == "huge":  # beyond 64 bits: kept as text rather than lost
            expected = [str(2**70), 1, None]
        assert [(value, type(value)) for value in dataset[name]] == [(value, type(value)) for value in expected]


def test_files_that_hold_the_same_rows_give_the_same_data(tmp_path):
    rows = ROWS[:2]
    jsonl = load_rows(write_jsonl(tmp_path / "a.jsonl", rows))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text((tmp_path / "a.jsonl").read_text())
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes() + b"\n\n")
    parquet.write_table(pa.table({"messages": [r["messages"] for r in rows]}), tmp_path / "c.parquet")
    Dataset.from_list([{"messages": r["messages"]} for r in rows]).save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"train": jsonl, "test": jsonl.select([0])}).save_to_disk(str(tmp_path / "dict"))
    for name in ("b.json", "lines.json", "bom.jsonl", "dict"):
        assert fingerprint(load_rows(tmp_path / name)) == fingerprint(jsonl) == fingerprint(rows)
    for name in ("c.parquet", "saved"):
        assert fingerprint(load_rows(tmp_path / name)) == fingerprint([{"messages": r["messages"]} for r in rows])
    assert len(load_rows(tmp_path / "dict", split="test")) == 1
    assert "no split 'dev'; it has: train, test" in fails(DataError, load_rows, tmp_path / "dict", split="dev")


def test_fingerprint_depends_on_rows_and_their_order():
    prints = {fingerprint(rows) for rows in (ROWS, ROWS[::-1], ROWS[:3], [{**ROWS[0], "messages": []}, *ROWS[1:]])}
    assert len(prints) == 4
    assert fingerprint([{**ROWS[0], "id": 1}]) == fingerprint(ROWS[:1])
    filled = {"messages": [{"role": "user", "content": "Q", "tool_calls": None}]}
    reordered = {"privileged_messages": None, "messages": [{"content": "Q", "role": "user"}]}
    assert fingerprint([filled]) == fingerprint([row("u:Q")]) == fingerprint([reordered])


def test_csv_cells_stay_text(tmp_path):
    (tmp_path / "q.csv").write_text('question,answer,solution\n"a, b?",007,\n"line\nbreak",1.50,x\n', encoding="utf-8")
    dataset = load_rows(tmp_path / "q.csv", columns=QA_COLUMNS)
    assert dataset[0]["messages"] == row("u:a, b?", "a:007")["messages"]
    assert dataset[1]["messages"][1]["content"] == "1.50"
    assert [r["privileged_messages"] for r in dataset] == ["", "Worked solution:\nx"]
    (tmp_path / "q.tsv").write_text("\ufeffquestion\tanswer\tsolution\na, b?\t007\t\n")
    assert load_rows(tmp_path / "q.tsv", columns=QA_COLUMNS)[0]["messages"] == row("u:a, b?", "a:007")["messages"]


def test_a_directory_is_split_by_names(tmp_path):
    write_jsonl(tmp_path / "train-1.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "train-2.jsonl", ROWS[2:])
    (tmp_path / "validation").mkdir()
    write_jsonl(tmp_path / "validation" / "part.jsonl", ROWS[:1])
    (tmp_path / ".hidden.jsonl").write_text("broken")
    (tmp_path / "README.md").write_text("x")
    assert fingerprint(load_rows(tmp_path)) == fingerprint(ROWS)
    assert len(load_rows(tmp_path, split="validation")) == 1
    assert "no file for the split 'test'; it has: train-1.jsonl" in fails(DataError, load_rows, tmp_path, split="test")
    (tmp_path / "train-1.csv").write_text("messages\nx\n")
    assert "mixes kinds of files" in fails(DataError, load_rows, tmp_path)


def test_a_directory_without_split_names_is_the_train_split(tmp_path):
    write_jsonl(tmp_path / "constraints.jsonl", ROWS)  # "train" inside a word is no split name
    assert len(load_rows(tmp_path)) == 4
    assert "no file for the split 'test'" in fails(DataError, load_rows, tmp_path, split="test")


@pytest.mark.parametrize(("split", "kept"), [("train[:3]", [0, 1, 2]), ("train[50%:]", [2, 3]), ("train[-1:]", [3])])
def test_a_sliced_split(tmp_path, split, kept):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert fingerprint(load_rows(path, split=split)) == fingerprint([ROWS[i] for i in kept])


def test_what_cannot_be_loaded_is_told(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert f"did you mean {path}?" in fails(DataError, load_rows, tmp_path / "row.jsonl")
    assert "no such file" in fails(DataError, load_rows, "./nowhere/data")
    assert "its only split is `train`; asked for was 'test'" in fails(DataError, load_rows, path, split="test")
    assert "write it like train[:100]" in fails(DataError, load_rows, path, split="train[a:b]")
    (tmp_path / "notes.rtf").write_text("x")
    assert "unknown kind of file; accepted are .jsonl" in fails(DataError, load_rows, tmp_path / "notes.rtf")
    (tmp_path / "empty").mkdir()
    assert "has no data files" in fails(DataError, load_rows, tmp_path / "empty")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    assert "x.parquet: not a readable Parquet file" in fails(DataError, load_rows, tmp_path / "x.parquet")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{}")
    assert "cannot be read as a saved data set" in fails(DataError, load_rows, tmp_path / "broken")

    def offline(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(data, "load_dataset", offline)
    message = fails(DataError, load_rows, "someone/something")
    assert "'someone/something' cannot be loaded: Couldn't reach the Hub long story Give a file" in message


def test_a_hub_data_set_is_asked_for_as_given(monkeypatch):
    asked = []

    def load(name, config_name, *, split):
        asked.append((name, config_name, split))
        return Dataset.from_list(ROWS[:1])

    monkeypatch.setattr(data, "load_dataset", load)
    assert len(load_rows("a/b", split="train[:1]", config_name="main")) == 1
    assert asked == [("a/b", "main", "train[:1]")]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
@pytest.mark.parametrize("text", ["", "\n  \n", "\ufeff"])
def test_an_empty_file(tmp_path, suffix, text):
    (tmp_path / f"e.{suffix}").write_text(text, encoding="utf-8")
    assert f"e.{suffix} is empty" in fails(DataError, load_rows, tmp_path / f"e.{suffix}")


def test_files_without_rows(tmp_path):
    (tmp_path / "e.json").write_text("[]")
    assert "is empty" in fails(DataError, load_rows, tmp_path / "e.json")
    (tmp_path / "e.csv").write_text("question,answer\n")
    assert "is empty" in fails(DataError, load_rows, tmp_path / "e.csv")
    parquet.write_table(pa.table({"messages": pa.array([], pa.string())}), tmp_path / "e.parquet")
    assert "has no rows" in fails(DataError, load_rows, tmp_path / "e.parquet")


def test_all_broken_lines_of_a_jsonl_file_are_listed(tmp_path):
    good = json.dumps(ROWS[0]).encode()
    lines = [
        good,
        b'{"messages": [',
        b"",
        good,
        b"[1, 2]",
        b"\xff\xfe{}",
        b'{"messages": "\\ud800"}',
        b"[" * 100_000,
        good,
    ]
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(lines))
    message = fails(DataError, load_rows, tmp_path / "b.jsonl")
    assert "5 of 8 rows cannot be used (row numbers start at 0)" in message
    assert "row 1: b.jsonl line 2: Expecting value (column 15)" in message
    assert "row 3: b.jsonl line 5: list, not an object" in message
    assert "row 4: b.jsonl line 6: 'utf-8' codec can't decode byte 0xff" in message
    assert "row 5: b.jsonl line 7: has a lone surrogate" in message
    assert "row 6: b.jsonl line 8: " in message
    assert len(message.splitlines()) == 6


def test_broken_lines_and_malformed_rows_are_in_one_report(tmp_path):
    good = json.dumps(ROWS[0])
    bad = json.dumps({"messages": [{"role": "bot", "content": "x"}]})
    (tmp_path / "b.jsonl").write_text("\n".join([good, "{", bad, good, '{"messages": []}']))
    with pytest.raises(DataError) as error:
        load_rows(tmp_path / "b.jsonl")
    assert error.value.rows == (1, 2, 4)
    message = str(error.value)
    assert "row 1: b.jsonl line 2: Expecting property name" in message
    assert "row 2: messages[0] has role 'bot'" in message
    assert "row 4: `messages` is empty" in message
    with pytest.raises(DataError) as error:  # before mapping, no row is malformed
        load_rows(tmp_path / "b.jsonl", columns=QA_COLUMNS)
    assert error.value.rows == (1,)


def test_broken_json_and_csv_files(tmp_path):
    (tmp_path / "b.json").write_text('[\n {"messages": []},\n {"messages": }\n]')
    assert "broken JSON: Expecting value (line 3, column 15)" in fails(DataError, load_rows, tmp_path / "b.json")
    (tmp_path / "c.json").write_text('[{"messages": []}, 5, "x"]')
    message = fails(DataError, load_rows, tmp_path / "c.json")
    assert "row 1: c.json: int, not an object" in message
    assert "row 2: c.json: str, not an object" in message
    (tmp_path / "d.json").write_text('{\n"data": []\n}')
    assert "holds a dict; a .json file must be a list of rows" in fails(DataError, load_rows, tmp_path / "d.json")
    (tmp_path / "e.csv").write_text("a,b\n1,2\n1,2,3\n1\n")
    message = fails(DataError, load_rows, tmp_path / "e.csv")
    assert "row 1: e.csv line 3: 3 cells, the header has 2" in message
    assert "row 2: e.csv line 4: 1 cells, the header has 2" in message
    (tmp_path / "f.csv").write_text("a,a\n1,2\n")
    assert "names a column twice" in fails(DataError, load_rows, tmp_path / "f.csv")
    (tmp_path / "g.csv").write_bytes(b"a,b\n\xff,2\n")
    assert "not UTF-8" in fails(DataError, load_rows, tmp_path / "g.csv")
    (tmp_path / "h.csv").write_text('a,b\n"x"y,2\n')
    assert "line 2: " in fails(DataError, load_rows, tmp_path / "h.csv")


def test_a_csv_cell_longer_than_the_modules_limit(tmp_path):
    (tmp_path / "long.csv").write_text("question,answer\n" + "x" * 200_000 + ",y\n")
    columns = {"messages": QA_COLUMNS["messages"]}
    assert len(load_rows(tmp_path / "long.csv", columns=columns)[0]["messages"][0]["content"]) == 200_000


def test_no_messages_column(tmp_path):
    path = write_jsonl(tmp_path / "qa.jsonl", QA)
    message = fails(DataError, load_rows, path)
    assert (
        "has no column `messages`; its columns are: question, answer, solution, id. Map them with `columns:`" in message
    )
    path = write_jsonl(tmp_path / "typo.jsonl", [{"mesages": []}])
    assert "(nearest: `mesages`)" in fails(DataError, load_rows, path)


# --- columns -----------------------------------------------------------------------------------------------------


def test_columns_are_mapped_and_others_kept(tmp_path):
    dataset = load_rows(write_jsonl(tmp_path / "qa.jsonl", QA), columns=QA_COLUMNS)
    assert dataset[0] == {
        **QA[0],
        "messages": row("u:2+2?", "a:4")["messages"],
        "privileged_messages": "Worked solution:\nTwo and two.",
    }
    assert dataset[1]["privileged_messages"] == ""  # no heading without a solution
    report = validate_rows(dataset, collator(), require_completion=True)
    assert (report.rows, report.rows_with_privileged) == (2, 1)


def test_mapping_whole_columns_constants_and_expressions():
    rows = [
        {"conv": ROWS[0]["messages"], "hints": [{"role": "user", "content": "H"}], "n": 3, "tags": ["a", "b"]},
        {"conv": ROWS[3]["messages"], "hints": None, "n": 4, "tags": []},
    ]
    columns = {
        "messages": "{{ conv }}",
        "privileged_messages": "{{hints}}",
        "chat_template_kwargs": {"enable_thinking": False, "date": "{{ n }} May"},
        "label": "{{ n }}",
        "mixed": "{{ n }}, {{ hints }}!\n",
        "listed": ["{{ tags }}"],
        "tagged": "{% for t in tags %}<{{ t }}>{% endfor %}{{ conv[0].content | upper }}",
    }
    dataset = map_columns(to_dataset(rows), columns)
    assert dataset[0]["messages"] == ROWS[0]["messages"]
    assert dataset[0]["privileged_messages"] == rows[0]["hints"]
    assert not dataset[1]["privileged_messages"]
    assert dataset[0]["chat_template_kwargs"] == {"enable_thinking": False, "date": "3 May"}
    assert dataset[1]["label"] == "4"
    assert dataset[1]["mixed"] == "4, !\n"
    assert dataset[0]["listed"] == ["['a', 'b']"]
    assert [r["tagged"] for r in dataset] == ["<a><b>WHAT IS QUICKSORT?", "BE BRIEF."]


def test_a_mapped_column_replaces_one_of_its_name():
    rows = [{"messages": "Hi", "x": 1}]
    dataset = map_columns(to_dataset(rows), {"messages": [{"role": "user", "content": "{{ messages }}!"}]})
    assert dataset[0] == {"x": 1, "messages": [{"role": "user", "content": "Hi!"}]}
    dataset = map_columns(to_dataset([{"q": "Hi"}]), {"q": "{{ q }}!"})  # no column is left over
    assert dataset[:] == {"q": ["Hi!"]}


def test_a_slice_is_mapped_in_its_own_order(tmp_path):
    path = write_jsonl(tmp_path / "qa.jsonl", [*QA, {**QA[0], "answer": "four"}])
    dataset = load_rows(path, split="train[1:]", columns=QA_COLUMNS)
    assert [r["messages"][1]["content"] for r in dataset] == [r["answer"] for r in dataset] == ["blue", "four"]


def test_a_template_sees_every_column_it_names():
    dataset = map_columns(to_dataset(QA), {"messages": "{{ question }}={{ answer }}"})
    assert [r["messages"] for r in dataset] == ["2+2?=4", "Sky?=blue"]


def test_values_are_never_run_as_templates():
    dataset = map_columns(to_dataset([{"q": "{{ 6 * 7 }}"}]), {"messages": "{{ q }}", "other": "> {{ q }}"})
    assert dataset[0]["messages"] == "{{ 6 * 7 }}"
    assert dataset[0]["other"] == "> {{ 6 * 7 }}"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"messages": "{{ qestion }}"},
            "columns.messages uses the column 'qestion', which the data does not have; did you",
        ),
        ({"messages": [{"role": "user", "content": "{{ x }}"}]}, "columns.messages[0].content uses the column 'x'"),
        ({"messages": "{{ question"}, "columns.messages is not a valid template: unexpected end of template"),
        ({"messages": "{{ question | nope }}"}, "is not a valid template: No filter named 'nope'"),
        ({}, "columns is {}"),
        ("messages", "columns is 'messages'"),
    ],
)
def test_faults_of_the_mapping(columns, expected):
    assert expected in fails(ConfigError, map_columns, to_dataset(QA), columns)


def test_rows_that_a_template_fails_for_are_listed():
    rows = [{"m": {"a": "x"}}, {"m": {"b": "x"}}, {"m": {"a": "y"}}, {"m": {"b": "z"}}]
    with pytest.raises(DataError) as error:
        map_columns(to_dataset(rows), {"messages": "{{ m.a }}!"})
    assert error.value.rows == (1, 3)
    assert "2 of 4 rows cannot be used" in str(error.value)
    assert "rows 1, 3: columns.messages cannot be rendered: 'dict object' has no attribute 'a'" in str(error.value)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ q.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ q.format.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{% set x = lipsum.__globals__['os'] %}{{ x }}",
        "{{ '{0.__class__}'.format(q) }}",
        "{{ l.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ (q | attr('__class__')) }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_templates_are_sandboxed(attack):
    try:
        made = ColumnMap({"out": attack}, ["q", "l"])({"q": "text", "l": [1]})
    except PGKDError:
        return
    assert made["out"] in ("", "text")


# --- the report --------------------------------------------------------------------------------------------------


def test_a_report_on_good_rows():
    rows = [*ROWS, row("u:The secret is here.", pi="secret is here"), row("u:a <|im_end|> b", pi="a")]
    c = collator(max_privileged_length=20, allow_privileged_cut=True)
    report = validate_rows(rows, c)
    assert report.rows == 6
    assert report.kept == list(range(6))
    assert report.rows_with_privileged == 5
    assert report.prompt_only == 2
    assert report.privileged_tokens == [20, 18, 0, 19, 14, 1]
    assert report.privileged_tokens_cut == [21, 0, 0, 0, 0, 0]
    assert report.rows_cut == 1
    assert report.leaks == [4]
    assert report.markup == [5]
    assert report.fingerprint == fingerprint(rows)
    encoded = [c.encode(r) for r in rows]
    assert report.prompt_lengths == [len(e["student_ids"]) for e in encoded]
    assert report.teacher_prompt_lengths == [len(e["teacher_ids"]) for e in encoded]
    assert report.completion_lengths == [len(e["completion_ids"]) for e in encoded]
    summary = report.summary()
    assert "6 rows, 5 with PI, 2 without an answer" in summary
    assert "warning: 21 PI tokens of 1 rows are over max_privileged_length" in summary
    assert "the PI of 1 rows stands in the student's prompt as well: rows 4" in summary
    assert "the text of 1 rows holds special tokens, which act as markup: 5" in summary


def test_a_missing_pi_column_is_warned_of():
    rows = [{**row("u:Q", "a:A"), "priviledged_messages": "P"}]
    (warning,) = validate_rows(rows, collator()).warnings
    assert "no row has PI (there is no column 'privileged_messages' (nearest: `priviledged_messages`))" in warning
    assert not validate_rows(ROWS, collator()).warnings


def test_one_report_lists_all_bad_rows_with_their_fixes():
    """Rows of every kind at once: structure, template, length and missing answer."""
    rows = [
        ROWS[0],
        5,
        {"messages": []},
        row("u:Q", "a:A"),
        {"messages": [{"role": "human", "content": "Q"}]},
        row("u:" + "Q" * 500, "a:A"),
        {"messages": []},
        row("u:Q"),
        {"messages": []},
        row("u:Q", "a:" + "A" * 300),
    ]
    with pytest.raises(DataError) as error:
        validate_rows(rows, collator(max_length=300), require_completion=True)
    assert error.value.rows == (1, 2, 4, 5, 6, 7, 8, 9)
    lines = str(error.value).splitlines()
    assert lines[0] == "8 of 10 rows cannot be used (row numbers start at 0):"
    assert lines[1] == "  row 1: a row must be a dict of columns, this one is int 5"
    assert lines[2] == "  rows 2, 6, 8: `messages` is empty; give at least a user turn"
    assert lines[3].startswith("  row 4: messages[0] has role 'human'; accepted are")
    assert lines[4].startswith("  row 5: the prompt has 5")
    assert lines[4].endswith("max_length is 300; raise max_length or shorten it")
    assert lines[5].startswith("  row 7: no reference answer")
    assert lines[5].endswith("which lmbda < 1 trains on; add one, or set lmbda to 1")
    assert lines[6].startswith("  row 9: prompt and answer have ")
    assert len(lines) == 7


def test_prompt_only_rows_are_fine_unless_a_completion_is_required():
    assert validate_rows([row("u:Q", pi="P")], collator()).prompt_only == 1
    assert "lmbda" in fails(DataError, validate_rows, [row("u:Q", pi="P")], collator(), require_completion=True)


def test_many_bad_rows_are_numbered_past_the_limit():
    rows = [row("u:" + "Q" * (400 + i)) for i in range(30)]
    with pytest.raises(DataError) as error:
        validate_rows(rows, collator(max_length=300), max_rows_listed=2)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert lines[-1] == "  and 28 more rows: 2-29"
    assert error.value.rows == tuple(range(30))


def test_long_rows_are_skipped_and_counted_when_asked():
    rows = [row("u:" + "Q" * 500, pi="P"), row("u:Q", pi="P"), row("u:Q", "a:" + "A" * 500)]
    report = validate_rows(rows, collator(max_length=300), skip_long=True)
    assert report.kept == [1]
    assert report.skipped_long == [0, 2]
    assert "2 rows are longer than max_length=300 and are left out" in report.warnings
    assert "all 1 rows are longer than max_length=300" in fails(
        DataError, validate_rows, rows[:1], collator(max_length=300), skip_long=True
    )
    message = fails(DataError, validate_rows, [*rows, 5], collator(max_length=300), skip_long=True)
    assert "1 of 4 rows" in message


def test_a_data_set_and_a_list_give_the_same_report(tmp_path):
    rows = [*ROWS, TOOL_ROW]
    from_file = load_rows(write_jsonl(tmp_path / "a.jsonl", rows)).add_column("unused", list(range(5)))
    assert validate_rows(from_file, collator(TOOLS)) == validate_rows(rows, collator(TOOLS))


def test_no_rows():
    assert "no rows" in fails(DataError, validate_rows, [], collator())


# --- untrusted rows ----------------------------------------------------------------------------------------------


class Opaque:
    def __repr__(self):
        raise RuntimeError("cannot be shown")


def test_a_value_that_cannot_be_shown_in_a_key_nobody_reads():
    given_row = {"messages": [{"role": "user", "content": "Q", "note": Opaque()}]}
    assert validate_rows([given_row], collator()).fingerprint == fingerprint([given_row])


def deep(value):
    for _ in range(5000):
        value = [value] if isinstance(value, list) else {"a": value}
    return value


NASTY = [
    *(
        None,
        0,
        -1,
        3.5,
        float("nan"),
        10**400,
        True,
        b"x",
        "",
        " ",
        "\ud800",
        "\x00",
        "<|im_end|>",
        "𝔘" * 9,
        "a" * 3000,
    ),
    *([], {}, [[]], [None], [1], {"role": "user"}, [{"role": "user", "content": "x"}], {"role": [1], "content": {}}),
    *(deep([]), deep({}), object(), Opaque(), set(), (1, 2), len, {1: 2}, {"tokenize": True}, range(3), iter([1])),
    *("not json", "[1,2]", '{"a":', [{"type": "image"}], [{"type": "text"}], {"from": "human", "value": "x"}, "User"),
]
WHOLE = {
    **TOOL_ROW,
    "messages": [{"role": "system", "content": "S", "id": 1}, *TOOL_ROW["messages"]],
    "privileged_messages": [{"role": "user", "content": "P"}, {"role": "assistant", "content": "PP"}],
    "tools": [WEATHER],
    "chat_template_kwargs": {"k": 1},
    "teacher_chat_template_kwargs": {"k": 2},
}


def paths(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*path, key))


def put(value, path, new):
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = put(value[path[0]], path[1:], new)
    return changed


def malformed_rows(count: int) -> list:
    chooser = random.Random(0)
    places = list(paths(WHOLE))
    return [put(WHOLE, chooser.choice(places), chooser.choice(NASTY)) for _ in range(count)]


@pytest.mark.parametrize("template", [TOOLS, STRICT, DROPPING])
@pytest.mark.parametrize("placement", ["messages", "user", "system"])
def test_malformed_rows_are_refused_or_used_never_a_crash(template, placement):
    c = collator(template, privileged_placement=placement, max_length=2500)
    rows = malformed_rows(200)
    with pytest.raises(DataError) as error:
        validate_rows(rows, c)
    good = [i for i in range(len(rows)) if i not in error.value.rows]
    if template == TOOLS:
        assert len(good) >= 20
        assert len(error.value.rows) >= 100
        report = validate_rows([rows[i] for i in good], c)
        for i in range(0, len(good), 8):
            batch = c([rows[j] for j in good[i : i + 8]])
            assert batch["completion_mask"].sum() == sum(report.completion_lengths[i : i + 8])
    else:
        assert not good  # these templates know no tools, which every row has


def test_malformed_rows_from_a_file(tmp_path):
    """What JSON can hold survives the way through the file and Arrow, and is refused for the same reasons."""

    def as_json(value) -> str | None:
        try:
            text = json.dumps(value)
            json.dumps(value, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError):
            return None
        return text if isinstance(value, dict) and "NaN" not in text and "1" + "0" * 400 not in text else None

    lines = [text for text in map(as_json, malformed_rows(400)) if text]
    assert len(lines) > 200
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    dataset = load_rows(tmp_path / "bad.jsonl")
    with pytest.raises(DataError) as from_file:
        validate_rows(dataset, collator(TOOLS))
    with pytest.raises(DataError) as from_list:
        validate_rows([json.loads(line) for line in lines], collator(TOOLS))
    assert from_file.value.rows == from_list.value.rows
