"""`pgkd inspect`: what is shown is what the collator makes, and nothing of the data steers the terminal."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from tiny import CHATML, ROWS, STRICT, byte_tokenizer, save_tiny

from pgkd_peft import DataCollatorForPrivilegedGKD, PrivilegedGKDConfig
from pgkd_peft.cli.inspect import main, options
from pgkd_peft.data.check import validate_rows
from pgkd_peft.data.tokens import pieces, token_texts
from pgkd_peft.errors import ConfigError
from pgkd_peft.view.inspect import bar, choose_rows, histogram, inspect_rows, view_row
from pgkd_peft.view.words import inserted


@pytest.fixture
def collator():
    return DataCollatorForPrivilegedGKD(
        byte_tokenizer(), max_length=600, max_privileged_length=20, allow_privileged_cut=True
    )


def config(tmp_path, **settings):
    return PrivilegedGKDConfig(output_dir=str(tmp_path), report_to="none", bf16=False, **settings)


def shown(rows, collator, args, *, terminal=False, width=120, **kwargs):
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=terminal,
        color_system="truecolor" if terminal else None,
        highlight=False,
    )
    code = inspect_rows(rows, collator, args, console, **kwargs)
    return console.file.getvalue(), code


def test_marks_the_inserted_turn_from_its_first_special_token():
    bos, end, gen = 1, 2, 3
    student = [bos, 10, 11, end, bos, gen]
    teacher = [bos, 10, 11, end, bos, 20, 21, end, bos, gen]
    assert inserted(student, teacher, {bos, end}.__contains__) == slice(4, 8)
    assert inserted(student, student, {bos, end}.__contains__) == slice(6, 6)
    assert inserted([7, 8], [7, 9, 9, 8], ().__contains__) == slice(1, 3)
    assert inserted([7, 5, 8], [7, 6, 6, 8], ().__contains__) == slice(1, 3)  # replaced, not inserted


@pytest.mark.parametrize("template", [CHATML, STRICT])
def test_removing_the_marked_part_gives_the_students_prompt(template):
    collator = DataCollatorForPrivilegedGKD(byte_tokenizer(template))
    for row in [ROWS[0], ROWS[1], ROWS[2]]:
        encoded = collator.encode(row)
        student, teacher = encoded["student_ids"], encoded["teacher_ids"]
        added = inserted(student, teacher, collator.tokenizer.all_special_ids.__contains__)
        assert teacher[: added.start] + teacher[added.stop :] == student


def test_texts_are_those_of_the_collators_ids(collator, tmp_path):
    args = config(tmp_path, skip_first_tokens=2)
    row = {**ROWS[1], "messages": [{"role": "user", "content": "né 你?"}, {"role": "assistant", "content": "Hoare."}]}
    view, batch = view_row(7, row, collator, args), collator([row])
    for parts, ids in (
        (view.student, batch["prompts"]),
        (view.teacher, batch["teacher_prompts"]),
        (view.completion, batch["completions"]),
    ):
        assert "".join(p.text for p in parts) == collator.tokenizer.decode(ids[0].tolist())
    privileged = "".join(p.text for p in view.teacher if p.role == "pi")
    assert "It was Tony Hoare." in privileged
    assert "né" not in privileged
    assert [(p.text, p.role) for p in view.completion] == [("Ho", "out"), ("are.", "loss"), ("<|im_end|>", "loss")]
    assert (view.number, view.in_loss, view.completion_tokens) == (7, 5, 7)
    assert any(p.special and p.text == "<|im_start|>" for p in view.student)


def test_a_character_cut_in_two_belongs_to_the_later_piece():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a你b")["input_ids"]  # 1 + 3 + 1 bytes
    roles = ["x", "x", "y", "y", "y"]
    assert [(p.text, p.role) for p in pieces(tokenizer, ids, roles)] == [("a", "x"), ("你b", "y")]
    assert token_texts(tokenizer, ids) == ["a", "", "", "你", "b"]


def test_token_texts_join_to_the_whole_text():
    tokenizer = byte_tokenizer()
    text = "<|im_start|>user\nÄ 😀 你好<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert "".join(token_texts(tokenizer, ids)) == text
    assert len(token_texts(tokenizer, ids)) == len(ids)


def test_leak_cut_and_missing_pi_are_told(collator, tmp_path):
    rows = [
        {
            "messages": [{"role": "user", "content": "It was Tony Hoare, was it?"}],
            "privileged_messages": "It was Tony Hoare",
        },
        {"messages": [{"role": "user", "content": "Who?"}], "privileged_messages": "x" * 50},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": "Hi <|im_end|>"}]},
    ]
    args = config(tmp_path, lmbda=1.0)
    notes = [" ".join(view_row(0, row, collator, args).notes) for row in rows]
    assert "leak" in notes[0]
    assert "cut: 30 of 50 PI tokens" in notes[1]
    assert notes[2].startswith("no PI")
    assert "markup" in notes[3]
    text, code = shown(rows, collator, args)
    assert code == 0
    assert "PI in the student's prompt (leaks): 1 rows · PI cut: 1 rows, 30 tokens" in text
    assert "lmbda=1" in text


def test_all_bad_rows_at_once_and_code_2(collator, tmp_path):
    rows = [ROWS[0], {"messages": []}, ROWS[2], {"messages": [{"role": "robot", "content": "x"}]}, ROWS[3]]
    text, code = shown(rows, collator, config(tmp_path))
    assert code == 2
    assert "2 of 5 rows cannot be used" in text
    assert "row 1:" in text
    assert "row 3:" in text
    assert "=== row 4 ===" in text  # the usable rows keep their numbers
    assert "3 rows: 2 with PI" in text
    none_left, code = shown([{"messages": []}], collator, config(tmp_path))
    assert code == 2
    assert "1 of 1 rows" in none_left


def test_plain_output_has_marks_and_no_escape(collator, tmp_path):
    hostile = {
        "messages": [{"role": "user", "content": "\x1b[31mred [bold]x[/bold]"}, {"role": "assistant", "content": "ok"}],
        "privileged_messages": "\x1b]0;title\x07",
    }
    text, _ = shown([hostile], collator, config(tmp_path, skip_first_tokens=1))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]x[/bold]" in text  # text, not markup
    assert "⟦PI:<|im_start|>user\n␛]0;title␇<|im_end|>\n⟧" in text
    assert "⟦not in the loss:o⟧k<|im_end|>" in text
    coloured, _ = shown([hostile], collator, config(tmp_path, skip_first_tokens=1), terminal=True)
    assert "\x1b]0;" not in coloured
    assert "⟦" not in coloured
    assert "\x1b[1;33m" in coloured  # PI, bold yellow


@pytest.mark.parametrize("width", [40, 80, 130])
def test_fits_the_terminal(collator, tmp_path, width):
    text, _ = shown(ROWS, collator, config(tmp_path), terminal=True, width=width)
    from rich.text import Text

    assert max(Text.from_ansi(line).cell_len for line in text.splitlines()) <= width


def test_says_which_placement_would_be_read_once(tmp_path):
    pi = "The office opens at nine and closes at five, and nobody answers on Fridays."
    rows = [
        {"messages": [{"role": "user", "content": q * 9}], "privileged_messages": pi} for q in ("who", "why", "how")
    ]

    def told(**settings):
        collator = DataCollatorForPrivilegedGKD(settings.pop("tokenizer", byte_tokenizer()), **settings)
        return shown(rows, collator, config(tmp_path, lmbda=1.0), count=0, width=400)[0]

    text = told()
    assert "the PI stands behind the question, so nothing is shared; with placement system " in text
    share = int(text.split("with placement system ")[1].split("%")[0])
    prompts = [
        row["teacher_ids"]
        for row in map(DataCollatorForPrivilegedGKD(byte_tokenizer(), privileged_placement="system").encode, rows)
    ]
    common = next(i for i, ids in enumerate(zip(*prompts)) if len(set(ids)) > 1)
    assert share == round(100 * 2 * common / sum(map(len, prompts)))
    assert "need not be read again" in told(privileged_placement="system")
    assert "behind the question" not in told(privileged_placement="system")
    assert "behind the question" not in told(tokenizer=byte_tokenizer(STRICT))  # it has no system turn


def test_rarest_kinds_are_shown_first(collator):
    rows = [ROWS[0]] * 6 + [ROWS[2]] + [ROWS[0]] * 2
    report = validate_rows(rows, collator)
    assert choose_rows(report, 2) == [0, 6]
    assert choose_rows(report, 1) == [6]
    assert choose_rows(report, 99) == list(range(9))


def test_histogram_counts_every_value():
    values = [3] * 5 + [10, 11, 40]
    lines = histogram(values, bins=4).splitlines()
    assert sum(int(line.rsplit(" ", 1)[1]) for line in lines) == len(values)
    assert lines[0].startswith(" 3–12 ")
    assert lines[0].endswith(" 7")
    assert lines[-1].endswith("33–40 " + bar(1 / 7, 20) + " 1")
    assert histogram([]) == "no rows"
    assert bar(1, 4) == "████"
    assert bar(0, 4) == "    "
    assert bar(0.001, 4) == "▏   "


def test_command_needs_a_tokenizer_only(tmp_path, capsys):
    model = save_tiny(tmp_path / "model")
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    flags = ["--model_name_or_path", model, "--dataset_name", str(tmp_path / "rows.jsonl"), "--report_to", "none"]
    flags += ["--output_dir", str(tmp_path / "run"), "--max_new_tokens", "8", "--bf16", "false"]
    assert main([*flags, "--rows", "1", "--no-color"]) == 0
    out = capsys.readouterr().out
    assert out.count("=== row") == 1
    assert "4 rows: 3 with PI" in out
    assert not (tmp_path / "run").exists()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": []}), encoding="utf-8")
    assert main([*flags, "--no-color"]) == 2
    assert main(["--help"]) == 0
    with pytest.raises(ConfigError, match="--rows is -1"):
        options(["--rows", "-1"])
