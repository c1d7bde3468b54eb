"""Rows that are held out: which, that they are never trained on, and that they are what a run is judged on."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from conftest import perturb
from tiny import TINY_RUN, byte_tokenizer, save_tiny, tiny_model

from pgkd_peft import DataCollatorForPrivilegedGKD
from pgkd_peft.cli.main import main as pgkd
from pgkd_peft.data.files import to_dataset
from pgkd_peft.data.holdout import hold_out, trained_on, trained_prompts, usual_count
from pgkd_peft.errors import ConfigError
from pgkd_peft.evaluation.nats import recovered_nats
from pgkd_peft.model.load import attach_lora

KEY = "privileged_messages"


def row(question, pi, says="So.", **more):
    messages = [{"role": "user", "content": question}]
    if says is not None:
        messages.append({"role": "assistant", "content": says})
    return {"messages": messages, KEY: pi, **more}


def prompts(rows):
    return [each["messages"][0]["content"] for each in rows]


def facts(count, phrasings=3):
    return [row(f"q{i}.{j}", f"fact {i}", fact=i // 2) for i in range(count) for j in range(phrasings)]


def test_whole_groups_of_one_pi_go():
    rows = to_dataset([*facts(20), *[row(f"anchor {i}", None) for i in range(5)]])
    split = hold_out(rows, KEY)
    held, kept = {each[KEY] for each in split.held_out}, {each[KEY] for each in split.train}
    assert held.isdisjoint(kept)
    assert 6 <= len(split.held_out) <= 12
    assert len(split.held_out) + len(split.train) == len(rows)
    assert sum("anchor" in text for text in prompts(split.train)) == 5
    assert prompts(hold_out(rows, KEY).held_out) == prompts(split.held_out)
    assert prompts(hold_out(rows, KEY, seed=1).held_out) != prompts(split.held_out)
    assert "one PI" in split.reason


def test_a_group_column_says_what_belongs_together():
    split = hold_out(to_dataset(facts(20)), KEY, group_key="fact")
    assert {each["fact"] for each in split.held_out}.isdisjoint(each["fact"] for each in split.train)
    assert len(split.held_out) % 6 == 0
    with pytest.raises(ConfigError, match="group_key is 'nowhere'"):
        hold_out(to_dataset(facts(20)), KEY, group_key="nowhere")


def test_a_shared_pi_tells_nothing_but_equal_prompts_stay_together():
    rows = [row(f"q{i // 2}", "Be terse.", f"answer {i}") for i in range(60)]
    split = hold_out(to_dataset(rows), KEY)
    assert len(split.held_out) >= 6
    assert set(prompts(split.held_out)).isdisjoint(prompts(split.train))


def test_the_prompt_of_an_anchor_that_is_held_out_is_not_trained_on():
    rows = [row(f"q{i}", f"fact {i}") for i in range(40)]
    split = hold_out(to_dataset(rows + [row(f"q{i}", None) for i in range(40)]), KEY)
    assert set(prompts(split.held_out)).isdisjoint(prompts(split.train))
    assert all(each[KEY] for each in split.held_out)


def test_few_rows_and_a_count():
    assert [usual_count(n) for n in (0, 19, 20, 40, 60, 200, 5000)] == [0, 0, 4, 8, 8, 20, 64]
    rows = to_dataset([row(f"q{i}", f"fact {i}") for i in range(6)])
    assert hold_out(rows, KEY).held_out is None
    assert len(hold_out(rows, KEY, count=2).held_out) == 2
    assert hold_out(to_dataset(facts(20)), KEY, count=0).held_out is None
    with pytest.raises(ConfigError, match="holdout_rows is 3"):
        hold_out(to_dataset([row("the same", f"fact {i}") for i in range(6)]), KEY, count=3)


def test_rows_that_were_trained_on_are_known(tmp_path):
    rows = [row(f"q{i}", f"fact {i}") for i in range(4)]
    assert trained_on(tmp_path / "none.txt", rows, KEY) is None
    (tmp_path / "trained.txt").write_text(trained_prompts(to_dataset(rows), KEY))
    other = [row("q1", "another fact", "another answer"), row("new", "fact 1")]
    assert trained_on(tmp_path / "trained.txt", other, KEY) == 1
    assert trained_on(tmp_path / "trained.txt", list(to_dataset(rows)), KEY) == 4


# ---- in nats -------------------------------------------------------------------------------------------------------


def test_nats_against_plain_forwards():
    import torch

    model = perturb(attach_lora(tiny_model()))
    collator = DataCollatorForPrivilegedGKD(byte_tokenizer())
    rows = [row("a", "It is a.", None), row("bcd", "It is b, of course.", None), row("e", None, None)]
    answers = [[40, 41, 4], [50, 4], [60]]
    nats = recovered_nats(model, collator, rows, answers, samples=0)

    def nll(prompt, answer):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        return -logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum().item()

    sums = {"base": 0.0, "teacher": 0.0, "student": 0.0}
    for each, answer in list(zip(rows, answers))[:2]:  # the third has no PI
        encoded = collator.encode(each)
        with model.disable_adapter():
            sums["base"] += nll(encoded["student_ids"], answer)
            sums["teacher"] += nll(encoded["teacher_ids"], answer)
        sums["student"] += nll(encoded["student_ids"], answer)
    assert (nats.rows, nats.tokens) == (2, 5)
    for name, value in sums.items():
        assert getattr(nats, name) == pytest.approx(value / 5, rel=1e-4), name
    gap = sums["base"] - sums["teacher"]
    expected = (sums["base"] - sums["student"]) / gap if gap > 0.05 else None
    assert nats.recovered == (pytest.approx(expected, rel=1e-3) if expected is not None else None)


def test_a_fresh_adapter_has_taken_over_nothing():
    model = attach_lora(tiny_model())
    rows = [row(f"question {i}", f"It is {i}.", None) for i in range(5)]
    nats = recovered_nats(model, DataCollatorForPrivilegedGKD(byte_tokenizer()), rows, max_new_tokens=5)
    assert nats.recovered == pytest.approx(0.0, abs=1e-6)
    assert nats.interval.low <= 0.0 <= nats.interval.high
    assert nats.sentence().startswith("0 % of what the PI changes was taken over (95 % interval")
    with pytest.raises(ValueError, match="no row has PI"):
        recovered_nats(model, DataCollatorForPrivilegedGKD(byte_tokenizer()), [row("q", None)])


# ---- the commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run of `pgkd train` on one file of 24 rows with PI and an answer column."""
    folder = tmp_path_factory.mktemp("holdout")
    rows = [row(f"What is {i}?", f"It is {i * 7}.", f"{i * 7}", answer=str(i * 7)) for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    settings = {
        **TINY_RUN,
        "model_name_or_path": save_tiny(folder / "model"),
        "dataset_name": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "run"),
        "max_new_tokens": 3,
        "privileged_placement": "user",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert pgkd(["train", "--config", str(folder / "recipe.yaml")]) == 0
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_train_holds_out_and_judges(run):
    held = lines(run / "run" / "holdout.jsonl")
    results = json.loads((run / "run" / "eval_results.json").read_text())
    info = json.loads((run / "run" / "run.json").read_text())
    assert len(held) == results["n"] == info["held_out"]["holdout_rows"] == 4
    assert info["dataset_rows"] == 20
    assert (results["trained_on"], results["scorer"], results["max_new_tokens"]) == (0, "contains", 3)
    assert "recovered_nats" in results
    assert [each["prompt"] for each in lines(run / "run" / "eval_answers.jsonl")] == prompts(held)
    assert "4 held-out rows" in (run / "run" / "README.md").read_text()
    final = lines(run / "run" / "final_traces.jsonl")
    assert [each["question"] for each in final] == prompts(held)
    assert all(each["held_out"] for each in final)


def test_eval_judges_the_same_rows_with_the_run_s_settings(run, capsys):
    before = json.loads((run / "run" / "eval_results.json").read_text())
    assert pgkd(["eval", str(run / "run")]) == 0
    after = json.loads((run / "run" / "eval_results.json").read_text())
    assert "student_with_pi" in after
    for name in ("n", "base", "teacher", "student", "max_new_tokens", "trained_on"):
        assert after[name] == before[name], name
    assert "4 held-out rows" in capsys.readouterr().out


def test_a_limit_never_overwrites_all(run, capsys):
    full = (run / "run" / "eval_results.json").read_bytes()
    card = (run / "run" / "README.md").read_bytes()
    assert pgkd(["eval", str(run / "run"), "--limit", "2"]) == 0
    assert (run / "run" / "eval_results.json").read_bytes() == full
    assert (run / "run" / "README.md").read_bytes() == card
    assert json.loads((run / "run" / "eval_results_first_2.json").read_text())["n"] == 2
    assert "stays as it is" in " ".join(capsys.readouterr().out.split())


def test_rows_that_were_trained_on_are_called_so(run, capsys):
    out = ["--out", str(run / "all.json")]
    assert pgkd(["eval", str(run / "run"), "--dataset_name", str(run / "rows.jsonl"), *out]) == 0
    assert json.loads((run / "all.json").read_text())["trained_on"] == 20
    assert "24 rows, 20 of them trained on" in capsys.readouterr().out


def test_a_resumed_run_and_its_controls_hold_out_the_same(run):
    from pgkd_peft.cli.arguments import parse_train
    from pgkd_peft.cli.train import load_datasets

    data, _, config = parse_train(["--config", str(run / "run" / "recipe.yaml")])
    train, held = load_datasets(data, config)
    assert prompts(held) == prompts(lines(run / "run" / "holdout.jsonl"))
    assert len(train) == 20


def test_the_next_line_works_where_nothing_is_held_out_and_nothing_scores(run, tmp_path, capsys):
    rows = [row(f"Why {i}?", f"Because of {i}.", None) for i in range(6)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    folder = tmp_path / "a run"
    flags = ["--config", str(run / "recipe.yaml"), "--dataset_name", str(tmp_path / "few.jsonl")]
    assert pgkd(["train", *flags, "--output_dir", str(folder), "--lmbda", "1.0"]) == 0
    said = capsys.readouterr().out
    (command,) = re.findall(r"^Next: pgkd (eval .*)$", said, flags=re.M)
    import shlex

    assert pgkd(shlex.split(command)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "6 rows that were trained on" in said
    assert "without labels:" in said
    results = json.loads((folder / "eval_results.json").read_text())
    assert results["scorer"] is None
    assert results["recovered"] is None
    assert results["nats"]["tokens"] > 0


def test_evaluations_without_rows_are_refused(run, tmp_path, capsys):
    (tmp_path / "few.jsonl").write_text(json.dumps(row("q", "It is q.")) + "\n")
    flags = ["--dataset_name", str(tmp_path / "few.jsonl"), "--output_dir", str(tmp_path / "run")]
    assert pgkd(["train", "--config", str(run / "recipe.yaml"), *flags, "--eval_strategy", "steps"]) == 2
    assert "--eval_dataset_name" in capsys.readouterr().err


# ---- the best of equals --------------------------------------------------------------------------------------------


def test_of_equal_scores_the_one_with_more_nats_is_the_best(tmp_path):
    from types import SimpleNamespace

    from pgkd_peft.base_trainer import TIE_BREAKER, RunTrainer

    said: list[str] = []
    trainer = RunTrainer.__new__(RunTrainer)
    trainer.args = SimpleNamespace(
        metric_for_best_model="eval_recovered", greater_is_better=True, save_strategy="steps"
    )
    trainer.state = SimpleNamespace(best_metric=None, best_global_step=None, global_step=0, log_history=[])
    trainer.say = said.append
    best = []
    for step, (score, nats) in enumerate([(0.0, 0.0), (0.0, 0.2), (0.0, 0.1), (0.5, 0.1), (0.25, 0.9)], start=1):
        metrics = {"eval_recovered": score, TIE_BREAKER: nats}
        trainer.state.global_step = step
        trainer.state.log_history.append({**metrics, "step": step})
        best.append((trainer._determine_best_metric(metrics, None), trainer.state.best_global_step))
    assert best == [(True, 1), (True, 2), (False, 2), (True, 4), (False, 4)]
    assert len(said) == 1
    assert "step 2 is the better one" in said[0]
