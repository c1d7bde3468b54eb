"""Traces: what they say about a token is what two whole forwards say, for heads of every shape."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from conftest import perturb
from tiny import ROWS

from pgkd_peft.rollout_log import TRACE_FILE, append_traces, trace_rows
from pgkd_peft.rows import rows_of
from pgkd_peft.run.folder import FINAL_TRACE_FILE
from pgkd_peft.run.interrupt import RunInterrupted
from pgkd_peft.run.jsonl import read_lines


def distributions(model, prompt, completion):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.double().softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_trace_against_whole_forwards(make_trainer, kind):
    trainer = make_trainer(
        kind=kind, rows=ROWS[:3], config={"beta": 0.3, "skip_first_tokens": 2, "divergence_clip": 1e-6}
    )
    perturb(trainer.model)
    rows = rows_of(trainer.data_collator(ROWS[:3]))
    for row in rows:
        row.keep = slice(2, None)
    before = {name: module.training for name, module in trainer.model.named_modules()}
    records = trace_rows(trainer, rows, top=3)
    assert {name: module.training for name, module in trainer.model.named_modules()} == before
    assert len(records) == 3
    for row, record in zip(rows, records):
        student = distributions(trainer.model.eval(), row.prompt, row.completion)
        with trainer.model.disable_adapter():
            teacher = distributions(trainer.model, row.teacher_prompt, row.completion)
        mixture = 0.3 * teacher + 0.7 * student
        wanted = 0.3 * (teacher * (teacher / mixture).log()).sum(-1) + 0.7 * (student * (student / mixture).log()).sum(
            -1
        )
        assert record["divergence"] == pytest.approx(wanted.tolist(), abs=3e-5)  # rounded to 5 digits, never clipped
        assert "".join(record["tokens"]) == trainer.processing_class.decode(row.completion)
        assert record["in_loss"] == [False, False] + [True] * (len(row.completion) - 2)
        for i, token in enumerate(row.completion):
            assert record["student_p"][i] == pytest.approx(student[i, token].item(), abs=2e-5)
            assert record["teacher_p"][i] == pytest.approx(teacher[i, token].item(), abs=2e-5)
            best = teacher[i].topk(3)
            assert [p for _, p in record["teacher_top"][i]] == pytest.approx(best.values.tolist(), abs=2e-5)
            assert record["teacher_top"][i][0][0] == trainer.processing_class.decode([int(best.indices[0])])
            assert [p for _, p in record["student_top"][i]] == pytest.approx(
                student[i].topk(3).values.tolist(), abs=2e-5
            )
        assert row.teacher_hidden is None  # the rows of the step are left as they were


def test_a_fresh_adapter_without_pi_has_no_divergence(make_trainer):
    trainer = make_trainer(rows=ROWS[2:3])
    (record,) = trace_rows(trainer, rows_of(trainer.data_collator(ROWS[2:3])))
    assert max(record["divergence"]) == pytest.approx(0, abs=1e-5)
    assert record["has_privileged"] is False


def test_traces_are_appended_as_lines(make_trainer, tmp_path):
    trainer = make_trainer(rows=ROWS[:2])
    records = trace_rows(trainer, rows_of(trainer.data_collator(ROWS[:2])))
    append_traces(tmp_path / "run", records, 4)
    append_traces(tmp_path / "run", records[:1], 8)
    lines = [json.loads(line) for line in (tmp_path / "run" / TRACE_FILE).read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [4, 4, 8]
    assert lines[0]["tokens"] == records[0]["tokens"]


def greedy(model, prompt, stops, count):
    """A plain loop of whole forwards."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def test_the_trained_student_is_traced_in_its_own_words(make_trainer, tmp_path):
    """At the end of a training, from Python as well: the greedy answer of the weights as they are then."""
    config = {"rollout_log_steps": 1, "max_steps": 2, "learning_rate": 0.05, "max_new_tokens": 5}
    trainer = make_trainer(rows=ROWS[:1], config=config)
    trainer.train()
    (record,) = read_lines(tmp_path / "run" / FINAL_TRACE_FILE)
    (row,) = rows_of(trainer.data_collator(ROWS[:1]))
    answer = greedy(trainer.model.eval(), row.prompt, trainer.stop_ids, 5)
    assert "".join(record["tokens"]) == trainer.processing_class.decode(answer)
    assert record["question"] == "What is quicksort?"
    assert record["special"] == ["<|im_end|>", "<|im_start|>"]
    assert (record["step"], record["held_out"], record["generated"]) == (2, False, True)
    assert [trace["step"] for trace in read_lines(tmp_path / "run" / TRACE_FILE)] == [1, 2]


def test_no_final_trace_of_a_run_that_was_stopped(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(config={"rollout_log_steps": 1, "max_steps": 4})
    step = trainer.training_step

    def stopped(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "training_step", stopped)
    with pytest.raises(RunInterrupted):
        trainer.train()
    assert (tmp_path / "run" / TRACE_FILE).is_file()
    assert not (tmp_path / "run" / FINAL_TRACE_FILE).exists()
