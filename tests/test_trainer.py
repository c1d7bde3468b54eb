"""The method, against independent oracles: whole-sequence forwards, plain sums, parameter bytes."""

from __future__ import annotations

import copy
import json
import types
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from conftest import perturb
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from tiny import DROPPING, ROWS, STRICT, byte_tokenizer, save_tiny, tiny_model

from pgkd_peft import DataCollatorForPrivilegedGKD, PrivilegedGKDConfig, PrivilegedSelfDistillTrainer
from pgkd_peft.errors import ConfigError, DataError, ModelError
from pgkd_peft.rows import rows_of

NO_PI = [{"messages": row["messages"]} for row in ROWS]


def one_step(trainer) -> dict[str, float]:
    """Loss, gradient norm and tokens of one optimizer step, without taking it."""
    trainer.model.train()
    loader = iter(trainer.get_train_dataloader())
    batches, tokens = trainer.get_batch_samples(loader, trainer.args.gradient_accumulation_steps, trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    trainer.model.zero_grad()
    loss = sum(trainer.training_step(trainer.model, batch, tokens) for batch in batches)
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    norm = torch.sqrt(sum(g.double().pow(2).sum() for g in grads.values()))
    return {"loss": float(loss), "norm": float(norm), "tokens": int(tokens), "grads": grads}


def log_probs(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Oracle: one unpadded forward of one sequence; log-probabilities (C, V) of the completion's positions."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
    return torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)


@pytest.mark.parametrize("kind", ["llama", "qwen", "gemma", "gpt2"])
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_without_pi_and_with_a_fresh_adapter_there_is_nothing_to_learn(make_trainer, kind, lmbda):
    result = one_step(make_trainer(kind=kind, rows=NO_PI, config={"lmbda": lmbda, "per_device_train_batch_size": 4}))
    assert result["tokens"] > 0
    assert abs(result["loss"]) <= 1e-6
    assert result["norm"] <= 1e-6


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_every_completion_token_is_scored_at_its_place(make_trainer, kind):
    """Contexts of different lengths in one batch; a shift by one anywhere fails this, and only this."""
    trainer = make_trainer(kind=kind, config={"lmbda": 0.0, "beta": 0.0, "per_device_train_batch_size": 4})
    perturb(trainer.model)
    batch = trainer.data_collator(ROWS)
    loss, out = trainer.compute_loss(trainer.model.eval(), dict(batch), return_outputs=True)
    expected = []
    for row in rows_of(batch):
        student = log_probs(trainer.model, row.prompt, row.completion)
        with trainer.model.disable_adapter():
            teacher = log_probs(trainer.model, row.teacher_prompt, row.completion)
        expected.append((teacher.exp() * (teacher - student)).sum(-1))
    expected = torch.cat(expected)
    assert len({len(r.teacher_prompt) - len(r.prompt) for r in rows_of(batch)}) > 2  # really different contexts
    assert expected.min() > 1e-5
    torch.testing.assert_close(out["divergence"].double(), expected, rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(loss.double(), expected.mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen", "gemma"])
def test_rows_in_one_line_are_scored_as_rows_under_each_other(make_trainer, monkeypatch, kind):
    """What FlashAttention gets, here through the mask that other implementations make of the positions."""
    results = []
    for flat in (False, True):
        for module in ("scoring", "trainer"):
            monkeypatch.setattr(f"pgkd_peft.{module}.reads_packed_rows", lambda model, flat=flat: flat)
        trainer = make_trainer(kind=kind, config={"lmbda": 0.0, "per_device_train_batch_size": 4})
        perturb(trainer.model)
        rows = rows_of(trainer.data_collator(ROWS))
        shape = trainer.batch_of(rows)["input_ids"].shape
        assert shape == ((1, sum(r.length for r in rows)) if flat else (len(rows), max(r.length for r in rows)))
        results.append(one_step(trainer))
    padded, packed = results
    assert padded["loss"] == pytest.approx(packed["loss"], rel=1e-4)
    assert padded["loss"] > 1e-3
    for name, grad in padded["grads"].items():
        torch.testing.assert_close(packed["grads"][name], grad, rtol=1e-3, atol=1e-6)


def test_collator_padding_is_ignored(make_trainer):
    """The same row alone and beside a longer one gives the same divergence."""
    trainer = make_trainer(config={"lmbda": 0.0})
    perturb(trainer.model)
    alone = trainer.compute_loss(trainer.model.eval(), dict(trainer.data_collator(ROWS[2:3])), return_outputs=True)[1]
    both = trainer.compute_loss(trainer.model, dict(trainer.data_collator([ROWS[2], ROWS[0]])), return_outputs=True)[1]
    n = len(alone["divergence"])
    torch.testing.assert_close(both["divergence"][:n], alone["divergence"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_batch_1_times_accumulation_8_equals_batch_8(make_trainer, lmbda):
    rows = ROWS + [copy.deepcopy(row) for row in ROWS]
    for i, row in enumerate(rows):  # completions of different lengths
        row["messages"][-1]["content"] += "!" * (5 * i)
    results = []
    for batch, accumulation in ((1, 8), (8, 1), (3, 3)):
        trainer = make_trainer(
            rows=rows,
            config={
                "lmbda": lmbda,
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulation,
                "gradient_checkpointing": batch == 1,
            },
        )
        perturb(trainer.model)
        results.append(one_step(trainer))
    for other in results[1:]:
        assert other["tokens"] == results[0]["tokens"]
        assert other["loss"] == pytest.approx(results[0]["loss"], rel=1e-4)
        assert other["norm"] == pytest.approx(results[0]["norm"], rel=1e-4)
        for name, grad in results[0]["grads"].items():
            torch.testing.assert_close(other["grads"][name], grad, rtol=1e-3, atol=1e-7)


def test_num_generations_counts_every_rollout(make_trainer):
    trainer = make_trainer(config={"num_generations": 3, "per_device_train_batch_size": 4})
    perturb(trainer.model)
    batch = trainer.data_collator(ROWS)
    rows = trainer.roll_out_and_score(rows_of(batch), on_policy=True)
    assert [row.prompt for row in rows] == [row.prompt for row in rows_of(batch) for _ in range(3)]
    assert len({tuple(row.completion) for row in rows[:3]}) > 1
    # the prefill that the copies share gives what a whole forward gives
    with trainer.model.disable_adapter():
        oracle = log_probs(trainer.model, rows[0].teacher_prompt, rows[0].completion)
    head = trainer.model.get_output_embeddings().weight
    got = torch.log_softmax((rows[0].teacher_hidden @ head.T).double(), -1)
    torch.testing.assert_close(got, oracle, rtol=1e-4, atol=1e-5)
    assert one_step(trainer)["tokens"] > 0


def test_skipped_and_truncated_tokens_do_not_count(make_trainer):
    trainer = make_trainer(config={"lmbda": 0.0, "skip_first_tokens": 3})
    perturb(trainer.model)
    batch = trainer.data_collator(ROWS)
    every = int(batch["completion_mask"].sum())
    _, out = trainer.compute_loss(trainer.model.eval(), dict(batch), return_outputs=True)
    assert len(out["divergence"]) == every - sum(min(3, int(n)) for n in batch["completion_mask"].sum(1))
    trainer = make_trainer(config={"lmbda": 1.0, "mask_truncated_completions": True, "max_new_tokens": 2})
    rows = trainer.roll_out_and_score(rows_of(batch), on_policy=True)
    assert any(row.truncated for row in rows)
    assert all((not row.kept) == row.truncated for row in rows)


def test_a_step_without_any_token_has_zero_loss(make_trainer):
    trainer = make_trainer(config={"mask_truncated_completions": True, "max_new_tokens": 1})
    result = one_step(trainer)
    assert result["tokens"] == 0
    assert result["loss"] == 0.0


def test_teacher_writes_from_its_own_context_under_seq_kd(make_trainer):
    trainer = make_trainer(config={"lmbda": 0.0, "seq_kd": True, "temperature": 0.0, "max_new_tokens": 6})
    perturb(trainer.model, 0.5)
    batch = trainer.data_collator(ROWS[:2])
    rows = trainer.roll_out_and_score(rows_of(batch), on_policy=False)
    for row in rows:
        ids = list(row.teacher_prompt)
        with trainer.model.disable_adapter(), torch.no_grad():
            for expected in row.completion:
                token = int(trainer.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
                assert token == expected
                ids.append(token)
    assert all(row.generated for row in rows)


def test_shared_teacher_is_the_student_itself(make_trainer):
    trainer = make_trainer(rows=NO_PI, config={"teacher_adapter": "shared", "lmbda": 0.0})
    perturb(trainer.model)
    assert abs(one_step(trainer)["loss"]) <= 1e-6
    trainer = make_trainer(rows=NO_PI, config={"teacher_adapter": "disabled", "lmbda": 0.0})
    perturb(trainer.model)
    assert one_step(trainer)["loss"] > 1e-4


def test_lmbda_is_drawn_once_a_step_and_again_alike(make_trainer):
    trainer = make_trainer(config={"lmbda": 0.4})

    def draws():
        for step in range(200):
            trainer.state.global_step = step
            yield trainer.on_policy_step()

    first = list(draws())
    assert first == list(draws())
    assert 0.3 < sum(first) / 200 < 0.5


def test_seed_example_runs_as_written_and_holds_one_base(llama_path, tmp_path):
    dataset = Dataset.from_list(ROWS[:1])
    config = PrivilegedGKDConfig(
        output_dir=str(tmp_path / "privileged-gkd-model"),
        lmbda=1.0,
        share_student_as_teacher=True,
        privileged_key="privileged_messages",
        max_privileged_length=512,
        max_new_tokens=6,
        num_train_epochs=1,
    )
    trainer = PrivilegedSelfDistillTrainer(
        model=llama_path, teacher_model=llama_path, args=config, train_dataset=dataset
    )

    def size(model):
        return sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})

    from pgkd_peft.model.load import load_base

    base = size(load_base(llama_path))
    adapter = sum(p.numel() * p.element_size() for n, p in trainer.model.named_parameters() if "lora_" in n)
    assert adapter > 0
    everything = {t for m in (trainer.model, trainer.teacher_model) for t in (*m.parameters(), *m.buffers())}
    assert sum(t.numel() * t.element_size() for t in everything) == base + adapter
    assert {p.dtype for n, p in trainer.model.named_parameters() if "lora_" in n} == {torch.float32}
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in trainer.model.modules()) == 14

    trainer.train()
    trainer.save_model()
    saved = {path.name for path in Path(config.output_dir).iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "run.json"} <= saved
    assert "<|im_start|>" in (Path(config.output_dir) / "chat_template.jinja").read_text()
    run = json.loads((Path(config.output_dir) / "run.json").read_text())
    assert run["base_quantization"] == "nf4"
    assert run["base_model"] == llama_path


def test_the_saved_adapter_is_the_student(make_trainer, llama_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(model=llama_path, config={"max_steps": 3})
    trainer.train()
    trainer.save_model()
    base = AutoModelForCausalLM.from_pretrained(llama_path, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, trainer.args.output_dir).eval()
    ids = torch.tensor([[5, 70, 80, 90]])
    with torch.no_grad():
        ours, theirs = trainer.model.eval()(input_ids=ids).logits, loaded(input_ids=ids).logits
        with loaded.disable_adapter():
            assert not torch.equal(theirs, loaded(input_ids=ids).logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_training_lowers_the_divergence_and_logs_it(make_trainer):
    trainer = make_trainer(config={"max_steps": 25, "lmbda": 0.0, "learning_rate": 1e-2, "beta": 0.0})
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "divergence" in entry]
    assert sum(e["divergence"] for e in logs[-4:]) < 0.6 * sum(e["divergence"] for e in logs[:4])
    assert {
        "student_entropy",
        "teacher_entropy",
        "top1_agreement",
        "completion_length",
        "privileged_rows",
        "privileged_tokens_cut",
        "tokens_per_second",
        "seconds_rollout",
        "seconds_teacher",
        "seconds_student",
    } <= set(logs[0])
    assert logs[0]["loss"] == pytest.approx(logs[0]["divergence"], rel=1e-3)


def test_evaluation_reports_the_divergence_on_held_out_rows(make_trainer):
    """Against whole-sequence forwards of both, row by row: forward KL, mean over completion tokens."""
    trainer = make_trainer(config={"lmbda": 0.0, "beta": 0.0}, eval_dataset=Dataset.from_list([ROWS[0]]))
    perturb(trainer.model)
    result = trainer.evaluate()
    trainer.model.eval()
    (row,) = rows_of(trainer.data_collator([ROWS[0]]))
    student = log_probs(trainer.model, row.prompt, row.completion)
    with trainer.model.disable_adapter():
        teacher = log_probs(trainer.model, row.teacher_prompt, row.completion)
    expected = (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert expected > 1e-4
    assert result["eval_loss"] == pytest.approx(float(expected), rel=1e-3)


def test_an_evaluation_under_another_name_leaves_the_meters_of_training_alone(make_trainer):
    rows = {"a": Dataset.from_list(ROWS[:1]), "b": Dataset.from_list(ROWS[1:2])}
    trainer = make_trainer(config={"lmbda": 0.0}, eval_dataset=Dataset.from_list(ROWS[:1]))
    trainer.meters.add("train", rows=3)
    result = trainer.evaluate(metric_key_prefix="test")
    assert "test_divergence" in result
    assert "divergence" not in result
    assert trainer.meters.read("train") == {"rows": 3}
    assert {"eval_a_divergence", "eval_b_divergence"} <= set(trainer.evaluate(rows))


def test_a_collator_that_says_nothing_of_pi(make_trainer):
    """Which rows have some is seen from their prompts."""
    batch = make_trainer().data_collator(ROWS)
    expected = [row.has_privileged for row in rows_of(batch)]
    for name in ("has_privileged", "privileged_tokens", "privileged_tokens_cut"):
        del batch[name]
    assert [row.has_privileged for row in rows_of(batch)] == expected == [True, True, False, True]


def test_a_model_may_be_a_path_and_end_in_a_slash(make_trainer, llama_path):
    trainer = make_trainer(model=Path(llama_path))
    assert trainer.model.get_base_model().config._name_or_path == llama_path
    make_trainer(model=llama_path, teacher_model=f"{llama_path}/")  # the same one


def test_rollout_log_shows_both_answers(make_trainer, capsys):
    trainer = make_trainer(config={"rollout_log_steps": 2, "max_steps": 4, "rollout_log_samples": 2})
    trainer.train()
    records = [json.loads(x) for x in (Path(trainer.args.output_dir) / "completions.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 2, 4, 4]
    assert all({"prompt", "student", "teacher"} <= set(record) for record in records)
    assert records[0]["has_privileged"]
    assert "teacher (PI)" in capsys.readouterr().out


def test_strict_template_falls_back_to_the_user_turn(make_trainer, caplog):
    with caplog.at_level("INFO", logger="pgkd_peft"):
        trainer = make_trainer(rows=ROWS[:3], tokenizer=byte_tokenizer(STRICT))
    assert trainer.data_collator.builder.placement == "user"
    assert sum("user" in record.message and "placement" in record.message for record in caplog.records) == 1
    batch = trainer.data_collator(ROWS[:3])
    assert batch["teacher_prompts"].shape[1] > batch["prompts"].shape[1]
    assert one_step(trainer)["loss"] > 0
    assert make_trainer(tokenizer=byte_tokenizer(DROPPING), rows=ROWS[:3]).data_collator.builder.placement == "user"


def test_pad_that_is_eos_is_trained(make_trainer):
    tokenizer = byte_tokenizer(pad_is_eos=True)
    trainer = make_trainer(tokenizer=tokenizer, config={"lmbda": 0.0})
    batch = trainer.data_collator(ROWS)
    for row in rows_of(batch):
        assert row.completion[-1] == tokenizer.eos_token_id
    _, out = trainer.compute_loss(trainer.model.eval(), dict(batch), return_outputs=True)
    assert len(out["divergence"]) == int(batch["completion_mask"].sum())


def test_generation_config_of_the_model_does_not_change_sampling(make_trainer):
    def sample(**settings):
        model = tiny_model()
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        trainer = make_trainer(model=model, tokenizer=byte_tokenizer(), config={"max_new_tokens": 24})
        return [r.completion for r in trainer.roll_out_and_score(rows_of(trainer.data_collator(ROWS)), on_policy=True)]

    assert sample() == sample(repetition_penalty=5.0, top_k=1, top_p=0.1, temperature=0.01, do_sample=False)


def test_stop_ids_are_the_union(make_trainer):
    model = tiny_model()
    model.generation_config.eos_token_id = [1, 99]
    trainer = make_trainer(model=model, tokenizer=byte_tokenizer())
    assert {1, 99, trainer.processing_class.eos_token_id} <= set(trainer.stop_ids)


def test_privileged_text_over_budget_is_cut_and_counted(make_trainer):
    rows = [{**ROWS[0], "privileged_messages": [{"role": "user", "content": "x" * 300}]}]
    trainer = make_trainer(rows=rows, config={"max_privileged_length": 40, "allow_privileged_cut": True, "lmbda": 0.0})
    batch = trainer.data_collator(rows)
    assert int(batch["privileged_tokens_cut"].sum()) == 260
    assert ROWS[0]["messages"][0]["content"] in trainer.processing_class.decode(batch["teacher_prompts"][0])
    trainer.train()
    assert trainer.state.log_history[0]["privileged_tokens_cut"] == 260


def test_prompt_only_rows(make_trainer):
    rows = [{**row, "messages": row["messages"][:-1]} for row in ROWS]
    assert one_step(make_trainer(rows=rows, config={"lmbda": 1.0}))["tokens"] > 0
    with pytest.raises(DataError, match="lmbda"):
        make_trainer(rows=rows, config={"lmbda": 0.5})
    assert one_step(make_trainer(rows=rows, config={"lmbda": 0.0, "seq_kd": True}))["tokens"] > 0


def test_rows_are_checked_before_a_model_is_loaded(make_trainer, llama_path, monkeypatch):
    monkeypatch.setattr("pgkd_peft.model.student.load_base", lambda *a, **k: pytest.fail("loaded a model"))
    bad = [{"messages": []}, {"messages": [{"role": "robot", "content": "x"}]}]
    with pytest.raises(DataError) as error:
        make_trainer(model=llama_path, rows=bad)
    assert error.value.rows == (0, 1)


def test_another_teacher_is_refused_by_name_or_used(make_trainer, llama_path, tmp_path):
    other = save_tiny(tmp_path / "other", hidden_size=128, seed=3)
    with pytest.raises(ConfigError, match="share_student_as_teacher=False") as error:
        make_trainer(model=llama_path, teacher_model=other)
    assert llama_path in str(error.value)
    assert other in str(error.value)
    config = {"share_student_as_teacher": False, "lmbda": 0.0, "beta": 0.0}
    trainer = make_trainer(model=llama_path, teacher_model=other, config=config)
    batch = trainer.data_collator(ROWS[:1])
    row = rows_of(batch)[0]
    teacher = log_probs(trainer.teacher_model, row.teacher_prompt, row.completion)
    student = log_probs(trainer.model.eval(), row.prompt, row.completion)
    expected = (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert float(trainer.compute_loss(trainer.model, dict(batch))) == pytest.approx(float(expected), rel=1e-3)


def test_dropout_of_the_users_lora_stays_and_the_teacher_has_none(make_trainer):
    from peft import LoraConfig

    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear")
    trainer = make_trainer(peft_config=lora)
    drops = [m for n, m in trainer.model.named_modules() if "lora_dropout" in n and isinstance(m, torch.nn.Dropout)]
    assert drops
    assert {m.p for m in drops} == {0.5}


def test_user_mistakes_are_named(make_trainer, llama_path, tmp_path):
    from peft import IA3Config

    with pytest.raises(ModelError, match="LoRA"):
        make_trainer(peft_config=IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ModelError, match="nowhere"):
        make_trainer(model=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="formatting_func"):
        make_trainer(formatting_func=str)
    with pytest.raises(ModelError, match="chat template"):
        make_trainer(tokenizer=byte_tokenizer(None))


def test_collator_of_the_public_api():
    batch = DataCollatorForPrivilegedGKD(byte_tokenizer(), max_length=256)(ROWS)
    assert batch["prompts"].dtype == torch.long
    assert batch["prompt_attention_mask"][0].tolist() == sorted(batch["prompt_attention_mask"][0].tolist())
    assert batch["completion_mask"][1].tolist() == sorted(batch["completion_mask"][1].tolist(), reverse=True)


class RecordingHub:
    """In place of the Hub's client: which files each upload would take."""

    def __init__(self):
        self.uploads = []

    def create_repo(self, repo_id, **kwargs):
        return types.SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, *, folder_path, allow_patterns=None, ignore_patterns=None, path_in_repo="", **kwargs):
        folder = Path(folder_path)
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        taken = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        self.uploads.append((path_in_repo, set(taken)))
        return types.SimpleNamespace(done=lambda: True, result=lambda: None)


def test_nothing_of_the_data_is_pushed(make_trainer, monkeypatch):
    hub = RecordingHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    settings = {"push_to_hub": True, "hub_strategy": "checkpoint", "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(config={**settings, "max_steps": 1, "rollout_log_steps": 1})
    folder = Path(trainer.args.output_dir)
    folder.mkdir(exist_ok=True)
    for name in ("holdout.jsonl", "eval_answers.jsonl", "bake_train.jsonl", "notes.txt"):
        (folder / name).write_text("secret")
    trainer.train()
    trainer.save_model()
    trainer.push_to_hub()
    assert (folder / "traces.jsonl").is_file()
    use = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    use |= {"chat_template.jinja"}
    assert {place for place, _ in hub.uploads} == {"", "last-checkpoint"}
    for place, files in hub.uploads:
        if place:  # enough to go on from
            assert files == use | {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} | {
                "progress_0.json"
            }
        else:
            assert files <= use
    assert hub.uploads[-1] == ("", use)
