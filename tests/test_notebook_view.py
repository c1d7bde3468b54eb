"""The live view in a notebook: one output, replaced in place, in which text stays text."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from rich.console import Console
from tiny import ROWS
from transformers import ProgressCallback, TrainerCallback
from transformers import trainer as transformers_trainer

from pgkd_peft import RecoveredGapCallback
from pgkd_peft.data.files import to_dataset
from pgkd_peft.view import notebook as module
from pgkd_peft.view.notebook import NotebookView, chart
from pgkd_peft.view.terminal import PlainLines, install

HOSTILE = "</i><img src=x onerror=alert(1)><script>alert(2)</script>\x1b[31m&"


class NotebookBar(ProgressCallback):
    """Stands for the bar that Transformers would show in a notebook."""


@pytest.fixture
def notebook(monkeypatch):
    """An IPython shell, and Transformers believing that it is in a notebook; every change is drawn."""
    monkeypatch.setattr(transformers_trainer, "DEFAULT_PROGRESS_CALLBACK", NotebookBar)
    monkeypatch.setattr(module, "EVERY", 0.0)
    InteractiveShell.instance()
    yield
    InteractiveShell.clear_instance()


def pictures(captured) -> list[str]:
    return [output._repr_html_() for output in captured.outputs if output._repr_html_()]


class Page(HTMLParser):
    """Tags and text of a picture, which must be well-formed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("br", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "polyline":
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def watched(make_trainer, **config):
    trainer = make_trainer(config={"max_steps": 3, "disable_tqdm": False, **config}, eval_dataset=to_dataset(ROWS[:2]))
    view = install(trainer, Console(file=io.StringIO()))
    return trainer, view


def test_a_run_is_one_output_replaced_in_place(make_trainer, notebook):
    trainer, view = watched(make_trainer, eval_strategy="steps", eval_steps=1)
    score = iter([0.0, 1.0, 0.25, 0.5, 0.75] * 9)
    callback = RecoveredGapCallback(ROWS[:1], lambda answer, row: 0.0)
    callback.scorer = lambda answer, row: next(score)  # base, teacher, then the student at each evaluation
    trainer.add_callback(callback)
    assert isinstance(view, NotebookView)
    assert "NotebookBar" not in [type(c).__name__ for c in trainer.callback_handler.callbacks]
    with capture_output() as captured:
        trainer.train()
    sent = [output for output in captured.outputs if output._repr_html_()]
    assert len(sent) > 8
    assert [bool(output.update) for output in sent] == [False] + [True] * (len(sent) - 1)
    assert len({output.transient["display_id"] for output in sent}) == 1
    first, last = Page(pictures(captured)[0]), Page(pictures(captured)[-1])
    assert "step 0/3" in first.text
    assert "starting" in first.text
    for words in ("step 3/3", "done", "divergence, nats/token", "● rollout", "agreement"):
        assert words in last.text
    assert f"{view.history['divergence'][-1]:.4f}" in last.text
    assert view.history["eval_recovered"] == [0.25, 0.5, 0.75]
    assert re.search(r"recovered gap0\.75.*?0\.25 to 0\.75", last.text)
    assert any("evaluating" in Page(picture).text for picture in pictures(captured))
    prompt = view.rollout[0].split()[-1]
    assert prompt in last.text
    assert last.tags.count("svg") == last.tags.count("polyline") >= 6


def test_a_training_from_python_is_shown_in_the_notebook(make_trainer, notebook):
    trainer = make_trainer(config={"max_steps": 2, "disable_tqdm": False})
    with capture_output() as captured:
        trainer.train()
    assert "step 2/2" in Page(pictures(captured)[-1]).text
    assert "done" in Page(pictures(captured)[-1]).text


def test_text_stays_text(make_trainer, tmp_path):
    trainer, view = watched(make_trainer, output_dir=str(tmp_path / "<b>run"))
    view = NotebookView(trainer)
    view.rollout = (HOSTILE, HOSTILE * 100)
    view.history["divergence"].append(1.0)
    page = Page(view.html())
    assert not {"img", "script"} & set(page.tags)
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "<b>run" in page.text
    assert "\x1b" not in page.text
    assert len(page.text) < 2000


def test_pictures_are_not_sent_for_every_step(make_trainer, notebook, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 3600.0)
    trainer, _ = watched(make_trainer)
    with capture_output() as captured:
        trainer.train()
    assert len(pictures(captured)) == 2
    assert "step 3/3" in pictures(captured)[-1]


def test_what_broke_off_says_so_and_stops(make_trainer, notebook):
    trainer, view = watched(make_trainer)

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise KeyboardInterrupt

    trainer.add_callback(Break())
    with capture_output() as captured:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        view.stop()
        view.stop()
        count = len(pictures(captured))
        view.changed()
    assert len(pictures(captured)) == count
    assert "stopped while training" in pictures(captured)[-1]


def test_other_processes_and_quiet_runs_show_nothing(make_trainer, notebook):
    trainer, view = watched(make_trainer)
    trainer.state.is_world_process_zero = False
    with capture_output() as captured:
        view.on_train_begin(trainer.args, trainer.state, trainer.control)
        view.on_step_end(trainer.args, trainer.state, trainer.control)
        view.stop()
    assert captured.outputs == []
    assert isinstance(watched(make_trainer, disable_tqdm=True)[1], PlainLines)


def test_a_chart_goes_from_its_lowest_to_its_highest_value():
    def points(values):
        text = re.search(r'points="([^"]*)"', chart("x", values, ".1f"))[1]
        return [tuple(map(float, pair.split(","))) for pair in text.split()]

    assert points([1.0, 3.0, 2.0]) == [(0.0, 28.0), (50.0, 2.0), (100.0, 15.0)]
    assert points([5.0]) == [(0.0, 28.0), (100.0, 28.0)]
    many = points([float(i) for i in range(1000)])
    assert len(many) == module.MOST_POINTS
    assert many[0] == (0.0, 28.0)
    assert many[-1] == (100.0, 2.0)
    assert "0.0 to 9.0" in chart("x", [0.0, 9.0, 4.0], ".1f")
