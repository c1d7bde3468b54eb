"""The run folder: each file name once, and what is written there is whole, cut back on resume, and never stale."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import peft.utils
import pytest
from adapters import lora, save_adapter
from runs import make_trainer
from tiny import save_tiny
from transformers.trainer import TRAINER_STATE_NAME

import pgkd_peft
from pgkd_peft.export.adapter import read_run
from pgkd_peft.run import folder
from pgkd_peft.run.jsonl import read_json, read_lines, write_json
from pgkd_peft.view.report import read_results

PACKAGE = Path(pgkd_peft.__file__).parent
NAMES = {value for key, value in vars(folder).items() if key.isupper() and isinstance(value, str)}
# Below `run`: folders of models that others wrote; what files a tokenizer may have; and what is yet to follow.
ALLOWED = {"run/folder.py", "model/student.py", "model/load.py", "teacher.py", "export/write.py"}


def test_each_file_name_is_written_once():
    assert len(NAMES) >= 20
    found = {}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        words = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        if words & NAMES and str(path.relative_to(PACKAGE)) not in ALLOWED:
            found[str(path.relative_to(PACKAGE))] = words & NAMES
    assert found == {}


def test_others_call_their_files_so():
    assert folder.ADAPTER_FILE == peft.utils.SAFETENSORS_WEIGHTS_NAME
    assert folder.ADAPTER_CONFIG == peft.utils.CONFIG_NAME
    assert folder.STATE_FILE == TRAINER_STATE_NAME


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "run.json"
    write_json(path, {"steps": 1, "loss": float("nan"), "where": Path("x")})
    assert json.loads(path.read_text()) == {"steps": 1, "loss": None, "where": "x"}
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        write_json(path, {"steps": 2})
    assert read_json(path)["steps"] == 1


def test_resuming_from_python_cuts_every_log_back(tmp_path):
    """The callback of `pgkd train` that writes metrics.jsonl is not there; the traces must be cut back all the same."""
    base = save_tiny(tmp_path / "base")
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "rollout_log_steps": 1}
    make_trainer(base, str(tmp_path / "run"), settings=settings).train()
    logs = [folder.COMPLETIONS_FILE, folder.TRACE_FILE]
    before = {name: [record["step"] for record in read_lines(tmp_path / "run" / name)] for name in logs}
    assert all(steps == [1, 2, 3, 4] for steps in before.values())
    make_trainer(base, str(tmp_path / "run"), settings=settings).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
    )
    after = {name: [record["step"] for record in read_lines(tmp_path / "run" / name)] for name in logs}
    assert after == before


def test_a_stale_summary_never_wins(tmp_path):
    run = tmp_path / "run"
    save_adapter(run, save_tiny(tmp_path / "base"), lora())
    old = {"base": 0.0, "teacher": 1.0, "student": 0.5, "recovered": 0.5, "n": 10}
    write_json(run / folder.SUMMARY_FILE, old)
    assert read_run(str(run), log=lambda line: None).results["recovered"] == 0.5
    assert [result["recovered"] for result in read_results(run)] == [0.5]
    write_json(run / folder.RESULTS_FILE, {**old, "student": 0.8, "recovered": 0.8})
    assert read_run(str(run), log=lambda line: None).results["recovered"] == 0.8
    assert [result["recovered"] for result in read_results(run)] == [0.8]


def test_an_overwritten_run_keeps_what_is_not_its_own(tmp_path):
    assert all(folder.is_run_file(name) for name in (*folder.RUN_FILES, "failed_batch_step12.json"))
    assert not any(folder.is_run_file(name) for name in ("notes.txt", folder.QUESTIONS_FILE, "failed_batch_stepX.json"))
    assert folder.is_checkpoint(folder.checkpoint_name(7))
    assert not folder.is_checkpoint("checkpoint-best")
