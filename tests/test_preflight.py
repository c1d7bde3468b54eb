"""The preflight: what it says about the PI against a plain recomputation, and that its clock adds up."""

from __future__ import annotations

import io
import time

import pytest
import torch
from rich.console import Console
from tiny import ROWS, byte_tokenizer, tiny_model

from pgkd_peft import DataCollatorForPrivilegedGKD
from pgkd_peft.cli.inspect import preflight
from pgkd_peft.data.files import to_dataset
from pgkd_peft.evaluation.preflight import Clock, Cost, Effect, ProbeTrainer, measure_effect, top_share
from pgkd_peft.evaluation.scorers import make_scorer
from pgkd_peft.view.preflight import cost_verdict, verdict
from pgkd_peft.view.words import duration


def build(args, dataset):
    return ProbeTrainer(model=tiny_model(), args=args, train_dataset=dataset, processing_class=byte_tokenizer())


def console():
    return Console(file=io.StringIO(), width=120, color_system=None)


def test_top_share():
    assert top_share([1.0] * 200) == pytest.approx(0.01)
    assert top_share([0.0] * 99 + [5.0]) == 1.0
    assert top_share([3.0, 1.0]) == 0.75
    assert top_share([0.0, 0.0]) == 0.0


def test_effect_is_the_kl_of_two_whole_forwards(make_config, make_trainer):
    rows = [{**row, "answer": "e"} for row in ROWS if "privileged_messages" in row]
    trainer = make_trainer(rows=rows)
    effect = measure_effect(trainer, trainer.train_dataset, make_scorer("contains"))
    assert effect.rows == 3

    collator, tokenizer = trainer.data_collator, trainer.processing_class
    base = trainer.model.get_base_model()
    total = tokens = 0.0
    for row in rows:
        encoded = collator.encode(row)
        ids = list(encoded["student_ids"])
        with torch.no_grad(), trainer.model.disable_adapter():
            answer = []
            for _ in range(trainer.args.max_new_tokens):
                token = int(base(torch.tensor([ids + answer])).logits[0, -1].argmax())
                answer.append(token)
                if token in trainer.stop_ids:
                    break
            logits = [
                base(torch.tensor([encoded[key] + answer])).logits[0, -len(answer) - 1 : -1].double().log_softmax(-1)
                for key in ("student_ids", "teacher_ids")
            ]
        total += (logits[1].exp() * (logits[1] - logits[0])).sum().item()
        tokens += len(answer)
        assert tokenizer.decode(answer, skip_special_tokens=True).strip() in [own for _, own, _ in effect.answers]
    assert effect.tokens == tokens
    assert effect.kl == pytest.approx(total / tokens, rel=1e-4)
    assert effect.kl > 0


def test_says_when_there_is_nothing_to_learn(make_trainer):
    anchors = [{"messages": ROWS[2]["messages"]}]
    trainer = make_trainer(rows=anchors)
    assert measure_effect(trainer, trainer.train_dataset, None) is None
    assert verdict(None)[1]
    same = Effect(rows=8, tokens=100, kl=1e-4, top_share=0.1, answers=[], scores=None)
    assert "Nothing to learn" in verdict(same)[0]
    no_gap = Effect(rows=8, tokens=100, kl=0.5, top_share=0.1, answers=[], scores=(0.5, 0.5))
    assert "no gap" in verdict(no_gap)[0]
    good = Effect(rows=8, tokens=100, kl=0.5, top_share=0.1, answers=[], scores=(0.1, 0.9))
    assert not verdict(good)[1]


def test_clock_gives_time_to_the_innermost_phase_and_says_where_it_failed():
    clock = Clock()
    with clock.running(), clock.phase("teacher"):
        time.sleep(0.01)
        with clock.phase("rollout"):
            time.sleep(0.03)
    seconds, peak = clock.read()
    assert seconds["rollout"] >= 0.03
    assert 0.01 <= seconds["teacher"] < seconds["rollout"]
    assert peak["rollout"] > 1
    assert clock.failed is None
    with pytest.raises(MemoryError), clock.phase("teacher"), clock.phase("rollout"):
        raise MemoryError
    assert clock.failed == "rollout"


def test_whole_preflight_measures_each_phase_and_leaves_nothing(make_config, tmp_path):
    config = make_config(lmbda=0.5, max_new_tokens=6, max_steps=30, gradient_accumulation_steps=2)
    out = console()

    (tmp_path / "probe").mkdir()
    effect, cost = preflight(build, config, to_dataset([ROWS[0], ROWS[3]]), out, str(tmp_path / "probe"))
    assert effect.rows == 2
    assert cost.failed is None
    assert cost.steps == 30
    assert set(cost.typical) == set(cost.worst) == {"rest", "teacher", "rollout", "student"}
    assert min(cost.worst.values()) > 0
    assert cost.peak["student"] > 1
    assert not (tmp_path / "run").exists()
    text = out.file.getvalue()
    assert "does the PI help?" in text
    assert "30 steps: about" in text
    assert "It fits" in text


def test_last_step_is_the_worst_case(make_config, tmp_path):
    seen = []

    class Watched(ProbeTrainer):
        def roll_out_and_score(self, rows, *, on_policy):
            rows = super().roll_out_and_score(rows, on_policy=on_policy)
            seen.append((list(self.stop_ids), sorted(len(row.teacher_prompt) for row in rows), rows))
            return rows

    def watched(args, dataset):
        return Watched(model=tiny_model(), args=args, train_dataset=dataset, processing_class=byte_tokenizer())

    config = make_config(max_new_tokens=9, per_device_train_batch_size=2)
    preflight(watched, config, to_dataset(ROWS), console(), str(tmp_path))
    (stops, _, _), (last_stops, last_lengths, last_rows) = seen
    assert stops
    assert last_stops == []
    assert [len(row.completion) for row in last_rows] == [9, 9]
    collator = DataCollatorForPrivilegedGKD(byte_tokenizer())
    assert last_lengths == sorted(len(collator.encode(row)["teacher_ids"]) for row in ROWS)[-2:]


def test_running_out_of_memory_is_a_result_and_other_errors_are_not(make_config, tmp_path):
    def failing(error):
        class Failing(ProbeTrainer):
            def compute_loss(self, *args, **kwargs):
                if self.state.global_step == 1:
                    raise error
                return super().compute_loss(*args, **kwargs)

        def make(args, dataset):
            return Failing(model=tiny_model(), args=args, train_dataset=dataset, processing_class=byte_tokenizer())

        out = console()
        return preflight(make, make_config(), to_dataset(ROWS), out, str(tmp_path))[1], out.file.getvalue()

    cost, text = failing(torch.OutOfMemoryError("CUDA out of memory"))
    assert cost.failed == "student"
    assert sum(cost.typical.values()) > 0
    assert cost.worst == {}
    assert "It does not fit: out of memory in the phase student" in text
    with pytest.raises(RuntimeError, match="something else"):
        failing(RuntimeError("something else"))


def test_memory_verdict_names_the_phase_and_the_setting():
    assert cost_verdict(Cost(peak={"student": 50.0}, limit=100.0)) == (
        "It fits: at most 50 of 100 MiB (50%), in the phase student.",
        False,
    )
    sentence, warn = cost_verdict(Cost(peak={"student": 95.0, "rollout": 20.0}, limit=100.0))
    assert warn
    assert "per_device_train_batch_size" in sentence
    sentence, warn = cost_verdict(Cost(failed="rollout"))
    assert warn
    assert "max_new_tokens" in sentence
    assert [duration(s) for s in (45, 200, 7500)] == ["45 s", "3 min 20 s", "2 h 5 min"]
