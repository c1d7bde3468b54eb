"""Watching a run: the view in a terminal, plain lines without one, and metrics that survive a crash and a resume."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import sys

import pytest
from rich.console import Console
from rich.text import Text
from tiny import CHATML, ROWS, STRICT, byte_tokenizer
from transformers import PrinterCallback, ProgressCallback

from pgkd_peft.data.tokens import question, special_texts, turns
from pgkd_peft.rollout_log import show
from pgkd_peft.run.console import answers, drawing_on, shared_console, wrapped
from pgkd_peft.run.folder import METRICS_FILE
from pgkd_peft.run.jsonl import append_lines, drop_after, read_lines
from pgkd_peft.run.metrics import MetricsFileCallback
from pgkd_peft.view.progress import View
from pgkd_peft.view.terminal import (
    SMALL,
    LiveView,
    PlainLines,
    clock,
    curve,
    install,
    metric_parts,
    resample,
    sparkline,
)

LLAMA3 = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '<eos>\n' }}{% else %}"
    "{{ '<|im_start|>assistant\n' + m['content'] + '<eos>\n' }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def terminal(width=100, height=40):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system="truecolor")


def plain(console, renderable):
    with console.capture() as capture:
        console.print(renderable)
    return Text.from_ansi(capture.get()).plain


def names(trainer):
    return [type(callback).__name__ for callback in trainer.callback_handler.callbacks]


# ---- metrics.jsonl -----------------------------------------------------------------------------------------------


def test_every_log_is_a_line(make_trainer, tmp_path):
    trainer = make_trainer(config={"max_steps": 3}, eval_dataset=ROWS)
    trainer.evaluate()  # before a training: written nowhere
    assert not (tmp_path / "run" / METRICS_FILE).exists()
    trainer.train()
    assert names(trainer).count(MetricsFileCallback.__name__) == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS_FILE).read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    for line, logged in zip(lines[:3], trainer.state.log_history):
        assert line["divergence"] == logged["divergence"]
    assert lines[0]["time"] <= lines[-1]["time"]
    assert "train_runtime" in lines[-1]


def test_resume_drops_the_lines_after_its_step(make_trainer, tmp_path):
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(config=config)
    trainer.train()
    path = tmp_path / "run" / METRICS_FILE
    with path.open("a") as file:
        file.write('{"step": 5, "divergence"')  # a crash
    append_lines(tmp_path / "run" / "traces.jsonl", [{"step": 2}, {"step": 4}])
    again = make_trainer(config=config)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [record["step"] for record in read_lines(path) if "divergence" in record] == [1, 2, 3, 4]
    assert read_lines(tmp_path / "run" / "traces.jsonl") == [{"step": 2}]


def test_lines_survive_what_crashes_leave(tmp_path):
    path = tmp_path / "deep" / "m.jsonl"
    append_lines(path, [{"step": 1, "loss": math.nan, "nested": [math.inf, {"a": 1}]}])
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    append_lines(path, [{"step": 3, "text": "\ud800 你 \u2028 line"}])
    assert [record.get("step") for record in read_lines(path)] == [1, 3]
    assert read_lines(path)[0] == {"step": 1, "loss": None, "nested": [None, {"a": 1}]}
    drop_after(path, 1)
    assert [record["step"] for record in read_lines(path)] == [1]
    assert path.read_text().count("\n") == 1
    drop_after(tmp_path / "none.jsonl", 1)
    assert not (tmp_path / "none.jsonl").exists()
    assert read_lines(tmp_path / "none.jsonl") == []


# ---- which view --------------------------------------------------------------------------------------------------


def test_live_view_in_a_terminal_plain_lines_elsewhere(make_trainer):
    trainer = make_trainer(config={"disable_tqdm": False})
    assert isinstance(install(trainer, terminal()), LiveView)
    assert "ProgressCallback" not in names(trainer)
    trainer = make_trainer(config={"disable_tqdm": False})
    assert isinstance(install(trainer, Console(file=io.StringIO())), PlainLines)
    assert not {"ProgressCallback", "PrinterCallback"} & set(names(trainer))
    trainer = make_trainer(config={"disable_tqdm": True})
    assert isinstance(install(trainer, terminal()), PlainLines)
    assert PrinterCallback.__name__ not in names(trainer)


def test_a_view_of_the_users_own_choice_stays(make_trainer):
    """A bar that was taken away is replaced by nothing, and a second training has one view."""
    trainer = make_trainer(config={"disable_tqdm": False})
    trainer.remove_callback(ProgressCallback)
    before = names(trainer)
    assert type(install(trainer, terminal())) is View
    assert names(trainer) == before
    trainer = make_trainer(config={"disable_tqdm": False})
    first = install(trainer, terminal())
    assert install(trainer, terminal()) is first
    assert names(trainer).count("LiveView") == 1


def test_training_from_python_is_shown_as_the_command_shows_it(make_trainer, capsys):
    trainer = make_trainer(config={"max_steps": 2})
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/2", "step 2/2", "step 2/2"]
    assert "divergence" in lines[0]


def test_the_terminal_comes_back_when_a_training_from_python_breaks(make_trainer, monkeypatch):
    console = terminal()
    trainer = make_trainer(config={"disable_tqdm": False})

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(trainer, "training_step", broken)
    stderr = sys.stderr
    with drawing_on(console), pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert sys.stderr is stderr
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")


def test_plain_lines_of_a_run(make_trainer, capsys):
    trainer = make_trainer(config={"max_steps": 2}, eval_dataset=ROWS)
    trainer.train()
    trainer.evaluate()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("step 1/2  divergence ")
    assert "s/step" in lines[0]
    assert "done in" in lines[2]
    assert "eval_divergence" in lines[3]
    assert "left" not in lines[3]
    assert all("\x1b" not in line for line in lines)


def test_a_line_leaves_out_what_is_no_number():
    assert metric_parts({"divergence": float("nan"), "grad_norm": "0.1", "top1_agreement": 0.5}) == ["agreement 50%"]


# ---- the live view -----------------------------------------------------------------------------------------------


def test_live_view_of_a_run(make_trainer):
    console = terminal()
    trainer = make_trainer(config={"max_steps": 3, "disable_tqdm": False})
    view = install(trainer, console)
    stderr = sys.stderr
    trainer.train()
    assert sys.stderr is stderr
    assert view._live is None
    out = console.file.getvalue()
    assert "\x1b[?25h" in out  # the cursor is back
    assert out.index("\x1b[?25l") < out.rindex("\x1b[?25h")
    text = plain(console, view.render())
    assert "step 3/3" in text
    assert "done" in text
    assert "divergence" in text
    assert f"{view.history['divergence'][-1]:.4f}" in text
    for phase in ("rollout", "teacher", "student"):
        assert f"● {phase}" in text
    assert "<|im_start|>" not in text
    assert len(view.history["divergence"]) == 3


def test_terminal_is_given_back_after_an_exception(make_trainer):
    console = terminal()
    trainer = make_trainer(config={"disable_tqdm": False})
    view = install(trainer, console)
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("pgkd_peft").addHandler(handler)
    stderr = sys.stderr
    try:
        view.start()
        assert handler.stream is not stderr
        logging.getLogger("pgkd_peft").warning("told above the view")
        view.stop()
        view.stop()
        assert handler.stream is stderr
        assert sys.stderr is stderr
        assert "told above the view" in console.file.getvalue()
        assert console.file.getvalue().rstrip().endswith("\x1b[?25h")
    finally:
        logging.getLogger("pgkd_peft").removeHandler(handler)


SIZES = [(30, 12), (60, 24), (80, 24), (89, 30), (90, 30), (150, 45), (200, 60)]


def filled(make_trainer, console):
    view = LiveView(make_trainer(), console)
    for i in range(500):
        for name in ("divergence", "seconds_rollout", "seconds_teacher", "seconds_student", *(s[0] for s in SMALL)):
            view.history[name].append(1 / (i + 1))
    return view


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_view_leaves_room_for_what_is_printed(make_trainer, width, height):
    console = terminal(width, height)
    view = LiveView(make_trainer(), console)
    assert "step 0/0" in plain(console, view.render())
    view = filled(make_trainer, console)
    view.rollout = ("[bold]p" * 100, "\x1b[31m" + "answer " * 200)
    text = plain(console, view.render())
    lines = text.splitlines()
    assert max(Text(line).cell_len for line in lines) <= width
    assert len(lines) <= max(8, height // 2)
    assert all(line[0] in "╭│╰" and line[-1] in "╮│╯" for line in lines)
    assert "\x1b" not in text
    assert "divergence 0.002" in text
    assert "entropy, student" in text or height < 24
    assert view._phases(width - 4).cell_len <= width - 4
    if height >= 24:
        assert "[bold]p" in text
        assert "answer answer" in text
        assert "rollout 0.00 s" in text
    else:
        assert "answer" not in text


@pytest.mark.parametrize(("width", "height"), [(60, 24), (80, 24), (150, 45)])
def test_rollouts_stay_above_the_view(make_trainer, monkeypatch, width, height):
    """What a terminal shows in the end, by a small terminal of our own: all that was printed, once, above the view."""
    console = terminal(width, height)
    view = filled(make_trainer, console)
    records = [
        {"step": 4, "question": f"question {i}?", "student": f"student says {i}", "teacher": f"teacher says {i}"}
        for i in range(2)
    ]
    monkeypatch.setattr(sys, "stdout", console.file)
    view.start()
    try:
        assert shared_console() is console
        show(records, 240)
        print("a line of somebody else")
        view._live.refresh()
        screen = screen_of(console.file.getvalue(), width, height)
    finally:
        view.stop()
    assert shared_console() is not console
    shown = "\n".join(screen[-height:])
    for words in ("Rollouts at step 4", "question 0?", "student says 1", "teacher says 1", "a line of somebody else"):
        assert shown.count(words) == 1, shown
    assert shown.count("╭─ pgkd") == 1
    assert shown.index("a line of somebody else") < shown.index("╭─ pgkd")


def screen_of(written: str, width: int, height: int) -> list[str]:
    """Lines that a terminal holds (those that have scrolled away too) after `written`, which moves up and erases."""
    lines, row, column = [""], 0, 0
    for match in re.finditer(r"\x1b\[([?0-9;]*)([A-Za-z])|\x1b\][^\x07]*\x07|(.)", written, re.S):
        numbers, command, char = match.groups()
        if command == "A":
            row = max(max(0, len(lines) - height), row - int(numbers or 1))
        elif command == "K":
            lines[row] = ""
        elif char == "\r":
            column = 0
        elif char == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif char:
            assert column < width, "a line is longer than the terminal is wide"
            lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
            column += 1
    return lines


def test_answers_stand_next_to_each_other_where_there_is_room():
    rows = [("Who?", "[red]Ada", "Bob"), ("When?", "now", "then")]
    wide = plain(terminal(110), answers("Title", ("prompt", "student", "teacher"), rows, 110)).splitlines()
    assert any("Who?" in line and "[red]Ada" in line and "Bob" in line for line in wide)
    narrow = plain(terminal(109), answers("Title", ("prompt", "student", "teacher"), rows, 109)).splitlines()
    order = [line.split()[0] for line in narrow if line.strip()]
    assert order == ["Title", "prompt", "student", "teacher", "prompt", "student", "teacher"]
    assert not any("Ada" in line and "Bob" in line for line in narrow)


def test_log_lines_break_between_words():
    text = "one two three four five six\n    indented words that go on and on"
    assert wrapped(text, 21).split("\n") == [
        "one two three four", "  five six", "    indented words", "      that go on and", "      on",
    ]  # fmt: skip
    assert wrapped("x" * 50, 20) == "x" * 50
    assert wrapped("short", 80) == "short"


# ---- what is asked -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, STRICT, LLAMA3, PHI, MISTRAL])
def test_a_prompt_without_its_markup(template):
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|start|>", "<|end|>", "[INST]", "[/INST]", "<|user|>"]}
    )
    messages = [
        {"role": "user", "content": "Earlier?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Who wrote\nit?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert question(tokenizer, ids) == "Who wrote\nit?"
    assert [said for _, said in turns(tokenizer, ids)] == ["Earlier?", "Yes.", "Who wrote\nit?"]
    shown = "".join(said for _, said in turns(tokenizer, ids))
    assert special_texts(tokenizer, ids)
    assert not any(token in shown for token in special_texts(tokenizer, ids))


def test_a_prompt_without_special_tokens_is_shown_whole():
    tokenizer = byte_tokenizer()
    ids = tokenizer("USER: Who? ASSISTANT:", add_special_tokens=False)["input_ids"]
    assert question(tokenizer, ids) == "USER: Who? ASSISTANT:"
    assert question(tokenizer, []) == ""


def test_curve_goes_through_its_values():
    down = curve([4.0, 3.0, 2.0, 1.0], width=2, height=1)
    assert down == [chr(0x2800 + 0x01 + 0x10) + chr(0x2800 + 0x04 + 0x80)]
    flat = curve([2.0] * 50, width=5, height=3)
    assert flat[0] == flat[1] == chr(0x2800) * 5
    assert flat[2] == chr(0x2800 + 0x40 + 0x80) * 5
    assert all(len(row) == 30 for row in curve([0, 9, 1, 8] * 100, 30, 4))
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([3, 3], 8) == "▁▁"
    assert resample([1, 2, 3, 4], 2) == [1.5, 3.5]
    assert resample([5], 10) == [5]
    assert [clock(s) for s in (65, 7389, None)] == ["1:05", "2:03:09", "?"]
