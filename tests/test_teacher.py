"""Whose weights answer as teacher, that they are set and put back, and what another model must be to teach."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import ROWS, VOCAB, byte_tokenizer, save_tiny, tiny_model

from pgkd_peft import PrivilegedGKDConfig, PrivilegedSelfDistillTrainer
from pgkd_peft.errors import ConfigError, ModelError
from pgkd_peft.model.adapters import adapter_state
from pgkd_peft.model.cpu import use_short_backward
from pgkd_peft.model.ema import EMA
from pgkd_peft.model.head import refuse_trainable_head
from pgkd_peft.model.load import load_base
from pgkd_peft.teacher import Teacher, check_same_vocabulary

IDS = torch.arange(24)[None] + 10  # (1, T)


LINEAR = ["q_proj", "v_proj", "down_proj"]


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **kwargs})


def student(config: LoraConfig | None = None, *, moved: bool = True, seed: int = 1) -> PeftModel:
    """A tiny PeftModel, by default with an adapter that is not zero."""
    model = get_peft_model(tiny_model(), config or lora())
    if moved:
        move(model, seed)
    return model


@torch.no_grad()
def move(model: PeftModel, seed: int, scale: float = 0.3) -> None:
    """Add noise to everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.requires_grad:
            param.add_(scale * torch.randn(param.shape, generator=generator))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def teacher_logits(teacher: Teacher) -> torch.Tensor:
    with teacher.weights() as model:
        return logits(model)


def snapshot(model: PeftModel) -> dict:
    """Everything that the context manager must put back."""
    layers = [m for m in model.modules() if isinstance(getattr(m, "disable_adapters", None), bool)]
    assert len(layers) >= 6
    return {
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "active": [list(m.active_adapters) for m in layers],
        "disabled": [m.disable_adapters for m in layers],
        "active_adapter": model.active_adapter,
        "weights": [p.detach().clone() for p in model.parameters()],
    }


def same(before: dict, after: dict) -> bool:
    weights = all(torch.equal(a, b) for a, b in zip(before.pop("weights"), after.pop("weights"), strict=True))
    return weights and before == after


def run(
    tmp_path,
    model=None,
    rows=ROWS,
    callbacks=None,
    teacher_model=None,
    processing_class=None,
    peft_config=None,
    **settings,
):
    """A trainer on a tiny model, not trained yet."""
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "lmbda": 0.0,
        "max_new_tokens": 6,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.02,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
    }
    return PrivilegedSelfDistillTrainer(
        model=model if model is not None else student(),
        teacher_model=teacher_model,
        args=PrivilegedGKDConfig(**{**defaults, **settings}),
        train_dataset=rows,
        callbacks=callbacks,
        peft_config=peft_config,
        processing_class=processing_class or byte_tokenizer(),
    )


@pytest.mark.parametrize("which", ["disabled", "shared", "initial"])
@pytest.mark.parametrize("training", [True, False])
def test_everything_is_put_back(which, training):
    model = student()
    Teacher(model, "initial")
    model.train(training)
    next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp")).train(not training)  # modes may be mixed
    next(p for n, p in model.named_parameters() if "lora_A.default" in n).requires_grad_(False)  # and gradients as well
    next(p for n, p in model.named_parameters() if n.endswith("norm.weight")).requires_grad_(True)
    before = snapshot(model)
    with adapter_state(model, which):
        assert not any(m.training for m in model.modules())
    assert same(before, snapshot(model))


def test_nested_and_raising_bodies_are_put_back():
    model = student().train()
    Teacher(model, "initial")
    move(model, 4)
    before, base = snapshot(model), logits(tiny_model())

    def body():
        with adapter_state(model, "disabled"):
            assert torch.equal(logits(model), base)
            with adapter_state(model, "initial"):
                assert not torch.equal(logits(model), base)
                with adapter_state(model, "disabled"):
                    assert torch.equal(logits(model), base)
            assert torch.equal(logits(model), base)  # the inner exit brought the outer state back
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        body()
    assert same(before, snapshot(model))


def test_modules_trained_whole_are_switched_too():
    model = student(lora(modules_to_save=["lm_head"]))
    reference = tiny_model()
    before = snapshot(model)
    with adapter_state(model, "disabled"):
        torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=0)
    assert same(before, snapshot(model))
    assert (logits(model) - logits(reference)).abs().max() > 0.1


def test_dropout_sleeps_in_the_teacher_and_two_passes_are_equal():
    model = student(lora(lora_dropout=0.5)).train()
    assert not torch.equal(logits(model), logits(model))  # dropout is awake in the student
    for which in ("disabled", "shared", "initial"):
        teacher = Teacher(model if which != "initial" else student(lora(lora_dropout=0.5)).train(), which)
        assert torch.equal(teacher_logits(teacher), teacher_logits(teacher))


def test_checkpointed_backward_is_the_same_after_a_teacher_pass():
    """With activation checkpointing the forward runs again in backward: it must meet the student's adapter."""

    def gradients(teacher_first: bool) -> list[torch.Tensor]:
        model = student().train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        teacher = Teacher(model, "disabled")
        if teacher_first:
            teacher_logits(teacher)
        loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.square().mean()
        if teacher_first:
            teacher_logits(teacher)  # also between forward and backward
        loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain, around = gradients(False), gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, around, strict=True))
    assert sum(g.abs().sum() for g in plain) > 0


def test_initial_stays_where_training_started(tmp_path):
    trainer = run(tmp_path, teacher_adapter="initial")
    start = teacher_logits(trainer.teacher)
    torch.testing.assert_close(start, logits(trainer.model.eval()), rtol=0, atol=0)
    assert (start - logits(tiny_model())).abs().max() > 0.1  # and that is not the base
    trainer.train()
    torch.testing.assert_close(teacher_logits(trainer.teacher), start, rtol=0, atol=0)
    assert (logits(trainer.model.eval()) - start).abs().max() > 1e-3


@pytest.mark.parametrize("extra", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}])
def test_initial_copies_every_kind_of_adapter(extra):
    model = student(lora(**extra)).eval()
    start = logits(model)
    teacher = Teacher(model, "initial")
    move(model, 5)
    torch.testing.assert_close(teacher_logits(teacher), start, rtol=0, atol=0)
    assert (logits(model) - start).abs().max() > 1e-3


def test_initial_after_pissa_is_the_original_model():
    """PiSSA moves a part of the base into the adapter; a second such initialisation would move it again."""
    model = student(lora(init_lora_weights="pissa"), moved=False).eval()
    torch.testing.assert_close(teacher_logits(Teacher(model, "initial")), logits(tiny_model()), rtol=1e-3, atol=1e-3)


def test_a_second_adapter_changes_nothing_for_the_student():
    plain, model = student().train(), student().train()
    before, state = snapshot(model), torch.get_rng_state()
    Teacher(model, "ema")
    assert torch.equal(torch.get_rng_state(), state)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable == [n for n, p in plain.named_parameters() if p.requires_grad]
    assert model.active_adapter == before["active_adapter"]
    assert all(m.training for n, m in model.named_modules() if EMA not in n.split("."))
    torch.testing.assert_close(logits(model.eval()), logits(plain.eval()), rtol=0, atol=0)


@pytest.mark.parametrize("which", ["initial", "ema"])
def test_only_the_trained_adapter_is_saved(tmp_path, which):
    trainer = run(tmp_path, teacher_adapter=which, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        subfolders = [p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("checkpoint-")]
        assert not subfolders
        loaded = PeftModel.from_pretrained(tiny_model(), str(folder)).eval()
        use_short_backward(loaded.get_base_model(), torch.device("cpu"))  # as what trained: the same bits
        torch.testing.assert_close(logits(loaded), logits(trainer.model.eval()), rtol=0, atol=0)


def test_disabled_warns_when_training_continues_from_an_adapter(tmp_path, caplog):
    run(tmp_path)
    assert "teacher_adapter='initial'" in caplog.text
    caplog.clear()
    run(tmp_path, model=student(moved=False))
    assert "initial" not in caplog.text


def test_training_starts_from_an_adapter_folder(tmp_path):
    base = save_tiny(tmp_path / "base")
    first = get_peft_model(load_base(base, quantization="none", dtype=torch.float32, device="cpu"), lora())
    move(first, 3)
    first.save_pretrained(tmp_path / "adapter")
    trainer = run(tmp_path, str(tmp_path / "adapter"), teacher_adapter="initial", base_quantization="none")
    # not bit for bit: a base that the trainer loads computes short attention by other products
    torch.testing.assert_close(teacher_logits(trainer.teacher), logits(first.eval()), rtol=1e-5, atol=1e-5)


def test_initial_refuses_biases_of_the_base():
    with pytest.raises(ConfigError, match="bias='lora_only'"):
        Teacher(student(lora(bias="lora_only")), "initial")


@pytest.mark.parametrize("which", ["initial", "ema"])
def test_second_adapter_survives_a_file(tmp_path, which):
    model = student()
    teacher = Teacher(model, which, ema_decay=0.5)
    if which == "ema":
        move(model, 7)
        teacher.average.update()
    said = teacher_logits(teacher)
    teacher.save(str(tmp_path / "teacher.safetensors"))
    other = Teacher(student(seed=99), which)
    assert not torch.equal(teacher_logits(other), said)
    other.load(str(tmp_path / "teacher.safetensors"))
    torch.testing.assert_close(teacher_logits(other), said, rtol=0, atol=0)
    with pytest.raises(ModelError, match="does not belong"):
        Teacher(student(lora(r=5)), which).load(str(tmp_path / "teacher.safetensors"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, r"target_modules=\['lm_head', 'q_proj'\]"),
        ({"target_modules": ".*head"}, r"target_modules='\.\*head'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"target_parameters": ["lm_head.weight"]}, r"target_parameters=\['lm_head.weight'\]"),
        ({"target_modules": ["embed_out", "q_proj"]}, "target_modules"),
    ],
)
def test_a_head_that_would_train_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, settings, named):
    monkeypatch.setattr("pgkd_peft.model.student.load_base", lambda *_, **__: pytest.fail("loaded"))
    base = save_tiny(tmp_path / "base")
    with pytest.raises(ConfigError, match=named + ".*output head.*Take the head's name out"):
        run(tmp_path, base, peft_config=lora(**settings))
    folder = tmp_path / "adapter"
    config = lora(**settings)
    config.base_model_name_or_path = base
    config.save_pretrained(folder)
    (folder / "adapter_model.safetensors").touch()
    with pytest.raises(ConfigError, match=named):
        run(tmp_path, str(folder), processing_class=byte_tokenizer())


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}],
)
def test_a_loaded_model_whose_head_trains_is_refused(tmp_path, settings):
    model = tiny_model(tie_word_embeddings="ensure_weight_tying" in settings)
    with pytest.raises(ConfigError, match="train the model's output head"):
        run(tmp_path, get_peft_model(model, lora(**settings)))


def test_names_like_the_heads_are_no_heads():
    refuse_trainable_head(lora(target_modules=["q_proj", "lm_head_norm"], modules_to_save=["score", "my_lm_head"]))
    refuse_trainable_head(lora(target_modules=".*proj"))
    refuse_trainable_head(lora(target_modules=".*", exclude_modules=["lm_head", "embed_out"]))
    refuse_trainable_head(lora(target_modules="all-linear"))
    refuse_trainable_head(None)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_separate_teacher_may_be_wider(tmp_path, quantization):
    base = save_tiny(tmp_path / "base")
    wide = save_tiny(tmp_path / "wide", seed=5, hidden_size=96, intermediate_size=160, num_hidden_layers=3)
    trainer = run(
        tmp_path, base, teacher_model=wide, share_student_as_teacher=False, base_quantization=quantization, max_steps=1
    )
    assert trainer.teacher.separate.config.hidden_size == 96
    kinds = {type(m).__name__ for m in trainer.teacher.separate.modules()}
    assert ("Linear4bit" in kinds) == (quantization == "nf4")
    trainer.train()
    (row,) = trainer.roll_out_and_score(trainer.last_rows[:1], on_policy=False)
    with trainer.teacher.weights() as teacher, torch.no_grad():
        ids = torch.tensor([row.teacher_prompt + row.completion])
        hidden = teacher(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]  # (T, D), after the last norm
        expected = hidden[len(row.teacher_prompt) - 1 : -1]
    torch.testing.assert_close(row.teacher_hidden, expected, rtol=1e-3, atol=1e-3)
    assert trainer.state.log_history[0]["divergence"] > 0
    assert any(name.startswith("teacher: ") for name in trainer.frozen.digests)


def test_a_wider_teacher_beside_a_micro_batch_without_a_kept_token(tmp_path):
    base = save_tiny(tmp_path / "base")
    wide = save_tiny(tmp_path / "wide", seed=5, hidden_size=96, intermediate_size=160)
    trainer = run(
        tmp_path,
        base,
        teacher_model=wide,
        share_student_as_teacher=False,
        base_quantization="none",
        skip_first_tokens=1000,
        max_steps=1,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0.0


def test_another_vocabulary_is_refused(tmp_path):
    other = tiny_model(vocab_size=VOCAB + 8)
    with pytest.raises(ModelError, match=rf"{VOCAB + 8}.*{VOCAB}"):
        run(tmp_path, tiny_model(), teacher_model=other, share_student_as_teacher=False)


def test_another_tokenizer_of_the_same_size_is_refused():
    own, other = byte_tokenizer(), byte_tokenizer()
    model = tiny_model()
    check_same_vocabulary(model, model, own, other)
    vocab = dict(own.get_vocab())
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    swapped = copy.copy(other)
    swapped.get_vocab = lambda: vocab
    with pytest.raises(ModelError, match="2 tokens"):
        check_same_vocabulary(model, model, own, swapped)


def test_another_soft_cap_is_refused(tmp_path):
    teacher = tiny_model("gemma", final_logit_softcapping=30.0)
    with pytest.raises(ModelError, match=r"caps its logits at 30\.0.*at 5\.0"):
        run(tmp_path, tiny_model("gemma"), teacher_model=teacher, share_student_as_teacher=False)
