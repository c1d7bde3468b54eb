"""`pgkd bake` as a command: arguments, a server that writes, a bake that is killed or goes on, and what it leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from runs import context
from safetensors.torch import load_file
from test_bake import DOCUMENT
from tiny import save_tiny

from pgkd_peft import cli
from pgkd_peft.bake import ask, coverage, pipeline
from pgkd_peft.bake.questions import read_questions
from pgkd_peft.bake.server import ServerWriter, WriterError
from pgkd_peft.bake.split import split_documents


class Fake(BaseHTTPRequestHandler):
    """Speaks just enough of OpenAI's protocol: asks about the longest word of the text."""

    away = 0
    most = 0
    now = 0
    asked: list = []  # noqa: RUF012
    lock = threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Fake.lock:
            Fake.now += 1
            Fake.most = max(Fake.most, Fake.now)
            Fake.asked.append(body)
            away, Fake.away = Fake.away, max(0, Fake.away - 1)
        text = body["messages"][1]["content"].split("Already asked:")[0]
        opening = re.search(r"Begin with '([^']*)'", body["messages"][0]["content"])[1]
        word = max(re.findall(r"\w+", text), key=len)
        said = f"{opening} the {word}, number {zlib.crc32(str(body['messages']).encode()) % 1000}?"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        reply = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
        }
        self.send_response(503 if away else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())
        with Fake.lock:
            Fake.now -= 1

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Fake.away = Fake.most = Fake.now = 0
    Fake.asked = []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()


def tasks(count: int) -> list[ask.Task]:
    passages = split_documents([("a.md", DOCUMENT)])
    return [ask.Task(passages[i % 2], "fact", "What is") for i in range(count)]


def test_the_server_writes_knowing_what_was_asked_within_a_bound(server):
    writer = ServerWriter(server, "any")
    written = writer.questions(tasks(30), {0: ["What is the earlier question?"]}, (0,))
    assert len(written) == 30
    assert all(text.startswith("What is the ") for text in written)
    assert Fake.most <= 8
    assert any("What is the earlier question?" in body["messages"][1]["content"] for body in Fake.asked)


def test_a_server_that_was_away_is_asked_again_and_one_that_stays_away_is_an_error(server):
    writer = ServerWriter(server, "any")
    writer.wait = 0.01
    Fake.away = 2
    assert len(writer.questions(tasks(2), {}, (0,))) == 2
    Fake.away = 1000
    with pytest.raises(WriterError, match="run the same command again"):
        writer.questions(tasks(1), {}, (0,))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("bake") / "base")


def flags(base: str, out: Path, document: Path, server: str) -> list[str]:
    settings = {
        **{"model_name_or_path": base, "output_dir": str(out), "document": str(document)},
        **{"questions": "6", "anchors": "16", "writer_url": server, "writer_model": "any", "gap_filter": "false"},
        **{"max_new_tokens": "5", "max_steps": "4", "save_steps": "1", "logging_steps": "1"},
        **{"base_quantization": "none", "bf16": "false", "use_cpu": "true", "lora_target_modules": "q_proj"},
        **{"rollout_log_steps": "0", "disable_tqdm": "true"},
    }
    return ["bake", *(part for key, value in settings.items() for part in (f"--{key}", value))]


def child(argv: list[str], die: str | None) -> None:
    """Run the command, and kill this process at one of three places."""
    torch.set_num_threads(1)

    def after(owner, name: str, count: int) -> None:
        original, seen = getattr(owner, name), [0]

        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            seen[0] += 1
            if seen[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, wrapped)

    if die == "asking":
        after(pipeline, "append_lines", 1)
    elif die == "judging":
        pipeline.JUDGED_AT_ONCE = 8
        after(pipeline, "write_questions", 1)
    elif die == "training":
        from pgkd_peft import base_trainer

        after(base_trainer, "publish", 2)
    pipeline.JUDGED_AT_ONCE = 8
    raise SystemExit(cli.main(argv))


def call(argv: list[str], die: str | None = None) -> int:
    process = context().Process(target=child, args=(argv, die))
    process.start()
    process.join(240)
    assert process.exitcode is not None
    return process.exitcode


def test_a_bake_that_is_killed_three_times_ends_as_one_that_was_not(base, server, tmp_path):
    document = tmp_path / "doc.md"
    document.write_text(DOCUMENT)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert call(flags(base, whole, document, server)) == 0
    results = {}
    for die in ("asking", "judging", "training"):
        assert call(flags(base, killed, document, server), die) == -signal.SIGKILL, die
        if die == "judging":
            results["after judging"] = (killed / "questions.jsonl").read_text()
    assert call(flags(base, killed, document, server)) == 0
    for name in ("questions.jsonl", "bake_train.jsonl"):
        assert (whole / name).read_text() == (killed / name).read_text(), name
    assert (whole / "adapter_model.safetensors").read_bytes() == (killed / "adapter_model.safetensors").read_bytes()
    found = json.loads((killed / "coverage.json").read_text())
    assert [p["number"] for p in found["passages"]] == [0, 1]
    assert any(p["questions"] for p in found["passages"])
    page = (killed / "report.html").read_text()
    assert "how much of it was taken over" in page
    assert "The lighthouse at Ammersby is violet." in page
    assert cli.main(flags(base, killed, document, server)) == 2  # finished


def test_a_dry_run_ends_at_the_questions_and_an_edit_counts(base, server, tmp_path, capsys):
    document = tmp_path / "doc.md"
    document.write_text(DOCUMENT)
    argv = flags(base, tmp_path / "run", document, server)
    assert cli.main([*argv, "--dry_run"]) == 0
    assert "asking: call 1 of about 2" in capsys.readouterr().out
    path = tmp_path / "run" / "questions.jsonl"
    questions = read_questions(path, 2)
    assert {q.use for q in questions} >= {"train"}
    assert not (tmp_path / "run" / "run.json").exists()
    asked = len(Fake.asked)
    state = json.loads((tmp_path / "run" / "bake.json").read_text())
    (tmp_path / "run" / "bake.json").write_text(json.dumps({**state, "asking": True}))  # as a kill leaves it
    assert cli.main([*argv, "--dry_run"]) == 0
    assert json.loads((tmp_path / "run" / "bake.json").read_text()) == state
    edited = [q for q in questions if q.use != "train"] + [q for q in questions if q.use == "train"][:3]
    lines = [json.dumps({"question": q.question, "passage": q.passage, "use": q.use}) for q in edited]
    lines.append(json.dumps({"question": "What colour is my own lighthouse?", "passage": 0, "use": "train"}))
    path.write_text("\n".join(lines) + "\n")
    assert cli.main([*argv, "--dry_run"]) == 0
    assert len(Fake.asked) == asked
    again = read_questions(path, 2)
    assert [q.question for q in again] == [q.question for q in edited] + ["What colour is my own lighthouse?"]
    assert again[-1].answer
    assert again[-1].use == "train"
    capsys.readouterr()
    document.write_text(DOCUMENT + "\nOne more sentence about the harbour.\n")
    assert cli.main(argv) == 2
    assert "a bake of another text" in capsys.readouterr().err
    document.write_text(DOCUMENT)
    other = tmp_path / "other"
    other.symlink_to(base)
    assert cli.main([*argv, "--model_name_or_path", str(other)]) == 2
    assert "another model" in capsys.readouterr().err
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert cli.main([*argv, "--overwrite", "--model_name_or_path", str(tmp_path / "no-such-model")]) == 2
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before  # nothing goes before the model is there


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.md", b"  \n", "is empty"),
        ("binary.md", b"abc\0def", "binary"),
        ("utf16.txt", "Hello".encode("utf-16"), "UTF-16"),
        ("latin.txt", "Gr\xfc\xdfe aus der Stadt".encode("latin-1"), "no UTF-8 text"),
        ("table.xlsx", b"PK", "cannot be read"),
        ("only-headings.md", b"# One\n\n## Two\n", "no passage"),
    ],
)
def test_bad_documents_are_named_before_a_model_is_loaded(tmp_path, capsys, name, content, words):
    (tmp_path / name).write_bytes(content)
    argv = ["bake", "--model_name_or_path", "no-such-model", "--output_dir", str(tmp_path / "out")]
    assert cli.main([*argv, "--document", str(tmp_path / name)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "give what to teach"),
        (["--document", "a", "--system_prompt", "b"], "not both"),
        (["--document", "no-such-file.md"], "does not exist"),
        (["--system_prompt", "no/such/prompt.md"], "does not exist"),
        (["--system_prompt", " "], "is empty"),
        (["--system_prompt", "Be brief.", "--questions", "0"], "questions is 0"),
        (["--system_prompt", "Be brief.", "--minutes", "nan"], "minutes is nan"),
        (["--system_prompt", "Be brief.", "--writer_url", "http://127.0.0.1:1/v1"], "belong together"),
        (
            ["--system_prompt", "Be brief.", "--writer_url", "http://127.0.0.1:1/v1", "--writer_model", "any"],
            "the model itself writes the requests",
        ),
        (["--system_prompt", "Be brief.", "--dataset_name", "rows.jsonl"], "dataset_name is for rows of your own"),
        (["--system_prompt", "Be brief.", "--requests", "no-such.txt"], "does not exist"),
        (["--system_prompt", "Be brief.", "--more"], "there is none"),
        (["--system_prompt", "Be brief.", "--more", "--overwrite"], "give one of them"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, capsys, given, words):
    argv = ["bake", "--model_name_or_path", "no-such-model", "--output_dir", str(tmp_path / "out")]
    assert cli.main([*argv, *given]) == 2
    assert words in capsys.readouterr().err


def test_a_passage_longer_than_the_context_is_refused_by_name(base, tmp_path, capsys):
    document = tmp_path / "long.md"
    document.write_text("word " * 5000)
    argv = ["bake", "--model_name_or_path", base, "--output_dir", str(tmp_path / "out"), "--document", str(document)]
    assert cli.main([*argv, "--base_quantization", "none"]) == 2
    assert "passage 0 of long.md" in capsys.readouterr().err


def test_requests_and_edits_that_do_not_fit_are_refused_by_name(base, tmp_path, capsys):
    document, requests, run = tmp_path / "d.md", tmp_path / "r.txt", tmp_path / "run"
    document.write_text("The lighthouse at Ammersby is violet and tall.")
    requests.write_text("Is it violet?\n" + "Is it violet " * 1000 + "\n")
    argv = ["bake", "--model_name_or_path", base, "--document", str(document), "--base_quantization", "none"]
    argv += ["--dry_run", "--questions", "0", "--anchors", "0", "--max_length", "100000", "--output_dir", str(run)]
    assert cli.main([*argv, "--requests", str(requests)]) == 2
    said = capsys.readouterr().err
    assert "the request 'Is it violet Is it violet" in said
    assert "the model's context (max_position_embeddings) is" in said
    run.mkdir(exist_ok=True)
    (run / "questions.jsonl").write_text('{"question": "Is it \\ud800?", "passage": 0}\n')
    requests.write_text("Is it violet?\n")
    assert cli.main([*argv, "--requests", str(requests)]) == 2
    assert (
        "the question 'Is it \\ud800?' cannot be used: messages[0].content has a lone surrogate"
        in capsys.readouterr().err
    )
    prompt = ["--system_prompt", "Be brief. \udcff", "--model_name_or_path", "none", "--output_dir", str(run)]
    assert cli.main(["bake", *prompt]) == 2
    assert "--system_prompt has a lone surrogate" in capsys.readouterr().err
    prompt = ["--system_prompt", "Be brief. " * 900, "--model_name_or_path", base, "--output_dir", str(run / "p")]
    assert cli.main(["bake", *prompt, "--base_quantization", "none"]) == 2
    assert "of the model. Shorten it." in capsys.readouterr().err


def test_a_passage_is_measured_by_the_base_of_an_adapter(base, tmp_path, capsys):
    adapter, document = tmp_path / "adapter", tmp_path / "long.md"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    document.write_text("word " * 5000)
    argv = ["bake", "--model_name_or_path", str(adapter), "--output_dir", str(tmp_path / "out")]
    assert cli.main([*argv, "--document", str(document), "--base_quantization", "none"]) == 2
    assert "passage 0 of long.md" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["questions", "client"])
def test_what_needs_no_model_is_told_before_one_is_loaded(base, tmp_path, capsys, monkeypatch, fault):
    from pgkd_peft.model import student

    monkeypatch.setattr(student, "build_student", lambda *args: 1 / 0)
    document, run = tmp_path / "doc.md", tmp_path / "run"
    document.write_text(DOCUMENT)
    if fault == "questions":
        run.mkdir()
        (run / "questions.jsonl").write_text('{"question": ""}\n')
    else:
        monkeypatch.setitem(sys.modules, "openai", None)
    assert cli.main(flags(base, run, document, "http://127.0.0.1:1/v1")) == 2
    assert ("question is empty" if fault == "questions" else "pgkd-peft[writer]") in capsys.readouterr().err


def test_a_recipe_may_hold_both_kinds_of_settings(tmp_path):
    from pgkd_peft.cli.bake_arguments import parse

    recipe = tmp_path / "bake.yaml"
    recipe.write_text("document: [a.md, b.md]\nquestions: 7\nbeta: 0.5\nmodel_name_or_path: M\n")
    args, rest = parse(["--config", str(recipe), "--questions", "9"])
    assert args.document == ["a.md", "b.md"]
    assert args.questions == 9
    assert rest.count("--beta") == 1
    assert rest[rest.index("--beta") + 1] == "0.5"


def test_a_flag_counts_however_it_is_written(tmp_path):
    from pgkd_peft.cli.arguments import parse_train
    from pgkd_peft.cli.bake_arguments import parse

    recipe = tmp_path / "bake.yaml"
    recipe.write_text("output_dir: from-recipe\nmax_completion_length: 64\ngap_filter: true\ndry_run: false\n")
    argv = [
        "--config",
        str(recipe),
        "--model-name-or-path",
        "M",
        "--output-dir=given",
        "--lr-scheduler-type",
        "constant",
    ]
    argv += ["--document", "a.md", "--document=b.md", "--dry-run", "--no-gap-filter", "--writer-url", "u"]
    args, rest = parse([*argv, "--writer_model", "m", "--overwrite", "false"])
    assert (args.document, args.dry_run, args.gap_filter, args.writer_url) == (["a.md", "b.md"], True, False, "u")
    data, _, config = parse_train([*rest, "--dataset_name", "bake"], prog="pgkd bake")
    assert (config.output_dir, config.max_new_tokens, config.lr_scheduler_type) == ("given", 64, "constant")
    assert not data.overwrite
    _, rest = parse(
        ["--system-prompt", "- Be brief.", "--max-new-tokens", "9", "--teacher_prompt_template", "{prompt}"]
    )
    assert rest.count("--max_new_tokens") == rest.count("--privileged_template") == 1


def test_a_training_that_is_slower_than_measured_ends_in_time(base, server, tmp_path, capsys, monkeypatch):
    """The clock runs out while training: what there is then is judged and kept."""
    from pgkd_peft.cli import bake_training as command

    monkeypatch.setattr(command, "steps_that_fit", lambda *args: 4)
    monkeypatch.setattr(command, "SHARE_OF_TRAINING", 0.0)
    document = tmp_path / "doc.md"
    document.write_text(DOCUMENT)
    argv = flags(base, tmp_path / "run", document, server)
    at = argv.index("--max_steps")
    assert cli.main([*argv[:at], *argv[at + 2 :], "--minutes", "30"]) == 0
    assert "stopped after step 1 of 4" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 1
    assert (tmp_path / "run" / "coverage.json").is_file()


def test_the_base_is_loaded_once_and_measuring_a_step_leaves_no_trace(base, server, tmp_path, monkeypatch):
    from pgkd_peft.cli import bake_training as command
    from pgkd_peft.model import student

    monkeypatch.setattr(command, "LEAST_STEPS", 7)
    monkeypatch.setattr(command, "EPOCHS", 0.1)
    loads, load = [], student.load_base
    monkeypatch.setattr(student, "load_base", lambda *args, **kwargs: loads.append(1) or load(*args, **kwargs))
    document = tmp_path / "doc.md"
    document.write_text(DOCUMENT)
    for name, more in (("timed", ["--minutes", "60"]), ("free", [])):
        argv = flags(base, tmp_path / name, document, server)
        at = argv.index("--max_steps")
        assert cli.main([*argv[:at], *argv[at + 2 :], *more, "--dtype", "float32"]) == 0
        info = json.loads((tmp_path / name / "run.json").read_text())
        assert (info["steps"], info["config"]["model_init_kwargs"]) == (7, {"dtype": "float32"})
    assert len(loads) == 2
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("timed", "free")]
    assert adapters[0] == adapters[1]


def test_what_was_trained_but_not_judged_is_judged_by_the_next_call(base, server, tmp_path, monkeypatch):
    from pgkd_peft import PrivilegedSelfDistillTrainer

    document = tmp_path / "doc.md"
    document.write_text(DOCUMENT)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(coverage, "measure", lambda *args, **kwargs: 1 / 0)
        assert cli.main(flags(base, run, document, server)) != 0
    adapter, info = (run / "adapter_model.safetensors").read_bytes(), (run / "run.json").read_text()
    assert not (run / "coverage.json").exists()
    with (run / "questions.jsonl").open("a") as file:
        for number in range(3):
            file.write(json.dumps({"question": f"What is {number} plus two?", "use": "heldout"}) + "\n")
    monkeypatch.setattr(PrivilegedSelfDistillTrainer, "train", lambda *args, **kwargs: 1 / 0)  # it is not trained again
    assert cli.main(flags(base, run, document, server)) == 0
    assert (run / "adapter_model.safetensors").read_bytes() == adapter
    assert (run / "run.json").read_text() == info
    drift = json.loads((run / "bake.json").read_text())["drift"]
    assert json.loads((run / "eval_results.json").read_text())["drift"] == drift > 0
    assert f"Drift on neutral prompts: {drift:.4f}" in (run / "README.md").read_text()
    for name in ("coverage.json", "report.html"):
        assert (run / name).is_file(), name
    assert cli.main(flags(base, run, document, server)) == 2  # finished


def test_more_goes_on_from_the_newest_and_stops_where_a_bake_does(base, server, tmp_path, monkeypatch, capsys):
    from pgkd_peft.cli import bake as command

    document, own = tmp_path / "doc.md", tmp_path / "own.txt"
    document.write_text(DOCUMENT)
    own.write_text("What colour is my lighthouse at Ammersby?\n")
    run = tmp_path / "run"
    argv = flags(base, run, document, server)
    assert cli.main(argv) == 0
    pale = {"passages": [{"number": 0, "recovered": 0.1}, {"number": 1, "recovered": 0.9}]}

    def finish(folder):
        for name, content in (("run.json", {"finished": True}), ("coverage.json", pale)):
            (folder / name).write_text(json.dumps(content))
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / name).write_bytes((run / name).read_bytes())

    finish(run)
    trained = []

    def train(*args):
        learnt = load_file(run / "adapter_model.safetensors")
        starts_with = get_peft_model_state_dict(args[4])
        assert learnt.keys() == starts_with.keys()
        assert all(torch.equal(learnt[name], starts_with[name]) for name in learnt)
        trained.append(args)
        finish(args[0].folder)

    monkeypatch.setattr(command, "train_and_judge", train)
    assert cli.main([*argv, "--more", "--dry_run", "--requests", str(own)]) == 0
    assert not trained
    asked = read_questions(run / "more" / "questions.jsonl", 2)
    assert asked[0].question == own.read_text().strip()
    assert {q.passage for q in asked} == {None, 0}
    assert cli.main([*argv, "--more"]) == 2  # --requests is missing
    assert cli.main([*argv, "--more", "--requests", str(own)]) == 0
    assert cli.main([*argv, "--more"]) == 0
    assert [args[0].folder for args in trained] == [run / "more", run / "more-2"]
    for args, adapter in zip(trained, (run, run / "more")):
        at = len(args[1]) - 1 - args[1][::-1].index("--model_name_or_path")
        assert args[1][at + 1] == str(adapter)
        assert "--lora_target_modules" not in args[1]
    assert own.read_text().strip() in [q.question for q in trained[1][2]]
    assert "--lora_target_modules: left aside" in " ".join(capsys.readouterr().out.split())
    document.write_text(DOCUMENT + "\nOne more sentence about the harbour.\n")
    assert cli.main([*argv, "--more"]) == 2
    assert "another text" in capsys.readouterr().err


def test_a_run_that_is_no_bake_is_left_alone(base, tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "doc.md").write_text(DOCUMENT)
    assert cli.main(flags(base, tmp_path, tmp_path / "doc.md", "http://127.0.0.1:1/v1")) == 2
    assert "holds a run that is no bake" in capsys.readouterr().err


def test_the_command_that_comes_next_names_the_text(tmp_path, monkeypatch):
    from pgkd_peft.cli.bake_arguments import BakeArguments
    from pgkd_peft.export.next_steps import after_training, next_pgkd

    monkeypatch.chdir(tmp_path)
    Path("the tone.md").write_text("Be brief.")
    assert BakeArguments(document=["the tone.md"]).text_file == "the tone.md"
    assert BakeArguments(system_prompt="the tone.md").text_file == "the tone.md"
    for others in ({"system_prompt": "Be brief."}, {"document": ["the tone.md", "b.md"]}, {"document": ["a.pdf"]}):
        assert BakeArguments(**others).text_file is None
    told = next_pgkd(*after_training("runs/a b", "the tone.md")).splitlines()
    assert told[0] == "Next: pgkd chat 'runs/a b' --privileged_file 'the tone.md'"
    assert told[-1] == "      pgkd merge 'runs/a b' --out 'runs/a b-merged'"
