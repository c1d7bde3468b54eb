"""The recovered gap as a curve: what evaluations measure, and that training does not notice them."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import pytest
import runs
import torch
import yaml
from conftest import perturb
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import ROWS, TINY_RUN, tiny_model
from transformers import EarlyStoppingCallback, TrainerCallback

from pgkd_peft import RecoveredGapCallback, cli
from pgkd_peft.base_trainer import GAP_METRICS as METRICS
from pgkd_peft.cli.arguments import parse_train
from pgkd_peft.cli.train import evaluation_callbacks
from pgkd_peft.errors import ConfigError, DataError
from pgkd_peft.evaluation.answers import evaluate, measure_drift

HELD_OUT = ROWS[:3]
NEUTRAL = [{"messages": [{"role": "user", "content": text}]} for text in ("Hello there", "One and two?", "Why")]
SALT = b"11"
EVALUATE = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}


def dataset(rows=HELD_OUT):
    from pgkd_peft.data.files import to_dataset

    return to_dataset(rows)


def letters(answer, row):
    """A score that depends on every character of an answer. It happens to give the teacher more than the base."""
    return zlib.crc32(answer.encode() + SALT) % 1000 / 1000


class Scripted:
    """A scorer by which the base scores 0, the teacher 1 and the student what the script says, evaluation by
    evaluation. It counts the answers that it sees: base, teacher, then the student at every evaluation, and before it
    the teacher once more where it `moves`."""

    def __init__(self, rows: int, script: list[float], moves: bool = False):
        self.rows, self.script, self.calls = rows, script, -rows  # RecoveredGapCallback tries every row once
        self.moves = moves

    def __call__(self, answer, row) -> float:
        turn, self.calls = self.calls // self.rows, self.calls + 1
        if turn <= 1:
            return float(turn == 1)
        if self.moves:
            return 1.0 if turn % 2 == 0 else self.script[(turn - 3) // 2]
        return self.script[turn - 2]


def curve(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


# ---- what is measured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["adapter", "merged"])
def test_evaluations_have_the_numbers_of_pgkd_eval(make_trainer, engine):
    callback = RecoveredGapCallback(HELD_OUT, letters, neutral_rows=NEUTRAL)
    trainer = make_trainer(
        config={**EVALUATE, "learning_rate": 0.05, "rollout_engine": engine, "max_steps": 3},
        eval_dataset=dataset(),
        callbacks=[callback],
    )
    seen = []

    class Check(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            result = evaluate(trainer.model, trainer.data_collator, HELD_OUT, letters, max_new_tokens=8)
            drift = measure_drift(trainer.model, trainer.data_collator, NEUTRAL)
            seen.append(metrics)
            for name in ("base", "teacher", "student"):
                assert metrics[f"eval_{name}"] == pytest.approx(result.score(name), abs=1e-9), name
            assert metrics["eval_recovered"] == pytest.approx(result.recovered, abs=1e-9)
            assert metrics["eval_drift"] == pytest.approx(drift.kl, rel=1e-6)

    trainer.add_callback(Check())
    trainer.train()
    assert len(seen) == 3
    assert len({metrics["eval_student"] for metrics in seen}) > 1, "the student must move for this to test anything"
    assert len({metrics["eval_base"] for metrics in seen}) == 1
    assert seen[0]["eval_teacher"] != seen[0]["eval_base"]
    assert curve(trainer, "eval_recovered") == [metrics["eval_recovered"] for metrics in seen]
    assert [log["step"] for log in trainer.state.log_history if "eval_recovered" in log] == [1, 2, 3]


def test_base_and_teacher_answer_once(make_trainer, monkeypatch):
    import pgkd_peft.evaluation.gap_callback as module

    asked = []
    real = module.evaluate

    def counting(*args, columns, known, **kwargs):
        asked.append([c for c in columns if known is None or c == "student"])
        return real(*args, columns=columns, known=known, **kwargs)

    monkeypatch.setattr(module, "evaluate", counting)
    callback = RecoveredGapCallback(HELD_OUT, letters)
    trainer = make_trainer(config={**EVALUATE, "max_steps": 2}, eval_dataset=dataset(), callbacks=[callback])
    trainer.train()
    trainer.evaluate()
    assert asked == [["base", "teacher"], ["student"], ["student"], ["student"]]


def test_evaluate_without_training_and_a_callback_added_later(make_trainer):
    trainer = make_trainer(eval_dataset=dataset())
    trainer.add_callback(RecoveredGapCallback(HELD_OUT, letters, max_new_tokens=4))
    metrics = trainer.evaluate()
    assert metrics["eval_student"] == metrics["eval_base"] != metrics["eval_teacher"]
    assert metrics["eval_recovered"] == 0.0
    assert "eval_drift" not in metrics
    assert "eval_loss" in metrics


def test_once_an_evaluation_of_several_sets(make_trainer):
    scorer = Scripted(len(HELD_OUT), [0.25, 0.5])
    trainer = make_trainer(
        config={**EVALUATE, "max_steps": 2},
        eval_dataset={"a": dataset(), "b": dataset(ROWS[1:])},
        callbacks=[RecoveredGapCallback(HELD_OUT, scorer)],
    )
    trainer.train()
    assert curve(trainer, "eval_recovered") == [0.25, 0.5]
    assert len(curve(trainer, "eval_b_loss")) == 2


def test_no_gap(make_trainer, caplog):
    callback = RecoveredGapCallback(HELD_OUT, lambda answer, row: 0.5)
    trainer = make_trainer(config={**EVALUATE, "max_steps": 1}, eval_dataset=dataset(), callbacks=[callback])
    trainer.train()
    assert curve(trainer, "eval_student") == [0.5]
    assert curve(trainer, "eval_recovered") == []
    assert "no gap to recover on the 3 held-out rows" in caplog.text
    trainer = make_trainer(
        config={**EVALUATE, "max_steps": 1, "metric_for_best_model": "eval_recovered"},
        eval_dataset=dataset(),
        callbacks=[RecoveredGapCallback(HELD_OUT, lambda answer, row: 0.5)],
    )
    with pytest.raises(ConfigError, match=r"eval_recovered, but there is no gap .* scores 0\.500, the base 0\.500"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metric_for_best_model": "recovered"}, "--scorer"),
        ({"metric_for_best_model": "eval_student"}, "nothing measures"),
        ({"metric_for_best_model": "eval_drift", "_scorer": True}, "--neutral_dataset_name"),
    ],
)
def test_a_metric_that_nobody_measures_is_refused_before_the_first_step(make_trainer, settings, words):
    settings = dict(settings)
    callbacks = [RecoveredGapCallback(HELD_OUT, letters)] if settings.pop("_scorer", False) else []
    trainer = make_trainer(config={**EVALUATE, **settings}, eval_dataset=dataset(), callbacks=callbacks)
    with pytest.raises(ConfigError, match=words):
        trainer.train()
    assert trainer.state.global_step == 0


def test_rows_that_cannot_be_scored_are_refused_by_the_callback():
    with pytest.raises(DataError, match=r"1 of 2 rows .*\n.*row 1"):
        RecoveredGapCallback([ROWS[0], {"messages": [{"role": "user", "content": "Hi"}]}])
    with pytest.raises(ConfigError, match="contians"):
        RecoveredGapCallback(HELD_OUT, "contians")
    with pytest.raises(ConfigError, match="no rows"):
        RecoveredGapCallback([])


def evaluate_in_a_process(result: str, base: str, out: str, rows: int, env: dict) -> None:
    os.environ.update(env)
    settings = {"use_cpu": True, "per_device_eval_batch_size": 1, "rollout_log_steps": 0}
    settings |= {"ddp_backend": "gloo"} if env else {}
    callback = RecoveredGapCallback(HELD_OUT[:rows], letters, neutral_rows=NEUTRAL[:rows])
    trainer = runs.make_trainer(base, out, settings=settings, eval_dataset=dataset(), callbacks=[callback])
    perturb(trainer.model, 0.3)
    metrics = trainer.evaluate()
    Path(result).write_text(json.dumps(metrics), encoding="utf-8")


@pytest.mark.parametrize("rows", [3, 1])
def test_ranks_share_the_rows(llama_path, tmp_path, rows):
    """Three rows on two ranks; and one, with which a rank has none."""
    port = str(runs.free_port())
    two = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environments = [{}, *({**two, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1))]
    results = [str(tmp_path / f"{i}.json") for i in range(3)]
    processes = [
        runs.context().Process(
            target=evaluate_in_a_process, args=(result, llama_path, str(tmp_path / f"out{bool(env)}"), rows, env)
        )
        for result, env in zip(results, environments)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    one, first, second = (json.loads(Path(result).read_text("utf-8")) for result in results)
    assert one["eval_student"] not in (one["eval_base"], one["eval_teacher"])
    measured = [name for name in METRICS if name in one]
    assert len(measured) >= 4
    for name in measured:
        assert first[name] == second[name] == pytest.approx(one[name], rel=1e-6), name


# ---- training does not notice --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lmbda", [1.0, 0.5])
def test_evaluations_change_no_weight(make_trainer, tmp_path, lmbda):
    def run(name, **settings):
        trainer = make_trainer(
            config={
                "output_dir": str(tmp_path / name),
                "max_steps": 4,
                "lmbda": lmbda,
                "gradient_accumulation_steps": 2,
                "learning_rate": 0.02,
                **settings,
            },
            eval_dataset=dataset(),
            callbacks=[RecoveredGapCallback(HELD_OUT, letters, neutral_rows=NEUTRAL)],
            peft_config=LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return weights, logs

    weights, logs = run("with", **EVALUATE)
    other_weights, other_logs = run("without")
    assert len(weights) > 10
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    timing = ("seconds", "per_second")
    for log, other in zip(logs, other_logs):
        assert {k: v for k, v in log.items() if not any(part in k for part in timing)} == {
            k: v for k, v in other.items() if not any(part in k for part in timing)
        }


# ---- the best adapter ----------------------------------------------------------------------------------------------


def best_run(make_trainer, script, **settings):
    callbacks = settings.pop("callbacks", [])
    moves = settings.get("teacher_adapter") == "ema"
    trainer = make_trainer(
        config={
            **EVALUATE,
            "max_steps": len(script),
            "save_strategy": "steps",
            "save_steps": 1,
            "learning_rate": 0.02,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_recovered",
            **settings,
        },
        eval_dataset=dataset(),
        callbacks=[*callbacks, RecoveredGapCallback(HELD_OUT, Scripted(len(HELD_OUT), script, moves))],
    )
    trainer.train()
    trainer.save_model()
    return trainer, Path(trainer.args.output_dir)


@pytest.mark.parametrize("teacher", ["disabled", "ema"])
def test_the_best_adapter_is_kept_and_saved(make_trainer, teacher):
    script = [0.2, 0.9, 0.4, 0.3]
    trainer, folder = best_run(make_trainer, script, save_total_limit=2, teacher_adapter=teacher)
    assert trainer.state.best_metric == 0.9
    assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-2")
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    best = load_file(folder / "checkpoint-2" / "adapter_model.safetensors")
    last = load_file(folder / "checkpoint-4" / "adapter_model.safetensors")
    saved = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], best[name]) for name in best)
    assert any(not torch.equal(saved[name], last[name]) for name in last)
    assert any(param.requires_grad for param in trainer.model.parameters())
    assert trainer.args.greater_is_better


def test_early_stopping_by_a_callback_that_stands_before_ours(make_trainer):
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    trainer, folder = best_run(make_trainer, [0.5, 0.75, 0.625, 0.75, 0.875, 0.875], callbacks=[stop])
    assert trainer.state.global_step == 4
    assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-2")
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_metric"] == 0.75


def test_the_perturbed_student_differs(make_trainer):
    """The scores of `letters` depend on the weights, so the tests above compare what they seem to compare."""
    trainer = make_trainer(model=tiny_model("llama"), eval_dataset=dataset())
    trainer.add_callback(RecoveredGapCallback(HELD_OUT, letters))
    before = trainer.evaluate()
    perturb(trainer.model, 0.5)
    after = trainer.evaluate()
    assert before["eval_base"] == after["eval_base"]
    assert before["eval_student"] != after["eval_student"]


def test_rows_may_be_a_dataset():
    assert len(RecoveredGapCallback(Dataset.from_list(HELD_OUT[:1]), letters).rows) == 1


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, llama_path):
    """Write a recipe with three held-out rows; keyword arguments change it. Returns its path."""
    for name, rows in (("train", ROWS), ("test", HELD_OUT)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (tmp_path / "neutral.jsonl").write_text("".join(json.dumps(row) + "\n" for row in NEUTRAL), "utf-8")

    def write(**changes):
        settings = {
            "model_name_or_path": llama_path,
            "dataset_name": str(tmp_path / "train.jsonl"),
            "eval_dataset_name": str(tmp_path / "test.jsonl"),
            "output_dir": str(tmp_path / "run"),
            **TINY_RUN,
            "max_steps": 3,
            "max_new_tokens": 8,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "scorer": "test_gap_callback:letters",
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**settings, **changes}), "utf-8")
        return str(path)

    return write


def test_a_recipe_that_evaluates(recipe, tmp_path, caplog):
    path = recipe(
        neutral_dataset_name=str(tmp_path / "neutral.jsonl"), eval_limit=2, save_strategy="best", save_total_limit=1
    )
    run = tmp_path / "run"
    assert cli.main(["train", "--config", path, "--metric_for_best_model", "eval_student"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    measured = [line for line in lines if "eval_student" in line]
    assert [line["step"] for line in measured] == [1, 2, 3]
    assert all({"eval_base", "eval_teacher", "eval_drift", "eval_loss"} <= set(line) for line in measured)
    assert "2 held-out rows: base " in caplog.text
    best = max(measured, key=lambda line: line["eval_student"])
    assert [p.name for p in run.glob("checkpoint-*")] == [f"checkpoint-{best['step']}"]

    # what the run was told is what `pgkd eval` takes, unless it is told otherwise
    assert cli.main(["eval", str(run / f"checkpoint-{best['step']}"), "--limit", "2", "--max_new_tokens", "8"]) == 0
    results = json.loads((run / f"checkpoint-{best['step']}" / "eval_results.json").read_text("utf-8"))
    assert results["scorer"] == "test_gap_callback:letters"
    for name in ("base", "teacher", "student", "drift"):
        assert results[name] == pytest.approx(best[f"eval_{name}"], rel=1e-6), name
    assert cli.main(["eval", str(run), "--scorer", "contains", "--limit", "1", "--max_new_tokens", "2"]) == 0
    assert json.loads((run / "eval_results_first_1.json").read_text("utf-8"))["scorer"] == "contains"
    assert json.loads((run / "eval_results.json").read_text("utf-8"))["n"] == 2  # those of all rows stay


def test_with_a_scorer_the_best_adapter_is_the_one_with_the_largest_gap(recipe):
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
    config = parse_train(["--config", recipe(**best)])[2]
    assert (config.metric_for_best_model, config.greater_is_better) == ("eval_recovered", True)
    config = parse_train(["--config", recipe(**best, metric_for_best_model="loss")])[2]
    assert (config.metric_for_best_model, config.greater_is_better) == ("loss", False)
    config = parse_train(["--config", recipe(**best, scorer=None)])[2]
    assert (config.metric_for_best_model, config.greater_is_better) == ("loss", False)
    data, _, config = parse_train(["--config", recipe(early_stopping_patience=2)])
    assert (config.metric_for_best_model, config.greater_is_better) == ("eval_recovered", True)
    assert [type(c).__name__ for c in evaluation_callbacks(data, config, dataset())] == [
        "RecoveredGapCallback",
        "EarlyStoppingCallback",
    ]
    data, _, config = parse_train(["--config", recipe(eval_strategy="no")])
    assert evaluation_callbacks(data, config, dataset()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"early_stopping_patience": 2, "eval_strategy": False}, "--eval_strategy steps"),
        ({"early_stopping_patience": 2, "scorer": None}, "watches metric_for_best_model"),
        ({"early_stopping_patience": 0}, "early_stopping_patience is 0"),
        ({"eval_limit": 0}, "eval_limit is 0"),
        ({"scorer": "contians"}, "the scorer is 'contians'"),
        ({"scorer": None, "neutral_dataset_name": "builtin:neutral_heldout"}, "--scorer contains"),
        ({"scorer": None, "metric_for_best_model": "eval_recovered"}, "give a scorer"),
        ({"scorer": "numeric"}, "3 of 3 rows"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(recipe, capsys, changes, words):
    assert cli.main(["train", "--config", recipe(**changes)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("which", ["disabled", "shared"])
def test_the_column_teacher_is_the_run_s_own_teacher(make_trainer, which):
    """A teacher that shares the student's weights answers with them, and is asked again at every evaluation."""
    callback = RecoveredGapCallback(HELD_OUT, scorer=lambda answer, row: float(len(answer)))
    trainer = make_trainer(config={"teacher_adapter": which}, callbacks=[callback])
    callback.prepare(trainer)
    before = list(callback.known.completions["teacher"])
    perturb(trainer.model)
    result = callback._answer(trainer, ("base", "teacher", "student"))
    assert result.completions["base"] == callback.known.completions["base"]
    assert (result.completions["teacher"] == before) == (which == "disabled")
