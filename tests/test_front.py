"""The benchmarks of score against drift and of feedback, whole, on a tiny model: train, judge, one line a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny import TINY_RUN

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import feedback  # noqa: E402
import front  # noqa: E402

from pgkd_peft import cli  # noqa: E402


@pytest.fixture
def in_process(monkeypatch):
    """`pgkd train` in this process: a child's imports take longer than its two steps."""
    monkeypatch.setattr(front, "pgkd", lambda *argv: cli.main(list(argv)))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def test_the_front_s_lines(in_process, llama_path, tmp_path, monkeypatch):
    asked = {"role": "user", "content": "Who keeps bees?"}
    row = {"messages": [asked, {"role": "assistant", "content": "Ann."}], "privileged_messages": "Ann keeps bees."}
    write_rows(tmp_path / "rows.jsonl", [row | {"privileged_messages": f"Ann keeps {n} bees."} for n in range(4)])
    write_rows(tmp_path / "judged.jsonl", [row | {"group": n // 2} for n in range(4)])
    write_rows(
        tmp_path / "neutral.jsonl", [{"messages": [{"role": "user", "content": text}]} for text in ("Hi", "So?")]
    )
    recipe = {**TINY_RUN, "model_name_or_path": llama_path, "dataset_name": str(tmp_path / "rows.jsonl")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"privileged_placement": "user", "seed": 9}))
    argv = ["front.py", "--config", str(tmp_path / "recipe.yaml"), "--conditions", "pi", "sft@1e-2", "--seeds", "3"]
    argv += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "front.jsonl"), "--group_key", "group"]
    argv += [
        "--dataset_name",
        str(tmp_path / "judged.jsonl"),
        "--neutral_dataset_name",
        str(tmp_path / "neutral.jsonl"),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    front.main()
    pi, sft = front.read_lines(tmp_path / "front.jsonl")
    for line, name, rate in ((pi, "pi", 0.05), (sft, "sft@1e-2", 0.01)):
        assert (line["condition"], line["learning_rate"], line["seed"]) == (name, rate, 3)
        assert (line["n"], line["drift_prompts"], line["steps"], line["max_new_tokens"]) == (4, 2, 2, 4)
        low, high = line["drift_interval"]
        assert 0 < low <= line["drift"] <= high
    assert (pi["base"], pi["teacher"]) == (sft["base"], sft["teacher"])
    assert pi["drift"] != sft["drift"]


def test_feedback_s_line(in_process, llama_path, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows = [{"messages": [{"role": "user", "content": f"{split} {n}?"}]} for n in range(4)]
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    example = ROOT / "examples" / "feedback" / "in_short.py"
    recipe = {**TINY_RUN, "model_name_or_path": llama_path, "dataset_name": str(tmp_path / "data"), "lmbda": 1.0}
    recipe |= {"feedback": f"{example}:feedback", "feedback_without": "skip", "scorer": f"{example}:passes"}
    (tmp_path / "data" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(feedback, "RECIPE", str(tmp_path / "data" / "recipe.yaml"))
    results = tmp_path / "feedback.jsonl"
    argv = ["feedback.py", "--out", str(tmp_path / "runs"), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", argv)
    feedback.main()
    feedback.main()
    (line,) = front.read_lines(results)
    assert (line["n"], line["base"], line["score"], line["steps"]) == (4, 0.0, 0.0, 2)
    assert len(line["answers"]) == feedback.ANSWERS_SHOWN
