"""PI made from the student's answers, and the example that runs small programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import perturb
from test_trainer import one_step
from tiny import byte_tokenizer
from transformers import TrainerCallback

from pgkd_peft import DataCollatorForPrivilegedGKD
from pgkd_peft.data.check import validate_rows
from pgkd_peft.data.feedback import load_feedback, with_feedback
from pgkd_peft.data.named import load_named
from pgkd_peft.errors import ConfigError, DataError
from pgkd_peft.evaluation.scorers import make_scorer
from pgkd_peft.rows import Row

EXAMPLE = Path(__file__).parent.parent / "examples" / "feedback" / "small_programs.py"
FORMAT = EXAMPLE.parent / "in_short.py"
TOKENIZER = byte_tokenizer()
COLLATOR = DataCollatorForPrivilegedGKD(TOKENIZER)


def source(question):
    return {"messages": [{"role": "user", "content": question}], "privileged_messages": "of the data"}


def answered(data, *answers):
    encoded = COLLATOR.encode(data)
    ids = [TOKENIZER(answer + "<|im_end|>", add_special_tokens=False)["input_ids"] for answer in answers]
    return [
        Row(encoded["student_ids"], encoded["teacher_ids"], i, True, 0, generated=True, truncated=False) for i in ids
    ]


def test_each_answer_has_the_teacher_read_its_own_feedback():
    a, b = source("first?"), source("second?")
    rows = [*answered(a, "right", "wrong"), *answered(b, "wrong")]
    asked = []

    def feedback(row, answers):
        asked.append((row["messages"][0]["content"], answers))
        return ["" if answer == "right" else f"'{answer}' is wrong" for answer in answers]

    made = with_feedback(rows, [a, a, b], feedback, COLLATOR)
    assert asked == [("first?", ["right", "wrong"]), ("second?", ["wrong"])]
    texts = [TOKENIZER.decode(row.teacher_prompt) for row in made]
    assert made[0].teacher_prompt == made[0].prompt  # an anchor
    assert ["'wrong' is wrong" in text for text in texts] == [False, True, True]
    assert not any("of the data" in text for text in texts)
    assert [row.has_privileged for row in made] == [False, True, True]
    assert [row.completion for row in made] == [row.completion for row in rows]
    left = with_feedback(rows, [a, a, b], feedback, COLLATOR, without="skip")
    assert [row.completion for row in left] == [rows[1].completion, rows[2].completion]


def test_one_feedback_for_all_and_messages():
    a = source("first?")
    turns = [{"role": "user", "content": "No."}, {"role": "assistant", "content": "I see."}]
    for said in ("No.", turns, [turns, turns]):
        made = with_feedback(answered(a, "x", "y"), [a, a], lambda row, answers, said=said: said, COLLATOR)
        assert all("No." in TOKENIZER.decode(row.teacher_prompt) for row in made)
    made = with_feedback(answered(a, "x"), [a], lambda row, answers: None, COLLATOR)
    assert made[0].teacher_prompt == made[0].prompt


def test_what_cannot_be_used_is_named():
    a = source("first?")
    with pytest.raises(DataError, match="feedback function returned"):
        with_feedback(answered(a, "x"), [a], lambda row, answers: 3, COLLATOR)
    with pytest.raises(ConfigError, match="anchor, skip"):
        with_feedback(answered(a, "x"), [a], lambda row, answers: "", COLLATOR, without="drop")
    for spec in ("nowhere", "no_such_module:f", f"{EXAMPLE}:nothing", "gone.py:f", "math:pi"):
        with pytest.raises(ConfigError, match="feedback is"):
            load_feedback(spec)
    assert load_feedback("math:floor")(2.5) == 2


def test_small_programs_are_run_with_limits():
    feedback = load_feedback(f"{EXAMPLE}:feedback")
    row = {"tests": "assert double(3) == 6"}
    right = "Here:\n```python\ndef double(x):\n    return 2 * x\n```\nDone."
    wrong = "def double(x):\n    return x"
    endless = "while True: pass"
    hungry = "x = bytearray(2**31)"
    broken = "def double(x)"
    said = feedback(row, [right, wrong, endless, hungry, broken])
    assert said[0] == ""
    assert "AssertionError" in said[1]
    assert "assert double(3) == 6" in said[1]
    assert said[2]
    assert "MemoryError" in said[3]
    assert "SyntaxError" in said[4]


def test_the_format_that_a_checker_wants():
    feedback = load_feedback(f"{FORMAT}:feedback")
    passes = make_scorer(f"{FORMAT}:passes")
    answers = ["In short: Oslo.", "In short:\nOslo.", "In short:", "Oslo.", "It is, In short: Oslo.", "in short: Oslo."]
    assert [text == "" for text in feedback({}, answers)] == [True, True, False, False, False, False]
    assert [passes(answer, {}) for answer in answers] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_the_format_s_questions_are_in_one_set_each():
    rows = {split: load_named(str(FORMAT.parent), split=split) for split in ("train", "test")}
    asked = [row["messages"][-1]["content"] for split in rows.values() for row in split]
    assert {split: len(found) for split, found in rows.items()} == {"train": 48, "test": 24}
    assert len(set(asked)) == 72


def test_rows_whose_pi_is_made_later_need_none():
    rows = [source("first?") | {"privileged_messages": None}]
    collator = DataCollatorForPrivilegedGKD(TOKENIZER)
    assert any("no row has PI" in warning for warning in validate_rows(rows, collator).warnings)
    collator.keep_sources = True
    assert not any("no row has PI" in warning for warning in validate_rows(rows, collator).warnings)


def test_a_scorer_may_stand_in_a_file_too(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def half(answer, row):\n    return 0.5\n")
    assert make_scorer(f"{path}:half")("x", {}) == 0.5
    for spec in (f"{path}:gone", f"{tmp_path / 'gone.py'}:half"):
        with pytest.raises(ConfigError, match=r"module:function, or path/to/file\.py:function"):
            make_scorer(spec)


def test_a_run_in_which_the_teacher_reads_feedback(make_trainer, tmp_path):
    path = tmp_path / "judge.py"
    path.write_text("def say(row, answers):\n    return [f\"{row['tests']}: {len(answer)}\" for answer in answers]\n")
    rows = [{**source(f"question {i}"), "tests": f"T{i}"} for i in range(4)]
    trainer = make_trainer(rows=rows, config={"feedback": f"{path}:say", "num_generations": 2})
    trainer.train()
    assert len(trainer.last_rows) == 4  # two prompts, two answers each
    for row in trainer.last_rows:
        text = TOKENIZER.decode(row.completion, skip_special_tokens=True).strip()
        assert f"T{row.source['tests'][1:]}: {len(text)}" in TOKENIZER.decode(row.teacher_prompt)


def test_settings_that_cannot_be(make_config):
    for wrong in ({"feedback_without": "drop"}, {"teacher_takeover": -1}, {"feedback": "a:b", "lmbda": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            make_config(**wrong)


SPARSE = """
def say(row, answers):
    return [row["tests"] if row["tests"] != "none" else "" for answer in answers]
"""


def sparse_trainer(make_trainer, tmp_path, said, **config):
    """A run whose rows without feedback are left out; `said` is the feedback on each of the four rows of a step."""
    path = tmp_path / "judge.py"
    path.write_text(SPARSE)
    rows = [{**source(f"question {i}"), "tests": text} for i, text in enumerate(said)]
    settings = {"feedback": f"{path}:say", "feedback_without": "skip", "learning_rate": 0.1}
    return make_trainer(rows=rows, config={**settings, "train_sampling_strategy": "sequential", **config})


def test_rows_left_out_do_not_change_the_loss_of_the_others(make_trainer, tmp_path):
    results = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        trainer = sparse_trainer(
            make_trainer,
            tmp_path,
            ["none", "no, it is seven", "none", "none"],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            temperature=0.0,
        )
        perturb(trainer.model)
        results.append(one_step(trainer))
        assert [row.source["tests"] for row in trainer.last_rows] == ["no, it is seven"]
    assert results[0]["loss"] > 1e-4
    for other in results[1:]:
        assert other["tokens"] == results[0]["tokens"]
        assert other["loss"] == pytest.approx(results[0]["loss"], rel=1e-4)
        assert other["norm"] == pytest.approx(results[0]["norm"], rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_without_any_feedback_changes_nothing(make_trainer, tmp_path, accumulation):
    trainer = sparse_trainer(
        make_trainer,
        tmp_path,
        ["no"] * 4 + ["none"] * 4,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trained = [p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]
            seen.append(torch.cat(trained))

    trainer.add_callback(Look())
    trainer.train()
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])  # also after a step that has given the optimizer momentum
