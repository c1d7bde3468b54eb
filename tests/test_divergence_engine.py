"""The divergence engine's insides: chunks and memory, heads of every kind, and the fused kernel's path."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import oracles
import pytest
import torch
from test_divergence import assert_near, case, value_and_gradient
from torch import nn

from pgkd_peft import divergence
from pgkd_peft.divergence import linear_jsd
from pgkd_peft.errors import ConfigError


@pytest.mark.parametrize("kind", ["tensor", "own_head", "module"])
def test_chunks_do_not_change_the_numbers(kind, monkeypatch):
    student, teacher, weight = case(23, 57, 6)
    ids = torch.arange(23)
    head: object = weight
    extra = {"teacher_head_weight": weight * 1.5} if kind == "own_head" else {}
    if kind == "module":
        head = Wrapped(weight)
    whole = linear_jsd(student, teacher, head, sampled_ids=ids, **extra)
    (whole_grad,) = torch.autograd.grad((whole.divergence * ids).sum(), student)
    monkeypatch.setattr(divergence, "CACHE_BLOCK", 3 * 57)
    for chunk_mib in (1e-9, 0.004, 0.01, 1.0):
        part = linear_jsd(student, teacher, head, sampled_ids=ids, chunk_mib=chunk_mib, **extra)
        for name in ("divergence", "student_entropy", "teacher_entropy", "top1_agreement", "sampled_logprob"):
            torch.testing.assert_close(getattr(part, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
        (grad,) = torch.autograd.grad((part.divergence * ids).sum(), student)
        torch.testing.assert_close(grad, whole_grad, rtol=1e-12, atol=1e-12)


def test_backward_scales_rows_and_may_run_twice():
    student, teacher, weight = case(5, 31, 4)
    _, ones = value_and_gradient(student, teacher, weight)
    weights = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    result = linear_jsd(student, teacher, weight)
    for _ in range(2):
        (grad,) = torch.autograd.grad((result.divergence * weights).sum(), student, retain_graph=True)
        torch.testing.assert_close(grad, ones * weights.unsqueeze(-1))


def test_gradient_reaches_only_the_student():
    student, teacher, weight = case(5, 31, 4)
    teacher.requires_grad_()
    own = weight.clone().requires_grad_()
    linear_jsd(student, teacher, weight, teacher_head_weight=own).divergence.sum().backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert own.grad is None
    with torch.no_grad():
        assert not linear_jsd(student, teacher, weight).divergence.requires_grad
    assert not linear_jsd(student.detach(), teacher, weight).divergence.requires_grad


@pytest.mark.parametrize("head", ["tensor", "module"])
def test_no_positions(head):
    student, teacher, weight = case(3, 31, 4, torch.float32)
    empty = student[:0]
    head = {"tensor": weight, "module": Wrapped(weight)}[head]
    result = linear_jsd(empty, teacher[:0], head, sampled_ids=torch.zeros(0, dtype=torch.long))
    for values in (result.divergence, result.student_entropy, result.top1_agreement, result.sampled_logprob):
        assert values.shape == (0,)
        assert values.dtype == torch.float32
    result.divergence.sum().backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_peak_memory_stays_in_bound(dtype):
    n, v, d, chunk_mib = 768, 151_936, 16, 32  # large beside what an allocator keeps for itself
    student, teacher, weight = case(n, v, d, dtype)
    value_and_gradient(student[:2], teacher[:2], weight, chunk_mib=chunk_mib)
    gc.collect()

    def resident(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split(field + ":")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = resident("VmRSS")
    value_and_gradient(student, teacher, weight, chunk_mib=chunk_mib)
    peak = resident("VmHWM") - before
    bound = 2 * chunk_mib * 2**20 + n * d * 8
    assert bound < n * v * 4 / 6  # one side's full logits would not fit
    assert peak < bound, f"{peak / 2**20:.1f} MiB"


class Wrapped(nn.Module):
    """A frozen head that is only known by its forward."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.hidden_weight = nn.Parameter(weight.clone(), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.hidden_weight.T


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_teacher_with_its_own_wider_head(beta):
    student, teacher, weight = case(4, 23, 5, width=9)
    own = torch.randn(23, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    bias, own_bias = torch.linspace(-1, 2, 23).double(), torch.linspace(1, 0, 23).double()
    value, gradient = oracles.linear_jsd(
        student, teacher, weight, beta, bias=bias, teacher_weight=own, teacher_bias=own_bias
    )
    ours = value_and_gradient(
        student, teacher, weight, head_bias=bias, teacher_head_weight=own, teacher_head_bias=own_bias, beta=beta
    )
    assert_near(ours[0], value, 1e-12)
    assert_near(ours[1], gradient, 1e-8)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "temperature": 2.0}, {"top_k": 3}], ids=str)
def test_frozen_module_equals_its_weight(options):
    student, teacher, weight = case(7, 23, 5)
    expected = value_and_gradient(student, teacher, weight, **options)
    linear = nn.Linear(5, 23, bias=False).requires_grad_(False).double()
    linear.weight.data.copy_(weight)
    for head in (Wrapped(weight), linear):
        ours = value_and_gradient(student, teacher, head, **options)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["tensor", "bias", "linear", "module"])
def test_a_head_that_trains_is_refused(kind):
    student, teacher, weight = case(3, 23, 6)
    bias = torch.zeros(23, dtype=torch.float64)
    head = {
        "tensor": lambda: (weight.clone().requires_grad_(), {}),
        "bias": lambda: (weight, {"head_bias": bias.requires_grad_()}),
        "linear": lambda: (nn.Linear(6, 23).double(), {}),
        "module": lambda: (Wrapped(weight).requires_grad_(), {}),
    }[kind]()
    with pytest.raises(ConfigError, match=r"head_weight trains.*head frozen"):
        linear_jsd(student, teacher, head[0], **head[1])
    with torch.no_grad():  # nothing is lost where there is no gradient
        assert torch.isfinite(linear_jsd(student, teacher, head[0], **head[1]).divergence).all()
    with pytest.raises(ConfigError, match="function; pass a tensor"):
        linear_jsd(student, teacher, lambda hidden: hidden @ weight.T)


def test_quantized_head():
    bnb = pytest.importorskip("bitsandbytes")
    student, teacher, weight = case(5, 48, 64, torch.bfloat16)
    head = bnb.nn.Linear4bit(64, 48, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    head.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    head = head.to("cpu")
    head.support_avx512bf16_for_cpu = False
    dense = bnb.functional.dequantize_4bit(head.weight.data, head.weight.quant_state)
    assert (dense - weight).abs().max() > 0.05
    value, gradient = oracles.linear_jsd(student, teacher, dense, 0.5)
    ours = value_and_gradient(student, teacher, head)
    assert_near(ours[0], value, 2e-2)  # the module itself returns bf16 logits
    assert_near(ours[1], gradient, 3e-2)


SQUASH = divergence._Squash(None, 1.0, 1.0)


FUSED_CASES = (
    (SQUASH, divergence._Options(0.5, True, None, "rescale", None), torch.float32),
    (divergence._Squash(3.0, 0.5, 2.0), divergence._Options(0.0, False, 0.1, "token", None), torch.bfloat16),
    (SQUASH, divergence._Options(1.0, False, 0.1, "rescale", None), torch.float16),
    (SQUASH, divergence._Options(0.3, False, 0.1, "entry", 4), torch.float32),
    (SQUASH, divergence._Options(0.3, False, None, "rescale", None), None),
)


@pytest.mark.parametrize(("squash", "options", "grad_dtype"), FUSED_CASES)
def test_the_elementwise_part_compiles_into_one_graph(squash, options, grad_dtype):
    """What runs on CUDA is torch.compile of the eager function; here its graph is traced and run without codegen."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    settings = squash, squash, options, grad_dtype
    compiled = divergence._compiled(settings, backend=count)
    generator = torch.Generator().manual_seed(0)
    for rows in (3, 5, 8):
        zs, zt = torch.randn(2, rows, 29, generator=generator)
        before = zs.clone()
        ids = torch.arange(rows)
        for tensor in (zs, zt, ids):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        stats, grad = compiled(zs, zt, ids)
        assert torch.equal(zs, before)
        torch.testing.assert_close((stats, grad), divergence._rows(zs, zt, ids, *settings))
    assert len(graphs) == 1  # whole, and the same for every number of rows


@pytest.mark.parametrize("change", [{}, {"top_k": 5}, {"clip": 0.5, "clip_mode": "entry"}], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_kernel_that_inductor_makes_is_the_eager_one(beta, change, monkeypatch):
    """Compiled for the CPU, by g++: the same lowering as on CUDA, up to the last step. Whole calls, on both paths."""
    student, teacher, weight = case(7, 123, 31, torch.float32)
    ids = torch.arange(7)
    options = {"beta": beta, "sampled_ids": ids, "temperature": 1.3, **change}

    def run():
        hidden = student.detach().requires_grad_()
        result = linear_jsd(hidden, teacher, weight, **options)
        result.divergence.sum().backward()
        names = ("divergence", "student_entropy", "teacher_entropy", "top1_agreement", "sampled_logprob")
        return [*(getattr(result, name).detach() for name in names), hidden.grad]

    eager, calls = run(), []
    original = divergence._fused

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(divergence, "_fused", counted)
    monkeypatch.setattr(divergence, "fuses", lambda device: True)
    torch.testing.assert_close(run(), eager, rtol=2e-5, atol=2e-6)
    assert calls
    assert divergence._can_compile


def test_graphs_of_many_settings_do_not_crowd_each_other_out():
    """torch.compile keeps eight graphs of a function, then runs it unfused: each choice has a function of its own."""
    torch._dynamo.reset()
    made = []
    for i in range(12):
        options = divergence._Options(0.05 * (i + 1), False, None, "rescale", None)
        compiled = divergence._compiled(
            (SQUASH, SQUASH, options, torch.float32), backend=lambda g, _: made.append(g) or g
        )
        zs, zt = torch.randn(2, 3, 11)
        stats, _ = compiled(zs, zt, None)
        torch.testing.assert_close(stats, divergence._rows(zs, zt, None, SQUASH, SQUASH, options, torch.float32)[0])
    assert len(made) == 12


def test_without_a_compiler_it_runs_unfused(monkeypatch, caplog):
    """One warning, the same numbers; what is no compiler's error is not taken for one."""
    student, teacher, weight = case(9, 31, 4, torch.float32)
    expected = value_and_gradient(student, teacher, weight)
    tries = []

    def broken(error):
        def compiled(settings):
            tries.append(settings)
            raise error

        return compiled

    monkeypatch.setattr(divergence, "_can_compile", True)
    monkeypatch.setattr(divergence, "fuses", lambda device: True)
    monkeypatch.setattr(divergence, "_compiled", broken(RuntimeError("device-side assert triggered")))
    with pytest.raises(RuntimeError, match="device-side assert"):
        value_and_gradient(student, teacher, weight)
    tries.clear()
    missing = torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no compiler here"), None)
    monkeypatch.setattr(divergence, "_compiled", broken(missing))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(value_and_gradient(student, teacher, weight), expected)
    assert len(tries) == 1
    assert caplog.text.count("no compiler here") == 1
