"""What only a GPU can show. `make gpu` runs these; without a GPU they are skipped, and nothing of it is proven."""

from __future__ import annotations

import pytest
import torch
from conftest import perturb
from tiny import save_tiny, tiny_model

from pgkd_peft import divergence
from pgkd_peft.divergence import linear_jsd
from pgkd_peft.engines import decode
from pgkd_peft.engines.merged import MergedCopy
from pgkd_peft.model.load import attach_lora, load_base
from pgkd_peft.rollout import generate

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
PROMPTS = [[5, 40, 41], [5, 60, 61, 62, 63, 64, 65, 66], [5, 90], [5, 100, 101, 102, 103]]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", ["bf16", "fp16", "float32"])
def test_a_step_multiplies_in_its_precision(name, quantization, make_trainer, llama_path, monkeypatch):
    if name == "bf16" and not torch.cuda.is_bf16_supported():
        pytest.skip("no bf16 on this card")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[name]
    seen = []
    original = divergence.pair_of
    monkeypatch.setattr(divergence, "pair_of", lambda *args: seen.append(original(*args)) or seen[-1])
    precision = {"bf16": name == "bf16", "fp16": name == "fp16"}
    trainer = make_trainer(model=llama_path, config={**precision, "base_quantization": quantization})
    assert trainer.model.get_base_model().config._attn_implementation == "sdpa"
    trainer.train()
    assert seen
    assert {pair.grad_dtype for pair in seen} == {dtype}
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters() if p.requires_grad)
    assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"beta": 0.0}, {"clip": 0.1, "clip_mode": "entry"}], ids=str)
def test_the_fused_kernel_is_the_eager_one(dtype, options, monkeypatch):
    generator = torch.Generator("cuda").manual_seed(0)
    student, teacher = torch.randn(2, 37, 64, device="cuda", generator=generator).to(dtype)
    weight = (0.3 * torch.randn(5000, 64, device="cuda", generator=generator)).to(dtype)

    def run():
        hidden = student.clone().requires_grad_()
        result = linear_jsd(hidden, teacher, weight, sampled_ids=torch.arange(37, device="cuda"), **options)
        result.divergence.sum().backward()
        return result.divergence.detach(), result.student_entropy, result.sampled_logprob, hidden.grad

    fused = run()
    assert divergence._can_compile, "torch.compile failed"
    monkeypatch.setattr(divergence, "_can_compile", False)
    eager = run()
    tolerance = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for ours, theirs in zip(fused[:3], eager[:3]):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    assert (fused[3].float() - eager[3].float()).norm() <= tolerance * eager[3].float().norm()


@pytest.mark.parametrize("compiles", [True, False])
def test_memory_stays_in_bound(compiles, monkeypatch):
    monkeypatch.setattr(divergence, "_can_compile", compiles)
    n, vocab, width, chunk_mib = 2048, 151_936, 1024, 256
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16) * 0.1
    student, teacher = (torch.randn(n, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()
    linear_jsd(student[:8], teacher[:8], weight, chunk_mib=chunk_mib).divergence.sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_jsd(student, teacher, weight, chunk_mib=chunk_mib).divergence.sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2 * chunk_mib * 2**20 + n * width * 8, f"{peak / 2**20:.0f} MiB"


def test_the_loss_waits_for_nothing():
    student, teacher = (torch.randn(64, 32, device="cuda") for _ in range(2))
    weight, ids = torch.randn(300, 32, device="cuda"), torch.arange(64, device="cuda")

    def run():
        hidden = student.clone().requires_grad_()
        linear_jsd(hidden, teacher, weight, sampled_ids=ids).divergence.sum().backward()

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_micro_batch_waits_for_nothing(quantization, make_trainer, llama_path):
    """What tests/test_syncs.py counts on a CPU, with the copies to the device as well."""
    trainer = make_trainer(
        model=llama_path,
        config={
            "bf16": torch.cuda.is_bf16_supported(),
            "base_quantization": quantization,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 3,
        },
    )
    step, watched = trainer.training_step, []

    def strict(*args, **kwargs):
        if trainer.state.global_step > 0:  # the first step compiles
            torch.cuda.set_sync_debug_mode("error")
            watched.append(trainer.state.global_step)
        try:
            return step(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.training_step = strict
    trainer.train()
    assert set(watched) == {1, 2}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_merged_copy_writes_what_the_adapter_writes(quantization, tmp_path):
    base = load_base(save_tiny(tmp_path / "base"), quantization=quantization, dtype=torch.float32)
    assert base.device.type == "cuda"
    student = perturb(attach_lora(base), 0.02)
    copy = MergedCopy(student, torch.float32).refresh()
    settings = {"max_new_tokens": 20, "stop_ids": [4], "pad_id": 0}
    assert generate(copy, PROMPTS, **settings) == generate(student, PROMPTS, **settings)


def test_rollouts_do_not_depend_on_batching_and_stop_where_a_cpu_stops():
    model = tiny_model()
    settings = {"max_new_tokens": 20, "stop_ids": [7, 30, 100], "pad_id": 0, "temperature": 1.0}
    expected = generate(model, PROMPTS, **settings)
    model = model.cuda()
    done = generate(model, PROMPTS, **settings)
    assert done == generate(model, PROMPTS, **settings, token_budget=1)
    assert done == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2"])
def test_a_recorded_decode_step_writes_the_same_tokens(kind, temperature, monkeypatch, caplog):
    """The loop with graphs, recorded anew as rows leave, against the one whose cache grows."""
    model = tiny_model(kind).cuda()
    settings = {"max_new_tokens": 60, "stop_ids": list(range(4, 12)), "pad_id": 0, "temperature": temperature}
    graphs = []
    original = decode.recorded
    monkeypatch.setattr(decode, "recorded", lambda *args: graphs.append(original(*args)) or graphs[-1])
    done = generate(model, PROMPTS, copies=4, **settings)
    assert graphs, caplog.text
    monkeypatch.setattr(decode, "FIXED_ON", set())
    assert done == generate(model, PROMPTS, copies=4, **settings)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_both_engines_of_a_16_bit_model_are_recorded(quantization, tmp_path, monkeypatch):
    base = load_base(save_tiny(tmp_path / "base"), quantization=quantization, dtype=torch.bfloat16)
    student = perturb(attach_lora(base), 0.02)
    graphs = []
    original = decode.recorded
    monkeypatch.setattr(decode, "recorded", lambda *args: graphs.append(original(*args)) or graphs[-1])
    for model in (student, MergedCopy(student, torch.bfloat16).refresh()):
        generate(model, PROMPTS, max_new_tokens=40, stop_ids=[], pad_id=0)
        assert graphs.pop()
    assert not graphs


def test_an_nf4_run_trains_and_keeps_its_base(make_trainer, llama_path):
    trainer = make_trainer(
        model=llama_path, config={"base_quantization": "nf4", "bf16": True, "max_steps": 8, "learning_rate": 5e-3}
    )
    trainer.train()  # proves at its end that the base has not changed
    losses = [entry["divergence"] for entry in trainer.state.log_history if "divergence" in entry]
    assert losses[-1] < losses[0]
