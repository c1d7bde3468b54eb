"""`pgkd chat --web`: the talk behind the page, and, where gradio is installed, the page itself."""

from __future__ import annotations

import json
import sys
import threading
import urllib.error
import urllib.request

import pytest

from pgkd_peft import cli
from pgkd_peft.cli import chat_page
from pgkd_peft.cli.chat_page import Talk, examples_of
from pgkd_peft.errors import ConfigError


class Parrot:
    """Answers with what it heard, in two pieces."""

    def __init__(self, name: str, system: str = "", fails: bool = False):
        self.name, self.fails = name, fails
        self.messages = [{"role": "system", "content": system}] if system else []
        self.told = ""

    def answer(self, text, settings, show):
        if self.fails:
            raise ValueError("out of words")
        self.messages.append({"role": "user", "content": text})
        heard = sum(m["role"] == "user" for m in self.messages)
        for so_far in (self.name, f"{self.name} {text} {heard} {self.told}".rstrip()):
            show(so_far)
        self.messages.append({"role": "assistant", "content": so_far})
        return so_far


def contents(shown):
    return [[m["content"] for m in messages] for messages in shown]


def test_all_columns_stream_one_after_the_other_and_keep_their_own_conversation():
    speakers = [Parrot("base"), Parrot("student", "Be kind.")]
    talk = Talk(speakers, {})
    held = talk.begin()
    steps = [contents(shown) for shown in talk.ask("Who?", "", held)]
    assert steps[0] == [["Who?"], ["Be kind.", "Who?"]]
    assert steps[1] == [["Who?", "base"], ["Be kind.", "Who?"]]
    assert steps[3] == [["Who?", "base Who? 1"], ["Be kind.", "Who?", "student"]]
    assert steps[-1] == [["Who?", "base Who? 1"], ["Be kind.", "Who?", "student Who? 1"]]
    *_, held = talk.ask("Again?", "", held=list(talk.ask("Who?", "", talk.begin()))[-1])
    assert contents(held)[0] == ["Who?", "base Who? 1", "Again?", "base Again? 2"]
    *_, other = talk.ask("New?", "", talk.begin())  # another page, or a new conversation
    assert contents(other)[0] == ["New?", "base New? 1"]


def test_the_pi_of_the_page_is_what_the_base_with_pi_reads():
    teacher = Parrot("teacher")
    talk = Talk([teacher], {}, lambda text: setattr(teacher, "told", text))
    *_, shown = talk.ask("Who?", "It is blue.", talk.begin())
    assert contents(shown)[0][-1] == "teacher Who? 1 It is blue."
    assert list(talk.ask("  ", "", shown)) == [shown]


def test_what_goes_wrong_in_an_answer_is_raised_and_the_model_is_free_again():
    talk = Talk([Parrot("base", fails=True)], {})
    with pytest.raises(ValueError, match="out of words"):
        list(talk.ask("Who?", "", talk.begin()))
    assert not talk.lock.locked()


def test_held_out_questions_of_the_run_come_with_their_pi(tmp_path):
    rows = [
        {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"}], "pi": "Ann."},
        {"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"}], "pi": None},
        {"messages": [{"role": "user", "content": c} for c in "ab"], "pi": "more than one question"},
        {"nothing": 1},
    ]
    (tmp_path / "holdout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.json").write_text(json.dumps({"config": {"privileged_key": "pi"}}))
    assert examples_of(tmp_path) == [["Who?", "Ann."], ["A?", ""]]
    assert examples_of(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--web"], "Run: pip install gradio"),
        (["--web", "--message", "Hi"], "message and web are both given"),
        (["--port", "7000"], "it goes with --web"),
        (["--web", "--port", "99999"], "port is 99999"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["chat", str(tmp_path / "no-such-run"), *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.fixture
def page():
    """(address, server, socket) of a running page with two columns."""
    pytest.importorskip("gradio", reason="the page needs gradio (pip install gradio)")
    teacher = Parrot("teacher")
    talk = Talk([Parrot("base"), teacher], {}, lambda text: setattr(teacher, "told", text))
    blocks = chat_page.page(talk, "a run", ["base", "base with PI"], "It is blue.", [["Who?", "Ann."]])
    web, listening = chat_page.server(blocks, None)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    web.should_exit = True
    thread.join(30)


def test_the_page_answers_on_this_machine_alone(page):
    client = pytest.importorskip("gradio_client")
    with urllib.request.urlopen(page, timeout=120) as answer:
        text = answer.read().decode()
    assert "pgkd chat a run" in text
    assert "fonts.googleapis" not in text
    visitor = client.Client(page, verbose=False)
    *_, shown = visitor.submit("Who?", "It is blue.", api_name="/reply")
    assert "teacher Who? 1 It is blue." in json.dumps(shown)
    port = int(page.rsplit(":", 1)[1])
    rebound = urllib.request.Request(page, headers={"Host": f"elsewhere.example:{port}"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(rebound, timeout=120)
    with pytest.raises(ConfigError, match=f"--port {port} is in use"):
        chat_page._listen(port)
    other = chat_page._listen(None)
    assert other.getsockname()[0] == "127.0.0.1"
    assert other.getsockname()[1] != port
    other.close()
