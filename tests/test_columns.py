"""Column templates: a data set's own columns become messages and PI."""

from __future__ import annotations

import pytest
from test_context import row
from test_data import QA, QA_COLUMNS, collator, fails, write_jsonl
from tiny import ROWS

from pgkd_peft.data.check import validate_rows
from pgkd_peft.data.columns import ColumnMap
from pgkd_peft.data.files import to_dataset
from pgkd_peft.data.load import load_rows, map_columns
from pgkd_peft.errors import ConfigError, DataError, PGKDError


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
