"""Settings that nobody gave: what is chosen and why, that a given value wins; PI that does not fit is refused."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import yaml
from conftest import perturb
from tiny import TINY_RUN, byte_tokenizer, save_tiny, tiny_model
from trl import TrlParser

from pgkd_peft import DataCollatorForPrivilegedGKD, PrivilegedGKDConfig, PrivilegedSelfDistillTrainer
from pgkd_peft.automatic import clearly_less, settle_training, start_block
from pgkd_peft.cli.main import main as pgkd
from pgkd_peft.data.collator import PrivilegedTooLongError, RowTooLongError
from pgkd_peft.errors import DataError
from pgkd_peft.model.rates import lora_learning_rate
from pgkd_peft.model.student import context_length


def row(question, answer, pi):
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "privileged_messages": pi}


ROWS = [row(f"Say {i}?", f"{i}", f"It is {i}.") for i in range(12)]


# ---- the rule and who gave what ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "rate"), [(576, 1.3223e-3), (2000, 5e-4), (4096, 2.857e-4)])
def test_the_rate_falls_with_the_width(width, rate):
    assert lora_learning_rate(width) == pytest.approx(rate, rel=1e-3)


def test_what_was_given_is_known(tmp_path):
    config = PrivilegedGKDConfig(str(tmp_path), learning_rate=2e-5)
    assert config.given == {"output_dir", "learning_rate"}
    assert not config.is_open("learning_rate")  # also where it equals the default
    assert config.is_open("max_steps")
    assert copy.copy(config).given == config.given
    config.max_steps = 7
    assert not config.is_open("max_steps")
    assert {"given", "automatic"}.isdisjoint(f.name for f in dataclasses.fields(config))


def test_a_parser_that_fills_everything_in_gives_only_what_it_was_told(tmp_path):
    parser = TrlParser([PrivilegedGKDConfig])
    (config,) = parser.parse_args_and_config(["--output_dir", str(tmp_path), "--max_steps", "9"])
    assert config.is_open("learning_rate")
    assert not config.is_open("max_steps")


def settled(tmp_path, rows=60, width=576, **given):
    config = PrivilegedGKDConfig(str(tmp_path), **given)
    settle_training(config, width, rows)
    return config


def test_a_small_set_gets_enough_steps_and_what_belongs_to_them(tmp_path):
    config = settled(tmp_path)
    assert config.learning_rate == lora_learning_rate(576)
    assert config.max_steps >= 100
    assert config.warmup_steps == round(0.05 * config.max_steps)
    assert config.normalize_beta is True
    assert config.logging_steps < 10
    assert config.lr_scheduler_type == "constant_with_warmup"
    assert (config.lmbda, config.beta, config.temperature, config.max_new_tokens) == (0.5, 0.5, 0.9, 128)
    assert set(config.automatic) >= {"learning_rate", "max_steps", "warmup_steps", "normalize_beta", "logging_steps"}


def test_a_large_set_keeps_its_epochs(tmp_path):
    config = settled(tmp_path, rows=8000)
    assert config.max_steps == -1
    assert config.warmup_steps == 150  # 5 % of 3 epochs of 1,000 steps


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 2e-5),
        ("normalize_beta", False),
        ("max_steps", 27),
        ("num_train_epochs", 3.0),
        ("warmup_steps", 0),
        ("lr_scheduler_type", "linear"),
        ("logging_steps", 10),
    ],
)
def test_a_value_that_is_given_wins(tmp_path, name, value):
    config = settled(tmp_path, **{name: value})
    assert getattr(config, name) == value
    assert name not in config.automatic
    if name == "num_train_epochs":
        assert config.max_steps == -1
    if name == "learning_rate":  # it was found with the divergence as it is
        assert config.normalize_beta is False


def test_a_config_that_is_used_twice_is_chosen_for_twice(tmp_path):
    config = PrivilegedGKDConfig(str(tmp_path))
    settle_training(config, 576, 60)
    settle_training(config, 4096, 8000)
    assert config.learning_rate == lora_learning_rate(4096)


def test_the_block_says_all_with_reasons_in_80_columns(tmp_path):
    config = settled(tmp_path)
    config.choose("privileged_template", "{question}\n\nUse: {privileged}", "a wording that is used " * 5)
    lines = start_block(config.automatic).splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(line.strip() for line in lines)
    for name, (_, reason) in config.automatic.items():
        assert f"{name} = " in text
        assert " ".join(reason.split()) in text
    assert start_block({}) == ""


def test_clearly_less():
    assert clearly_less([1.0, 1.1, 0.9, 1.0], [2.0, 2.2, 1.9, 2.0])
    assert not clearly_less([1.0, 3.0, 0.5, 2.0], [2.0, 1.0, 2.5, 1.2])
    assert not clearly_less([2.0, 2.2, 1.9], [1.0, 1.1, 0.9])


# ---- in the trainer ------------------------------------------------------------------------------------------------


def make(tmp_path, rows=ROWS, model=None, **given):
    fixed = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "bf16": False, "max_new_tokens": 8}
    return PrivilegedSelfDistillTrainer(
        model=model or tiny_model(),
        args=PrivilegedGKDConfig(str(tmp_path / "run"), **{**fixed, **given}),
        train_dataset=rows,
        processing_class=byte_tokenizer(),
    )


def test_python_gets_the_same_as_the_command_line(tmp_path, caplog):
    caplog.set_level("INFO", "pgkd_peft")
    trainer = make(tmp_path)
    assert trainer.args.learning_rate == lora_learning_rate(64)
    assert trainer.args.max_steps >= 100
    assert f"learning_rate = {lora_learning_rate(64):.3g}: " in caplog.text
    trainer = make(tmp_path, learning_rate=1e-3, max_steps=3)
    assert (trainer.args.learning_rate, trainer.args.max_steps) == (1e-3, 3)


def test_the_placement_is_where_the_reference_answers_are_likeliest(tmp_path):
    """A base that reads PI in the system turn alone: trained so here, by the trainer itself with the teacher as is."""
    trainer = make(tmp_path, privileged_placement="messages")
    assert trainer.contexts.builder.placement == "messages"
    from pgkd_peft import automatic

    losses = {"messages": 2.0, "user": 1.5, "system": 0.5}
    seen = []

    def measured(collator, rows, teacher, head):
        seen.append((collator.builder.placement, collator.builder.privileged_template, len(rows)))
        return [losses[collator.builder.placement] + 0.01 * (i % 3) for i in range(len(rows))]

    patch = pytest.MonkeyPatch()
    with patch.context() as m:
        m.setattr(automatic, "answer_losses", measured)
        trainer = make(tmp_path)
    assert trainer.args.privileged_placement == trainer.contexts.builder.placement == "system"
    assert [placement for placement, _, _ in seen] == ["messages", "user", "user", "system"]
    assert {count for _, _, count in seen} == {len(ROWS)}


@pytest.mark.parametrize(("system", "chosen"), [(2.0, "system"), (2.5, "messages")])
def test_of_equally_good_placements_the_one_that_shares_is_taken(tmp_path, monkeypatch, system, chosen):
    from pgkd_peft import automatic

    losses = {"messages": 2.0, "user": 9.0, "system": system}
    monkeypatch.setattr(
        automatic, "answer_losses", lambda collator, rows, *_: [losses[collator.builder.placement]] * len(rows)
    )
    trainer = make(
        tmp_path, rows=[row(f"Say {i}?", f"{i}", "Count as they did in the old days. " * 4) for i in range(12)]
    )
    assert trainer.contexts.builder.placement == chosen
    assert ("read once" in trainer.args.automatic["privileged_placement"][1]) == (chosen == "system")


def test_the_probe_measures_the_likelihood_of_the_answers(tmp_path):
    """Against a plain forward of each row alone."""
    import torch

    from pgkd_peft.automatic import answer_losses

    trainer = make(tmp_path, max_steps=1)
    perturb(trainer.model)  # the teacher has its adapter off: it must not matter
    losses = answer_losses(trainer.contexts, ROWS[:4], trainer.teacher, trainer.teacher_head)
    base = tiny_model()
    for found, each in zip(losses, ROWS):
        encoded = trainer.contexts.encode(each)
        prompt, answer = encoded["teacher_ids"], encoded["completion_ids"]
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
        expected = -logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).mean().item()
        assert found == pytest.approx(expected, rel=1e-4)


def test_few_rows_are_not_probed(tmp_path):
    trainer = make(tmp_path, rows=ROWS[:5])
    assert trainer.args.privileged_placement == "messages"
    assert "privileged_placement" not in trainer.args.automatic


def test_a_template_without_a_placement_is_not_ignored(tmp_path):
    trainer = make(tmp_path, rows=ROWS[:5], privileged_template="{question}\n({privileged})")
    assert trainer.contexts.builder.placement == "user"
    assert "(It is 3.)" in trainer.contexts.encode(ROWS[3])["teacher_text"]


def test_a_tiny_model_learns_within_the_default_steps(tmp_path):
    """Held-out nats before and after: the divergence from a teacher whose PI always asks for one letter."""
    rows = [row(f"Question {i}", "zzzz", "Say zzzz.") for i in range(16)]
    trainer = make(tmp_path, rows=rows, max_new_tokens=6, rollout_engine="adapter")
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert trainer.state.global_step >= 100
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


# ---- PI that does not fit ------------------------------------------------------------------------------------------


LONG = row("Why?", "So.", "x" * 600)


def test_pi_over_a_given_budget_is_an_error_with_row_length_and_flag(tmp_path):
    with pytest.raises(DataError) as error:
        make(tmp_path, rows=[ROWS[0], LONG], max_privileged_length=512)
    text = str(error.value)
    assert "row 1:" in text
    assert "600 tokens" in text
    assert "max_privileged_length is 512" in text
    assert "--max_privileged_length 600" in text
    assert "--allow_privileged_cut" in text


def test_the_flag_cuts_as_before(tmp_path):
    trainer = make(tmp_path, rows=[ROWS[0], LONG], allow_privileged_cut=True, max_steps=1)
    assert trainer.args.max_privileged_length == 512
    assert trainer.run_info.report.privileged_tokens_cut == [0, 88]


def test_without_a_budget_the_context_is_the_budget(tmp_path):
    trainer = make(tmp_path, rows=[ROWS[0], LONG], max_steps=1)
    assert trainer.args.max_privileged_length == 4096
    assert "600 tokens" in trainer.args.automatic["max_privileged_length"][1]
    assert trainer.run_info.report.privileged_tokens_cut == [0, 0]
    short = make(tmp_path, rows=ROWS, max_steps=1)
    assert short.args.max_privileged_length == 512


def test_pi_over_the_context_is_an_error_before_the_model_is_loaded(tmp_path, monkeypatch):
    path = save_tiny(tmp_path / "model", max_position_embeddings=300)
    monkeypatch.setattr("pgkd_peft.construction.build_student", None)
    config = PrivilegedGKDConfig(str(tmp_path / "run"), report_to="none", bf16=False, base_quantization="none")
    assert context_length(path, config) == 300
    with pytest.raises(DataError) as error:
        PrivilegedSelfDistillTrainer(model=path, args=config, train_dataset=[ROWS[0], LONG])
    assert "row 1:" in str(error.value)
    assert "(max_position_embeddings) is 300" in str(error.value)
    assert "600 tokens of it PI" in str(error.value)


def test_the_context_counts_prompt_and_answer():
    each = row("Why?", "So.", "abc")
    free = DataCollatorForPrivilegedGKD(byte_tokenizer())
    encoded = free.encode(each)
    plain, teacher, answer = (len(encoded[name]) for name in ("student_ids", "teacher_ids", "completion_ids"))

    def check(context, new=0):
        DataCollatorForPrivilegedGKD(byte_tokenizer(), context_length=context, max_new_tokens=new)([each])

    check(teacher + answer)
    check(teacher + 40, new=40)
    for context, new, kind in (
        (teacher + answer - 1, 0, PrivilegedTooLongError),
        (teacher + 39, 40, PrivilegedTooLongError),
        (plain + answer - 1, 0, RowTooLongError),
    ):
        collator = DataCollatorForPrivilegedGKD(byte_tokenizer(), context_length=context, max_new_tokens=new)
        with pytest.raises(kind, match="max_position_embeddings"):
            collator.check_length(encoded)


def test_the_command_ends_with_code_2(tmp_path, llama_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [ROWS[0], LONG]))
    settings = {**TINY_RUN, "model_name_or_path": llama_path, "dataset_name": str(tmp_path / "rows.jsonl")}
    settings |= {"output_dir": str(tmp_path / "run"), "max_privileged_length": 100}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert pgkd(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "row 1: the PI has 600 tokens, max_privileged_length is 100" in capsys.readouterr().err
    assert pgkd(["train", "--config", str(tmp_path / "recipe.yaml"), "--allow_privileged_cut"]) == 0


@pytest.mark.parametrize(
    ("given", "plenty", "checkpoints"),
    [
        ({}, True, False),
        ({}, False, True),
        ({"gradient_checkpointing": True}, True, True),
        ({"activation_checkpointing": True}, True, True),
    ],
)
def test_memory_that_is_plenty_is_used_for_speed(make_trainer, monkeypatch, given, plenty, checkpoints):
    from pgkd_peft import automatic

    if not plenty:
        monkeypatch.setattr(automatic, "free_bytes", lambda device: 1000)
    trainer = make_trainer(config={"max_steps": 1, **given})
    trainer.train()
    flags = {m.gradient_checkpointing for m in trainer.model.modules() if hasattr(m, "gradient_checkpointing")}
    assert flags == {checkpoints}


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_the_estimate_of_activations_is_an_upper_one(make_trainer, kind):
    import torch

    from pgkd_peft.automatic import activation_bytes

    model = make_trainer(kind=kind).model.train()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.base_model.model.model(torch.zeros(3, 40, dtype=torch.long)).last_hidden_state
    activations = sum(size for pointer, size in kept.items() if pointer not in weights)
    assert output.requires_grad
    assert activations > 0
    assert activations < activation_bytes(model.config.get_text_config(), 3, 40) < 20 * activations
