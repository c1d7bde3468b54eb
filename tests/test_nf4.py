"""The 4-bit base on CPU: forward, gradients and weights are those of a dense model of the dequantized weights.

bitsandbytes 0.50 repacks a 4-bit weight in place at the first evaluation on a CPU with AVX512-BF16; a forward with
gradient then loses the input's gradient in silence. These tests fail without the guard on such a CPU.
"""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from conftest import perturb
from tiny import ROWS, byte_tokenizer, save_tiny

from pgkd_peft import PrivilegedGKDConfig, PrivilegedSelfDistillTrainer
from pgkd_peft.model.cpu import guard_cpu_linear4bit
from pgkd_peft.model.load import attach_lora, base_of, dequantized_weight, load_base

TOLERANCE = 0.02  # bfloat16 arithmetic, relative to the norm


def close(ours: torch.Tensor, dense: torch.Tensor) -> None:
    ours, dense = ours.float(), dense.float()
    assert (ours - dense).norm() <= TOLERANCE * dense.norm()
    assert dense.norm() > 0


def densify(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with plain linear layers that hold the dequantized weights."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                dense = torch.nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                dense.weight.data = dequantized_weight(child)
                setattr(module, name, dense.to(torch.bfloat16).requires_grad_(False))
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_layer(dtype):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 192, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.load_state_dict({"weight": torch.randn(192, 128) * 0.1})
    layer.to("cpu").requires_grad_(False)
    layer.weight = layer.weight.to("cpu") if layer.weight.quant_state is not None else layer.weight._quantize("cpu")
    holder = torch.nn.Sequential(layer)
    assert guard_cpu_linear4bit(holder) == 1
    weight = dequantized_weight(layer)
    for _ in range(2):
        x = torch.randn(5, 7, 128, dtype=dtype, requires_grad=True)
        out = layer.train()(x)
        out.float().pow(2).sum().backward()
        y = x.detach().clone().requires_grad_(True)
        dense = y @ weight.to(dtype).T
        dense.float().pow(2).sum().backward()
        close(out, dense)
        close(x.grad, y.grad)
        with torch.no_grad():
            layer.eval()(x.detach())  # the trap
    assert torch.equal(weight, dequantized_weight(layer))


def test_whole_model_before_and_after_an_evaluation(tmp_path):
    path = save_tiny(tmp_path)
    ours = perturb(attach_lora(load_base(path)), 0.05)
    dense = perturb(attach_lora(densify(load_base(path))), 0.05)
    for (name, param), (other, twin) in zip(ours.named_parameters(), dense.named_parameters()):
        if "lora_A" in name:
            assert name == other
            twin.data.copy_(param.data)
    ids = torch.randint(10, 250, (2, 20), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        grads = []
        for model in (ours, dense):
            model.train().zero_grad()
            embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
            logits = model(inputs_embeds=embeds).logits
            logits.float().pow(2).mean().backward()
            lora = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            grads.append((logits, embeds.grad, lora))
        close(grads[0][0], grads[1][0])
        close(grads[0][1], grads[1][1])
        assert len(grads[0][2]) == 28
        for name in grads[0][2]:
            close(grads[0][2][name], grads[1][2][name])
        with torch.no_grad():
            ours.eval()(input_ids=ids)  # the trap: an eval-mode forward without gradient


def test_a_model_that_was_already_repacked_is_refused(tmp_path, monkeypatch):
    from pgkd_peft.errors import ModelError

    model = load_base(save_tiny(tmp_path))
    layer = next(m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match="repacked"):
        guard_cpu_linear4bit(model)


def test_base_weights_are_the_same_after_a_run(tmp_path):
    path = save_tiny(tmp_path / "model")
    config = PrivilegedGKDConfig(
        output_dir=str(tmp_path / "run"), lmbda=0.5, max_new_tokens=6, max_steps=4, report_to="none", save_strategy="no"
    )
    trainer = PrivilegedSelfDistillTrainer(model=path, args=config, train_dataset=ROWS)

    def weights():
        base = base_of(trainer.model)
        return {n: dequantized_weight(m) for n, m in base.named_modules() if isinstance(m, bnb.nn.Linear4bit)}

    before = weights()
    assert len(before) == 14
    trainer.train()
    after = weights()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(bool(p.any()) for n, p in trainer.model.named_parameters() if "lora_B" in n)  # something was trained


def test_fp16_with_loss_scaling_trains_as_fp32_does(make_trainer, llama_path):
    """A T4's path: NF4 base with fp16 compute, fp16 autocast, gradient scaling; here on the CPU's autocast."""
    logs = {}
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        base = load_base(llama_path, dtype=dtype)
        config = {"lmbda": 0.0, "max_steps": 2, "logging_steps": 1, "fp16": name == "fp16"}
        trainer = make_trainer(model=base, tokenizer=byte_tokenizer(), config=config)
        if name == "fp16":  # accelerate switches both on for a GPU alone
            trainer.accelerator.native_amp = True
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
        perturb(trainer.model, 0.02)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        logs[name] = [e for e in trainer.state.log_history if "divergence" in e]
        assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters() if n in before)
        if name == "fp16":
            assert trainer.accelerator.scaler.get_scale() == 2**16  # no step was skipped for an overflow
    for fp32, fp16 in zip(logs["fp32"], logs["fp16"], strict=True):
        assert fp16["divergence"] == pytest.approx(fp32["divergence"], rel=0.05)
        assert fp16["grad_norm"] == pytest.approx(fp32["grad_norm"], rel=0.05)
        assert fp32["grad_norm"] > 0
