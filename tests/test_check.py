"""All rows checked before a model is loaded: one report; and no malformed row crashes anything."""

from __future__ import annotations

import copy
import json
import random

import pytest
from test_context import TOOL_ROW, TOOLS, WEATHER, row
from test_data import collator, fails, write_jsonl
from tiny import DROPPING, ROWS, STRICT

from pgkd_peft.data.check import fingerprint, validate_rows
from pgkd_peft.data.load import load_rows
from pgkd_peft.errors import DataError


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
