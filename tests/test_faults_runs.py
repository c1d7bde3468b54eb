"""What a kill, a full disk, another's folder and a damaged file leave: nothing finished lost, nothing said untruly."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from safetensors import SafetensorError
from test_faults import ADAPTER, ADAPTER_CONFIG, place, says, train  # noqa: F401
from tiny import save_tiny

from pgkd_peft import PrivilegedGKDConfig, cli
from pgkd_peft.errors import ConfigError
from pgkd_peft.run.jsonl import write_whole
from pgkd_peft.run.place import locked


def edited(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")


# ---- what a kill leaves ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs but `finally`."""


def killed_at(monkeypatch, number: int, folder: Path):
    """Die at the file of this number, from 0, that the final save puts into `folder`."""
    original, seen = Path.replace, []

    def replace(self, target):
        if self.parent == folder / ".saving-model":
            if len(seen) == number:
                raise Killed
            seen.append(self.name)
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    return seen


def saved_files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_file() and p.name not in LATER)


LATER = ("report.html", "eval_results.json", "eval_answers.jsonl", "bake_neutral.jsonl", "bake_heldout.jsonl")


def test_killed_in_the_final_save_all_of_it_is_saved_by_the_next_call(place, tmp_path, monkeypatch):  # noqa: F811
    expected = saved_files(place.run)
    for number in range(100):
        run = tmp_path / f"run{number}"
        with monkeypatch.context() as patch:
            seen = killed_at(patch, number, run)
            argv = ["train", "--config", place.recipe, "--output_dir", str(run)]
            try:
                assert cli.main(argv) == 0
                break
            except Killed:
                assert json.loads((run / "run.json").read_text())["finished"] is False
        assert cli.main([*argv, "--resume"]) == 0
        assert saved_files(run) == expected
        assert (run / ADAPTER).read_bytes() == (place.run / ADAPTER).read_bytes()
        assert json.loads((run / "run.json").read_text())["finished"] is True
    assert number == len(seen) >= 5
    assert seen[-1] == "run.json"


def test_killed_before_the_best_adapter_was_saved_the_best_one_is(place, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    argv = ["train", "--config", place.recipe, "--output_dir", str(run), "--eval_dataset_name", place.data]
    argv += ["--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end", "true"]
    argv += ["--metric_for_best_model", "divergence", "--greater_is_better", "true", "--learning_rate", "0.2"]
    for better in ("true", "false"):  # by one of them the last step is not the best one
        assert cli.main([*argv, "--greater_is_better", better, "--overwrite"]) == 0
        best = (run / ADAPTER).read_bytes()
        if best != (run / "checkpoint-3" / ADAPTER).read_bytes():
            break
    (run / ADAPTER).unlink()
    edited(run / "run.json", finished=False)
    assert cli.main(["train", "--output_dir", str(run), "--resume"]) == 0
    assert (run / ADAPTER).read_bytes() == best != (run / "checkpoint-3" / ADAPTER).read_bytes()


def test_a_resumed_run_keeps_what_was_chosen_of_checkpointing(place, tmp_path, capsys):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(place.run, run)
    capsys.readouterr()
    assert cli.main(["train", "--output_dir", str(run), "--resume", "--max_steps", "4"]) == 0
    assert json.loads((run / "run.json").read_text())["config"]["activation_checkpointing"] is False
    assert "activation_checkpointing" not in capsys.readouterr().err


# ---- files that are not what they should be --------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b"\xff\xfe", b"not a digest\n"])
def test_damaged_prompts_of_a_training_are_unknown_ones(place, tmp_path, capsys, text):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(place.run, run)
    (run / "trained_prompts.txt").write_bytes(text)
    (run / "README.md").write_bytes(b"\xff\xfe# card\n")
    (run / "eval_results.json").write_text("{")  # is replaced
    assert cli.main(["eval", str(run), "--dataset_name", place.data, "--max_new_tokens", "2"]) == 0
    assert "nothing says whether they were trained on" in " ".join(capsys.readouterr().out.split())
    assert json.loads((run / "eval_results.json").read_text())["n"] == 4
    assert "## Evaluation" in (run / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"r": "16"}, "(r) is '16'"),
        ({"rank_pattern": [1]}, "rank_pattern is [1]"),
        ({"base_model_name_or_path": 3}, "names no base model"),
    ],
)
def test_adapter_configs_are_refused_alike(place, tmp_path, says, train, change, words):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(place.run, run)
    edited(run / ADAPTER_CONFIG, **change)
    train(model=str(run), words=[ADAPTER_CONFIG, words])
    for argv in (["eval"], ["chat", "--message", "hi"], ["merge", "--out", tmp_path / "out"]):
        says([argv[0], run, *argv[1:]], ADAPTER_CONFIG, words)
    says(["export", run, "--out", tmp_path / "x.gguf", "--format", "gguf-lora"], ADAPTER_CONFIG, words)
    assert not [p.name for p in tmp_path.iterdir() if p.name != "run"]


def test_training_goes_on_from_an_adapter_on_its_own_base_alone(place, tmp_path, train):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(place.run, run)
    other = save_tiny(tmp_path / "other", seed=7)
    edited(run / ADAPTER_CONFIG, base_model_name_or_path=other)
    train(model=str(run), words=["was trained on another base", "other", "run.json"])
    edited(run / ADAPTER_CONFIG, base_model_name_or_path=place.model)
    argv = ["train", "--config", place.recipe, "--model_name_or_path", str(run), "--output_dir", str(tmp_path / "on")]
    assert cli.main(argv) == 0


COVERAGE = {
    "passages": [
        {
            **{"number": 0, "source": "a.md", "headings": ["A"], "text": "It is violet.", "recovered": 0.1},
            "questions": [{"question": "Which?", "base": "a", "teacher": "b", "student": "c", "recovered": None}],
        }
    ]
}


@pytest.mark.parametrize("harm", [None, "passages", "headings", "questions", "a question", "text"])
def test_a_report_shows_a_whole_coverage_and_leaves_out_a_broken_one(place, tmp_path, harm):  # noqa: F811
    run, page = tmp_path / "run", tmp_path / "page.html"
    shutil.copytree(place.run, run)
    coverage = json.loads(json.dumps(COVERAGE))
    (passage,) = coverage["passages"]
    if harm == "passages":
        coverage["passages"].append("x")
    elif harm == "a question":
        del passage["questions"][0]["student"]
    elif harm is not None:
        passage[harm] = [[1]]
    (run / "coverage.json").write_text(json.dumps(coverage))
    assert cli.main(["report", str(run), "--out", str(page)]) == 0
    assert ("how much of it was taken over" in page.read_text()) is (harm is None)


@pytest.mark.parametrize(
    "results",
    [
        {"columns": 3, "recovered": "x", "drift": [1]},
        {"columns": {"student": "x"}, "recovered_interval": [1, "x"]},
        {"columns": {"student": {"score": {}}}, "recovered": 0.5, "recovered_interval": 3},
    ],
)
def test_the_table_of_runs_leaves_out_broken_results(place, tmp_path, capsys, results):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(place.run, run)
    (run / "eval_results.json").write_text(json.dumps(results))
    for argv in (["runs", run], ["runs", run, "--sort", "recovered"], ["report", tmp_path]):
        assert cli.main([str(arg) for arg in argv]) == 0
    assert "Traceback" not in capsys.readouterr().err


# ---- places ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_else_is_left_alone(place, tmp_path, says):  # noqa: F811
    for name in ("README.md", "recipe.yaml", "tokenizer.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        message = says(["train", "--config", place.recipe, "--output_dir", folder], name, "--overwrite")
        assert "--output_dir" in message
        assert [(p.name, p.read_text()) for p in folder.iterdir()] == [(name, "mine")]
    (tmp_path / "doc.md").write_text("# Harbour\n\nThe lighthouse at Ammersby is violet.\n")
    argv = ["bake", "--model_name_or_path", place.model, "--document", tmp_path / "doc.md"]
    says([*argv, "--output_dir", folder], "tokenizer.json", "--overwrite")
    (folder / "notes.txt").write_text("mine")
    (folder / "tokenizer.json").unlink()
    assert cli.main(["train", "--config", place.recipe, "--output_dir", str(folder)]) == 0


def test_an_export_deletes_nothing_beside_it(place, tmp_path):  # noqa: F811
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("mine")
    assert cli.main(["export", str(place.run), "--out", str(tmp_path / "out"), "--base-id", "a/b"]) == 0
    assert (tmp_path / "out.partial" / "mine").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.partial"]


def test_devices_and_links_to_nothing_are_no_place(place, tmp_path, says):  # noqa: F811
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for argv in (["eval", place.run, "--dataset_name", place.data], ["report", place.run]):
        says([*argv, "--out", pipe], f"--out '{pipe}' is a device or a pipe")
    assert pipe.is_fifo()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    says(["train", "--config", place.recipe, "--output_dir", tmp_path / "link"], "is a link to nothing")


FULL_DISK = {
    "eval": ("pgkd_peft.cli.results.write_json", OSError(errno.ENOSPC, "No space left on device")),
    "report": ("pgkd_peft.view.report.write_whole", OSError(errno.ENOSPC, "No space left on device")),
    "merge": ("pgkd_peft.export.write.save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
    "export": ("pgkd_peft.export.publish.save_file", SafetensorError("No space left on device (os error 28)")),
    "gguf": ("pgkd_peft.export.publish.write_gguf_lora", OSError("1024 requested and 496 written")),
}


@pytest.mark.parametrize("command", FULL_DISK)
def test_a_full_disk_is_told_by_place_and_flag(place, tmp_path, says, monkeypatch, command):  # noqa: F811
    where, error = FULL_DISK[command]

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(where, fail)
    out = tmp_path / "out.gguf"
    how = {
        "eval": ["eval", place.run, "--dataset_name", place.data, "--max_new_tokens", "2"],
        "report": ["report", place.run],
        "merge": ["merge", place.run, "--no-verify"],
        "export": ["export", place.run, "--base-id", "a/b"],
        "gguf": ["export", place.run, "--format", "gguf-lora"],
    }
    says([*how[command], "--out", out], f"--out '{out}' cannot be written", "Free some space, or give another place")
    assert not out.exists()


def test_a_file_that_could_not_be_written_leaves_no_half(tmp_path, monkeypatch):
    def full(self, content):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(tmp_path / "a.json", "{}")
    assert not list(tmp_path.iterdir())

    def full_text(self, content, encoding=None):
        full(self, content)

    monkeypatch.setattr(Path, "write_text", full_text)
    with pytest.raises(OSError, match="No space left"), locked(tmp_path / "new" / "run"):
        pass
    assert not list(tmp_path.iterdir())


# ---- a bake ----------------------------------------------------------------------------------------------------------

DOCUMENT = "# Harbour\n\nThe lighthouse at Ammersby is violet. Its keeper is called Ilsa Vorrenmark.\n"
REQUESTS = (
    "What colour is the lighthouse at Ammersby?\nWho is Ilsa Vorrenmark?\nWhere is the keeper of the lighthouse?\n"
)


@pytest.fixture
def bake(place, tmp_path):  # noqa: F811
    """`pgkd bake` of three requests with four steps: the arguments for a folder."""
    (tmp_path / "doc.md").write_text(DOCUMENT)
    (tmp_path / "requests.txt").write_text(REQUESTS)
    settings = {
        **{"model_name_or_path": place.model, "document": tmp_path / "doc.md", "requests": tmp_path / "requests.txt"},
        **{"questions": 0, "anchors": 0, "gap_filter": "false", "max_new_tokens": 4, "max_steps": 2, "save_steps": 1},
        **{"base_quantization": "none", "bf16": "false", "use_cpu": "true", "rollout_log_steps": 0},
        **{"logging_steps": 1, "disable_tqdm": "true", "lora_target_modules": "q_proj"},
    }

    def arguments(folder: Path, *flags: str) -> list[str]:
        told = {**settings, "output_dir": folder}
        return ["bake", *(str(part) for name, value in told.items() for part in (f"--{name}", value)), *flags]

    return arguments


def test_a_bake_that_is_killed_in_its_final_save_is_ended_by_the_next_call(bake, tmp_path, says, monkeypatch):  # noqa: F811
    whole = tmp_path / "whole"
    assert cli.main(bake(whole)) == 0
    for number in range(100):
        run = tmp_path / f"run{number}"
        with monkeypatch.context() as patch:
            seen = killed_at(patch, number, run)
            try:
                assert cli.main(bake(run)) == 0
                break
            except Killed:
                assert not (run / "coverage.json").exists()
        assert cli.main(bake(run)) == 0
        assert saved_files(run) == saved_files(whole)
        for name in (ADAPTER, "questions.jsonl", "coverage.json"):
            assert (run / name).read_bytes() == (whole / name).read_bytes()
        says(bake(run), "is finished")
    assert number == len(seen) >= 5


def test_a_bake_with_a_damaged_coverage_says_so(bake, tmp_path, says):  # noqa: F811
    run = tmp_path / "run"
    assert cli.main(bake(run)) == 0
    before = (run / "coverage.json").read_bytes()
    for text in ("", "[]", "{}", '{"passages": [1]}'):
        (run / "coverage.json").write_text(text)
        says(bake(run, "--more"), "coverage.json", "Remove it")
    (run / "coverage.json").unlink()
    assert cli.main(bake(run)) == 0
    assert (run / "coverage.json").read_bytes() == before


def test_a_bake_keeps_others_out_of_its_folder_from_its_first_question(bake, tmp_path, says, monkeypatch):  # noqa: F811
    run, inside = tmp_path / "run", []

    def ask(job):
        with monkeypatch.context() as patch:
            patch.setattr("pgkd_peft.run.place._process", lambda pid: {"pid": 1, "host": socket.gethostname()})
            for flags in ((), ("--more",)):
                inside.append(says(bake(run, *flags), "is in use by process"))
        raise ConfigError("enough")

    monkeypatch.setattr("pgkd_peft.cli.bake.write_questions", ask)
    says(bake(run), "enough")
    assert len(inside) == 2
    assert not run.exists()


# ---- settings and consoles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_generations", 10**20),
        ("per_device_train_batch_size", 10**20),
        ("rollout_mismatch_tolerance", -1.0),
        ("accelerator_config", True),
        ("eval_strategy", None),
        ("save_strategy", "weekly"),
        ("lr_scheduler_type", ""),
        ("optim", 3),
        ("metric_for_best_model", True),
        ("privileged_template", True),
        ("report_to", {}),
        ("report_to", [{}]),
    ],
)
def test_values_of_a_wrong_kind_are_refused_by_name(tmp_path, name, value):
    with pytest.raises(ConfigError, match=name):
        PrivilegedGKDConfig(output_dir=str(tmp_path), **{name: value})


def test_closed_streams_of_a_process(place, says, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdin", None)
        says(["chat", place.run], "standard input is closed", "--message")
    with monkeypatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(f"sys.{name}", None)
        assert cli.main(["runs", str(place.folder)]) == 0
        assert cli.main(["runs", "/nowhere"]) == 2


def test_a_name_that_is_no_text_is_refused_before_the_work(place, tmp_path, says):  # noqa: F811
    name = os.fsdecode(os.fsencode(tmp_path / "r") + b"\xfc")
    says(["train", "--config", place.recipe, "--output_dir", name], "output_dir", "PYTHONUTF8=1")
    says(["report", place.run, "--out", name], "--out", "PYTHONUTF8=1")
    (tmp_path / "pi.txt").write_bytes(b"\xff\xfea\0")
    says(["chat", place.run, "--privileged_file", tmp_path / "pi.txt"], "privileged_file", "UTF-16")
