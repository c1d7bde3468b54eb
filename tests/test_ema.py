"""The teacher that is a moving average of the student's LoRA products."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from test_teacher import lora, move, run, student
from transformers import TrainerCallback

from pgkd_peft.errors import ConfigError
from pgkd_peft.model import ema
from pgkd_peft.model.adapters import STUDENT, adapter_tensors
from pgkd_peft.model.ema import EMA, RANK_FACTOR, cut
from pgkd_peft.teacher import Teacher


def dense_products(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """scaling * B @ A of each layer in float64, straight from the parameters."""
    products = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and adapter in module.lora_A:
            b, a = module.lora_B[adapter].weight.double(), module.lora_A[adapter].weight.double()
            products[name] = module.scaling[adapter] * b @ a
    return products


def relative(a: dict, b: dict) -> float:
    return max(((a[k] - b[k]).norm() / b[k].norm().clamp(min=1e-12)).item() for k in b)


@pytest.mark.parametrize(
    "extra", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 11}, "rank_pattern": {"v_proj": 3}}]
)
def test_ema_equals_the_dense_average_of_products(extra):
    model, decay = student(lora(**extra)), 0.8
    teacher = Teacher(model, "ema", ema_decay=decay)
    dense = dense_products(model, STUDENT)
    assert len(dense) == 6
    assert relative(dense_products(model, EMA), dense) < 1e-6  # the correct start
    factors = {n: p.detach().clone() for n, p in adapter_tensors(model, STUDENT).items()}  # what one must not do
    for step in range(RANK_FACTOR - 1):  # the start has rank r, each step adds r: exact up to the last of R
        move(model, 10 + step)
        now = dense_products(model, STUDENT)
        dense = {k: decay * dense[k] + (1 - decay) * now[k] for k in dense}
        assert teacher.average.update() < 1e-10
        for name, param in adapter_tensors(model, STUDENT).items():
            factors[name] = decay * factors[name] + (1 - decay) * param.detach()
    assert relative(dense_products(model, EMA), dense) < 1e-5
    for name, param in adapter_tensors(model, STUDENT).items():
        param.data.copy_(factors[name])
    assert relative(dense_products(model, STUDENT), dense) > 0.05  # averaging A and B apart is something else


def test_ema_cuts_the_least_and_says_how_much():
    model, decay = student(lora(r=1, lora_alpha=2, target_modules=["q_proj"])), 0.5
    teacher = Teacher(model, "ema", ema_decay=decay)
    for step in range(3):  # fills all of R
        move(model, 20 + step, scale=1.0)
        assert teacher.average.update() < 1e-10
    for step in range(4):
        held = dense_products(model, EMA)
        move(model, 40 + step, scale=1.0)
        now = dense_products(model, STUDENT)
        exact = {k: decay * held[k] + (1 - decay) * now[k] for k in held}
        values = {k: torch.linalg.svdvals(v) for k, v in exact.items()}
        lost = sum(float((v[RANK_FACTOR:].detach() ** 2).sum()) for v in values.values())
        total = sum(float((v.detach() ** 2).sum()) for v in values.values())
        assert float(teacher.average.update()) == pytest.approx(lost / total, rel=1e-3, abs=1e-9)
        kept = dense_products(model, EMA)
        error = sum(float((kept[k] - exact[k]).detach().norm() ** 2) for k in exact)
        assert error == pytest.approx(lost, rel=1e-3, abs=1e-9 * total)  # Eckart-Young: nothing nearer has this rank
    assert lost > 1e-6 * total


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "rank"), [(7, 3, 5, 2), (9, 8, 4, 5), (31, 5, 2, 5), (6, 4, 6, 4)]
)
def test_cut_is_the_best_approximation(rows, inner, columns, rank):
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(3, rows, inner, generator=generator))
    core = torch.randn(3, inner, columns, generator=generator)
    left, right, energy = cut(basis, core, rank)
    u, s, v = torch.linalg.svd((basis @ core).double(), full_matrices=False)
    best = u[..., :rank] * s[..., None, :rank] @ v[..., :rank, :]
    torch.testing.assert_close((left @ right).double(), best, rtol=1e-4, atol=1e-4)
    known = min(s.shape[-1], energy.shape[-1])
    torch.testing.assert_close(energy[:, :known], s[:, :known].square(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left.mT @ left, torch.eye(rank).expand(3, -1, -1), rtol=0, atol=1e-5)


def test_the_average_stays_sound_over_many_steps():
    """The columns stay orthonormal, without which the cut would not be the best one."""
    model = student(lora(r=1, lora_alpha=2))
    teacher = Teacher(model, "ema", ema_decay=0.9)
    for step in range(400):
        move(model, step, scale=0.1)
        teacher.average.update()
    for name, b in adapter_tensors(model, EMA).items():
        if "lora_B" in name:
            torch.testing.assert_close(b.mT @ b, torch.eye(RANK_FACTOR), rtol=0, atol=1e-4)


def test_layers_of_one_shape_go_together_and_alone_to_the_same_average(monkeypatch):
    averages = []
    for group_bytes in (2**28, 1):
        monkeypatch.setattr(ema, "GROUP_BYTES", group_bytes)
        model = student()
        teacher = Teacher(model, "ema", ema_decay=0.7)
        assert len(teacher.average.groups) == (3 if group_bytes > 1 else 6)
        for step in range(6):
            move(model, step)
            teacher.average.update()
        averages.append(dense_products(model, EMA))
    assert relative(*averages) < 1e-5


def test_a_layer_narrower_than_the_average_loses_nothing():
    model = student(lora(r=12, target_modules=["k_proj"]))  # R = 48 of 32 outputs
    teacher, dense = Teacher(model, "ema", ema_decay=0.8), dense_products(model, STUDENT)
    assert next(m.out_features for n, m in model.named_modules() if n.endswith("k_proj")) == 32
    for step in range(5):
        move(model, step)
        dense = {k: 0.8 * v + 0.2 * dense_products(model, STUDENT)[k] for k, v in dense.items()}
        assert teacher.average.update() < 1e-10
    assert relative(dense_products(model, EMA), dense) < 1e-5


def test_ema_follows_in_training(tmp_path):
    trainer = run(tmp_path, teacher_adapter="ema", ema_decay=0.5, max_steps=3)
    dense = dense_products(trainer.model, STUDENT)
    seen = []

    class Oracle(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            nonlocal dense
            now = dense_products(trainer.model, STUDENT)
            dense = {k: 0.5 * dense[k] + 0.5 * now[k] for k in dense}
            seen.append(relative(dense_products(trainer.model, EMA), dense))

    trainer.add_callback(Oracle())
    trainer.train()
    assert len(seen) == 3
    assert max(seen) < 1e-5
    assert all("ema_cut_off" in entry for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "Embedding"),
    ],
)
def test_ema_refuses_what_is_no_product(extra, named):
    with pytest.raises(ConfigError, match=named):
        Teacher(student(lora(**extra)), "ema")
