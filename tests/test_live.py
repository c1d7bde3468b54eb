"""Watching a run: the view in a terminal, plain lines without one, and metrics that survive a crash and a resume."""

from __future__ import annotations

import io
import json
import logging
import math
import sys

import pytest
from rich.console import Console
from rich.text import Text
from tiny import ROWS
from transformers import PrinterCallback

from pgkd_peft.run.jsonl import append_lines, drop_after, read_lines
from pgkd_peft.view.terminal import (
    METRICS_FILE,
    LiveView,
    MetricsFileCallback,
    PlainLines,
    clock,
    curve,
    install,
    metric_parts,
    resample,
    sparkline,
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
    trainer = make_trainer(config={"max_steps": 3})
    trainer.add_callback(MetricsFileCallback())
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS_FILE).read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    for line, logged in zip(lines[:3], trainer.state.log_history):
        assert line["divergence"] == logged["divergence"]
    assert lines[0]["time"] <= lines[-1]["time"]
    assert "train_runtime" in lines[-1]


def test_resume_drops_the_lines_after_its_step(make_trainer, tmp_path):
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(config=config)
    trainer.add_callback(MetricsFileCallback())
    trainer.train()
    path = tmp_path / "run" / METRICS_FILE
    with path.open("a") as file:
        file.write('{"step": 5, "divergence"')  # a crash
    append_lines(tmp_path / "run" / "traces.jsonl", [{"step": 2}, {"step": 4}])
    again = make_trainer(config=config)
    again.add_callback(MetricsFileCallback())
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


def test_plain_lines_of_a_run(make_trainer, capsys):
    trainer = make_trainer(config={"max_steps": 2}, eval_dataset=ROWS)
    install(trainer, Console(file=io.StringIO()))
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


@pytest.mark.parametrize(("width", "height"), [(30, 12), (60, 24), (89, 30), (90, 30), (200, 60)])
def test_view_fits_any_terminal(make_trainer, width, height):
    console = terminal(width, height)
    view = LiveView(make_trainer(), console)
    assert "step 0/0" in plain(console, view.render())
    for i in range(500):
        for name in ("divergence", "student_entropy", "top1_agreement", "seconds_rollout", "seconds_teacher"):
            view.history[name].append(1 / (i + 1))
    view.rollout = ("[bold]p" * 100, "\x1b[31m" + "answer " * 200)
    text = plain(console, view.render())
    lines = text.splitlines()
    assert max(Text(line).cell_len for line in lines) <= width
    assert "\x1b" not in text
    assert len(view._phases(width - 4).plain.splitlines()[0]) == width - 4  # one bar, whatever a phase's share
    if height >= 24:
        assert "[bold]p" in text
    else:
        assert "answer" not in text


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
