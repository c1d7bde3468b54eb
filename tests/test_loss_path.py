"""Which path the loss takes inside a real step, where accelerate hands over float32 rows whatever the model runs in."""

from __future__ import annotations

import pytest
import torch
from conftest import perturb
from tiny import save_tiny, tiny_model
from torch import nn

from pgkd_peft import divergence
from pgkd_peft.model.cpu import CPU_ATTENTION
from pgkd_peft.model.load import attach_lora, load_base
from pgkd_peft.projection import Pair, RefinedPair


@pytest.fixture
def taken(monkeypatch):
    """Every pair that the loss builds, with the rows that it is given: [(pair, student (N, D), teacher (N, D))]."""
    found = []
    original = divergence.pair_of

    def spy(*args):
        pair = original(*args)
        project = pair.project

        def projected(student, teacher, want_grad):
            found.append((pair, student.detach().clone(), teacher.clone()))
            return project(student, teacher, want_grad)

        pair.project = projected
        return pair

    monkeypatch.setattr(divergence, "pair_of", spy)
    return found


PATHS = {  # what trains -> dtype of the rows, pair, dtype in which the gradient of the logits is multiplied
    "bf16": (torch.bfloat16, RefinedPair, torch.bfloat16),
    "fp16": (torch.float16, Pair, torch.float32),  # on CPU a product in fp16 takes up to a hundred times as long
    "float32": (torch.float32, Pair, torch.float32),
}


def precision(name):
    return {"bf16": name == "bf16", "fp16": name == "fp16"}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", list(PATHS))
def test_a_step_takes_the_path_of_its_precision(name, quantization, taken, make_trainer, llama_path):
    dtype, kind, grad_dtype = PATHS[name]
    trainer = make_trainer(
        model=llama_path, config={**precision(name), "base_quantization": quantization, "gradient_checkpointing": True}
    )
    assert trainer.head.weight.dtype == dtype
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    assert len(taken) >= 2
    for pair, student, teacher in taken:
        assert (student.dtype, teacher.dtype, type(pair), pair.grad_dtype) == (dtype, dtype, kind, grad_dtype)
    after = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after))
    assert all(torch.isfinite(p).all() for p in after)
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_the_rows_are_what_the_models_own_head_is_given(taken, make_trainer, llama_path):
    """The cast back loses nothing: the model's own norm answers in the head's dtype, before accelerate widens it."""
    trainer = make_trainer(model=llama_path, config={**precision("bf16"), "max_steps": 1})
    own = []
    trainer.model.get_base_model().model.norm.register_forward_hook(lambda m, i, out: own.append(out.detach()))
    trainer.train()
    seen = torch.cat([student for _, student, _ in taken])
    said = torch.cat([rows.flatten(0, 1) for rows in own])
    assert said.dtype == torch.bfloat16
    for row in seen:
        assert (said == row).all(-1).any()


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_value_and_gradient_of_a_step_against_float64(name, taken, make_trainer, tmp_path, monkeypatch):
    base = load_base(save_tiny(tmp_path / "base", vocab_size=2048), quantization="none", dtype=PATHS[name][0])
    trainer = make_trainer(
        model=perturb(attach_lora(base), 0.05), config={**precision(name), "max_steps": 1, "beta": 0.5, "lmbda": 0.0}
    )
    rows, values = [], []
    original = divergence.linear_jsd

    def keep(student, *args, **options):
        student.retain_grad()
        rows.append(student)
        result = original(student, *args, **options)
        values.append(result.divergence.detach())
        return result

    monkeypatch.setattr(divergence, "linear_jsd", keep)
    trainer.train()
    assert rows
    weight = trainer.head.weight.double()
    for student, value, (_, _, teacher) in zip(rows, values, taken):
        exact = student.detach().double().requires_grad_()
        s, t = (torch.softmax(hidden @ weight.T, dim=-1) for hidden in (exact, teacher.double()))
        m = (s + t) / 2
        expected = (t * (t / m).log() + s * (s / m).log()).sum(-1) / 2
        expected.sum().backward()
        torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-3, atol=1e-5)
        scale = (student.grad.double() * exact.grad).sum() / exact.grad.square().sum()  # 1 / tokens, and fp16's scale
        error = (student.grad.double() / scale - exact.grad).norm() / exact.grad.norm()
        assert error < 5e-3
        assert exact.grad.norm() > 0


# ---- the attention that a step takes ---------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """Arguments of a machine with a GPU, as far as building the student goes."""
    from pgkd_peft import PrivilegedGKDConfig

    monkeypatch.setattr(PrivilegedGKDConfig, "device", property(lambda self: torch.device("cuda", 0)))
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **kwargs: self)


@pytest.mark.parametrize("kind", ["path", "model", "peft"])
def test_attention_follows_the_device_that_trains(kind, make_config, llama_path, request):
    from pgkd_peft.model.student import build_student

    def built(args):
        model = {"path": lambda: llama_path, "model": tiny_model, "peft": lambda: attach_lora(tiny_model())}[kind]()
        return build_student(model, args, None, None)[0].get_base_model().config._attn_implementation

    assert built(make_config()) == CPU_ATTENTION
    request.getfixturevalue("gpu")
    assert built(make_config()) == "sdpa"


def test_another_attention_of_a_loaded_model_stays(make_config):
    from pgkd_peft.model.student import build_student

    model = tiny_model()
    model.set_attn_implementation("eager")
    student, _ = build_student(model, make_config(), None, None)
    assert student.get_base_model().config._attn_implementation == "eager"
