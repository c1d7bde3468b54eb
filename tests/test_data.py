"""Loading, column mapping, and the one report on all bad rows."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet
from test_context import TOOL_ROW, row
from tiny import CHATML, ROWS, byte_tokenizer

from pgkd_peft.data import load as data
from pgkd_peft.data.check import fingerprint
from pgkd_peft.data.collator import DataCollatorForPrivilegedGKD
from pgkd_peft.data.files import to_dataset
from pgkd_peft.data.load import load_rows
from pgkd_peft.errors import DataError


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
