"""`pgkd chat` and `pgkd runs`, on a run of a tiny model."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from runs import make_trainer
from tiny import save_tiny

from pgkd_peft import cli
from pgkd_peft.cli import chat
from pgkd_peft.view.runs import RESULTS, differing, find_runs, sort_runs, table


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs that differ in their learning rate, one of them judged."""
    folder = tmp_path_factory.mktemp("runs")
    base = save_tiny(folder / "base")
    for name, rate in (("a", 0.01), ("b", 0.5)):
        settings = {"max_steps": 2, "learning_rate": rate, "rollout_log_steps": 0, "logging_steps": 1}
        trainer = make_trainer(base, str(folder / name), settings=settings)
        trainer.train()
        trainer.run_info.finished = name == "a"
        trainer.save_model()
    columns = {"student": {"score": 0.5}}
    results = {"columns": columns, "recovered": 0.4, "recovered_interval": [0.1, 0.7], "drift": 0.02}
    (folder / "b" / "eval_results.json").write_text(json.dumps(results))
    return folder


def test_all_columns_answer_their_own_conversation(runs, capsys, monkeypatch):
    said = iter(["Who?", "Again?", "/reset", "And now?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(said))
    heard = {}
    answer = chat.Speaker.answer

    def listening(speaker, text, settings, show):
        heard.setdefault(speaker.name, []).append([m["content"] for m in speaker.messages] + [text])
        return answer(speaker, text, settings, show)

    monkeypatch.setattr(chat.Speaker, "answer", listening)
    flags = ["--privileged", "It is blue.", "--max_new_tokens", "4", "--system", "Be kind."]
    assert cli.main(["chat", str(runs / "b"), *flags]) == 0
    assert set(heard) == {"base", "teacher", "student"}
    for turns in heard.values():
        assert turns[0] == ["Be kind.", "Who?"]
        assert turns[1][:2] == ["Be kind.", "Who?"]
        assert len(turns[1]) == 4
        assert turns[2] == ["Be kind.", "And now?"]
    shown = capsys.readouterr().out
    assert "base with PI:" in shown


def test_the_student_answers_with_its_adapter_and_the_base_without(runs, capsys):
    """The words on the screen are those of a plain greedy generation with the adapter on and off."""
    from peft import PeftModel

    from pgkd_peft.model.load import load_base, load_tokenizer

    folder = runs / "b"
    assert cli.main(["chat", str(folder), "--message", "Hello", "--max_new_tokens", "6"]) == 0
    shown = capsys.readouterr().out
    tokenizer = load_tokenizer(str(folder))
    model = PeftModel.from_pretrained(load_base(str(runs / "base"), quantization="none", device="cpu"), str(folder))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    answers = []
    for adapter in (False, True):
        own = ids
        for _ in range(6):
            with torch.no_grad():
                if adapter:
                    logits = model(own).logits[0, -1]
                else:
                    with model.disable_adapter():
                        logits = model(own).logits[0, -1]
            own = torch.cat([own, logits.argmax()[None, None]], dim=1)
        answers.append(tokenizer.decode(own[0, ids.shape[1] :], skip_special_tokens=True))
    assert answers[0] != answers[1]
    base, student = shown.split("student:")
    visible = [chat.visible(answer).strip() for answer in answers]
    assert visible[0][:4] in base
    assert visible[1][:4] in student


def test_an_answer_that_was_stopped_leaves_no_column_behind(runs, monkeypatch):
    said = iter(["Who?", "And now?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(said))
    heard = []

    def answer(speaker, text, settings, show):
        heard.append((speaker.name, text, list(speaker.messages)))
        speaker.messages += [{"role": "user", "content": text}]
        if text == "Who?" and speaker.name == "student":
            raise KeyboardInterrupt
        speaker.messages += [{"role": "assistant", "content": "I."}]

    monkeypatch.setattr(chat.Speaker, "answer", answer)
    assert cli.main(["chat", str(runs / "b")]) == 0
    assert [messages for _, text, messages in heard if text == "And now?"] == [[], []]


def test_the_pi_is_read_whole_or_refused(runs, tmp_path, capsys, monkeypatch):
    """The runs were trained with 512 tokens of PI at most; the model's context has 4096."""
    read = []
    monkeypatch.setattr(
        chat.Speaker, "answer", lambda self, text, *_: read.append(self.encode([{"role": "user", "content": text}]))
    )
    handbook = tmp_path / "handbook.md"
    handbook.write_text("violet " * 200)
    argv = ["chat", str(runs / "b"), "--message", "Who?", "--privileged_file", str(handbook)]
    assert cli.main(argv) == 0
    assert [len(ids) > 1400 for ids in read] == [False, True, False]
    handbook.write_text("violet " * 600)
    assert cli.main(argv) == 2
    assert "the model's context is 4096" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "missing is the model"),
        (["RUN", "--message", " "], "message is empty"),
        (["RUN", "--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["RUN", "--temperature", "nan"], "temperature is nan"),
        (["RUN", "--privileged_file", "no-such-file.txt"], "no-such-file.txt"),
        (["nowhere-at-all", "--message", "Hi"], "nowhere-at-all"),
    ],
)
def test_mistakes_are_told(runs, capsys, flags, words):
    assert cli.main(["chat", *(str(runs / "a") if flag == "RUN" else flag for flag in flags)]) == 2
    assert words in capsys.readouterr().err


def test_runs_are_found_with_what_came_of_them(runs, capsys):
    found = {run["run"]: run for run in find_runs(runs)}
    assert set(found) == {"a", "b"}
    assert found["b"]["recovered"] == 0.4
    assert found["a"]["recovered"] is None
    assert found["a"]["finished"]
    assert not found["b"]["finished"]
    assert "learning_rate" in differing(list(found.values()))
    assert "output_dir" not in differing(list(found.values()))
    assert [run["run"] for run in sort_runs(list(found.values()), "recovered")] == ["b", "a"]
    assert [run["run"] for run in sort_runs(list(found.values()), "learning_rate")] == ["a", "b"]
    assert cli.main(["runs", str(runs)]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate" in shown
    assert cli.main(["runs", str(runs), "--json", "--sort", "drift"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["run"] == "b"


@pytest.mark.parametrize("width", [80, 109, 110, 160])
def test_the_table_of_runs_shows_every_column(runs, width):
    found = [
        {**run, "recovered_nats": 0.5, "nats_interval": [0.25, 0.75], "seconds": 1234.5} for run in find_runs(runs)
    ]
    console = Console(file=io.StringIO(), width=width)
    console.print(table(found, width))
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    for words in (
        *RESULTS.values(),
        "0.400",
        "0.10 to 0.70",
        "0.25 to 0.75",
        "learning_rate=",
        "0.01",
        "1234",
        "0.020",
    ):
        assert words in shown, words
    heading = next(line for line in shown.splitlines() if "divergence" in line)
    assert ("what differs" in heading) == (width >= 110)


def test_many_long_settings_stay_readable_on_a_narrow_terminal(runs):
    found = find_runs(runs)
    for i, run in enumerate(found):
        run |= {"recovered_nats": 0.5, "nats_interval": [0.25, 0.75], "seconds": 1234.5}
        run["settings"] |= {"privileged_template": f"Text:\n\n{i} {{privileged}}", "gradient_checkpointing": bool(i)}
    console = Console(file=io.StringIO(), width=80)
    console.print(table(found, 80))
    shown = console.file.getvalue()
    assert "privileged_template=Text: 0 {privileged}" in " ".join(shown.split())
    assert "gradient_checkpointing=True" in shown  # not in pieces
    assert len(shown.splitlines()) < 20


def test_how_a_run_was_watched_is_no_difference(runs):
    found = find_runs(runs)
    assert not {"logging_steps", "save_steps", "rollout_log_steps"} & set(found[0]["settings"])


def test_no_runs_and_no_such_column(runs, tmp_path, capsys):
    assert cli.main(["runs", str(tmp_path)]) == 2
    assert "no run was found" in capsys.readouterr().err
    assert cli.main(["runs", str(tmp_path / "nothing")]) == 2
    assert cli.main(["runs", str(runs), "--sort", "speed"]) == 2
    assert "--sort is 'speed'" in capsys.readouterr().err
