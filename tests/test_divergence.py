"""The divergence engine against float64 oracles that are written from probabilities (tests/oracles.py)."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pgkd_peft.divergence import linear_jsd
from pgkd_peft.errors import ConfigError
from pgkd_peft.projection import largest

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


SHAPES = ((1, 1, 1), (3, 31, 3), (2, 123, 31), (5, 3, 7))  # N, V, D


OPTIONS = (  # clip in units of the median divergence of the rows
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"normalize": True},
    {"softcap": 2.0},
    {"softcap": 1.5, "logit_scale": 0.3, "temperature": 1.7},
    {"softcap": 2.0, "teacher_softcap": 5.0, "logit_scale": 2.0, "teacher_logit_scale": 0.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 400},
    {"clip": 0.2, "clip_mode": "entry"},
    {"clip": 0.2, "clip_mode": "entry", "normalize": True},
    {"clip": 1.1, "clip_mode": "token"},
    {"clip": 1.1, "clip_mode": "rescale", "temperature": 2.0},
    {"clip": 1.1, "clip_mode": "rescale", "normalize": True, "top_k": 4},
    {"clip": 0.3, "clip_mode": "entry", "softcap": 3.0, "top_k": 4},
)


# Relative to the largest number of the row. 16-bit heads: the gradient of the logits is rounded to 16 bits once.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 8e-3}


def case(n: int, v: int, d: int, dtype=torch.float64, seed: int = 0, width: int | None = None):
    """Student rows (with gradient), teacher rows near them, and a head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = normal(n, d)
    teacher = student + 0.5 * normal(n, d) if width is None else normal(n, width)
    weight = normal(v, d) * 3 / math.sqrt(d)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), weight.to(dtype)


def value_and_gradient(student, teacher, weight, **options):
    student = student.detach().requires_grad_()
    result = linear_jsd(student, teacher, weight, **options)
    result.divergence.sum().backward()
    return result.divergence.detach(), student.grad


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected.double()).abs()
    scale = expected.double().abs().amax(dim=-1, keepdim=True) if expected.dim() > 1 else expected.double().abs()
    bound = tolerance * scale + min(tolerance, 2e-6)
    assert (error <= bound).all(), f"error {error.max():.3g}, {(error / bound).max():.3g} times the bound"


@pytest.mark.parametrize("vocab", [1, 7, 31, 400, 5_000])
@pytest.mark.parametrize("count", [1, 5, 128])
def test_the_largest_are_found_in_two_steps(vocab, count):
    values = torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab))
    values[1] = -math.inf
    values[2, 1:] = -math.inf  # fewer than are asked for
    values[3, vocab // 2] = math.inf
    count = min(count, vocab)
    found = largest(values, count)
    assert found.shape == (9, count)
    assert (found >= 0).all()
    assert (found < vocab).all()
    expected = values.topk(count).values
    assert torch.equal(values.gather(1, found).sort(descending=True).values, expected)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(shape, beta):
    student, teacher, weight = case(*shape)
    value, gradient = oracles.linear_jsd(student, teacher, weight, beta)
    ours = value_and_gradient(student, teacher, weight, beta=beta)
    assert ours[0].dtype == torch.float64
    assert_near(ours[0], value, 1e-12)
    assert_near(ours[1], gradient, TOLERANCE[torch.float64])


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_options(options, beta):
    student, teacher, weight = case(6, 29, 5, seed=3)
    free = oracles.linear_jsd(student, teacher, weight, beta, **{**options, "clip": None})[0]
    if "clip" in options:
        options = {**options, "clip": options["clip"] * free.median().item()}
    value, gradient = oracles.linear_jsd(student, teacher, weight, beta, **options)
    ours = value_and_gradient(student, teacher, weight, beta=beta, **options)
    assert_near(ours[0], value, 1e-12)
    assert_near(ours[1], gradient, TOLERANCE[torch.float64])
    if "clip" in options:  # rows on both sides of the bound, or the option was not tested
        assert (value < free - 1e-9).any()
        if options["clip_mode"] != "entry":
            assert (value == free).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_dtypes_have_fp32_logits(dtype, beta):
    student, teacher, weight = case(4, 123, 31, dtype)
    bias = torch.linspace(-1, 1, 123).to(dtype)
    value, gradient = oracles.linear_jsd(student, teacher, weight, beta, bias=bias)
    ours = value_and_gradient(student, teacher, weight, head_bias=bias, beta=beta)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    assert_near(ours[0], value, 2e-5)  # 16-bit logits would be off by 1e-2
    assert_near(ours[1], gradient, max(TOLERANCE[dtype], 2 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("beta", BETAS)
def test_bf16_head_over_a_large_vocabulary(beta):
    """Close distributions with logits up to 40, as models have: rounded to bf16, the gradient would be off by 10 %."""
    student, teacher, weight = case(24, 5000, 64, seed=8)
    teacher = student.detach() + 0.1 * (teacher - student.detach())
    student, teacher, weight = (x.detach().bfloat16() for x in (student, teacher, 3 * weight))
    dense = student.double().requires_grad_()
    value = dense_divergence(dense @ weight.double().T, teacher.double() @ weight.double().T, beta)
    value.sum().backward()

    def errors(**options):
        ours = value_and_gradient(student, teacher, weight, beta=beta, **options)
        gradient = (ours[1] - dense.grad).norm(dim=-1) / dense.grad.norm(dim=-1)
        return ((ours[0] - value).abs() / (value + 1e-3)).max().item(), gradient.max().item()

    assert value.median() < 0.02
    worst_value, worst_gradient = errors()
    assert worst_value < 1e-3
    assert worst_gradient < 1e-2
    worst_value, worst_gradient = errors(teacher_head_weight=weight.clone())  # two heads: fp32 products
    assert worst_value < 1e-3
    assert worst_gradient < 1e-2


@pytest.mark.parametrize(("hidden", "head"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_hidden_states_and_head_of_different_dtype(hidden, head):
    student, teacher, weight = case(3, 31, 8, hidden)
    weight = weight.to(head)
    value, gradient = oracles.linear_jsd(student, teacher, weight, 0.5)
    ours = value_and_gradient(student, teacher, weight)
    assert_near(ours[0], value, 2e-5)
    assert_near(ours[1], gradient, max(2e-5, torch.finfo(hidden).eps))


# rescale counts its factor as a constant, which gradcheck cannot know; test_options has its gradient
@pytest.mark.parametrize("options", [o for o in ({}, *OPTIONS) if o.get("clip_mode") != "rescale"], ids=str)
def test_gradcheck(options):
    student, teacher, weight = case(3, 11, 4, seed=5)
    for beta in BETAS:
        assert torch.autograd.gradcheck(
            lambda hidden, beta=beta: linear_jsd(hidden, teacher, weight, beta=beta, **options).divergence, student
        )


def test_rescale_keeps_the_direction_and_token_drops_the_row():
    student, teacher, weight = case(6, 29, 5, seed=3)
    free, direction = value_and_gradient(student, teacher, weight)
    clip = free.median().item()
    above = free > clip
    assert above.any()
    for mode in ("rescale", "token"):
        value, gradient = value_and_gradient(student, teacher, weight, clip=clip, clip_mode=mode)
        assert torch.equal(value, free.clamp(max=clip))
        factor = (clip / free).clamp(max=1) if mode == "rescale" else (~above).double()
        torch.testing.assert_close(gradient, direction * factor.unsqueeze(-1))


def test_normalize_agrees_with_kl_near_equality():
    student, teacher, weight = case(4, 31, 5)
    teacher = student.detach() + 1e-3 * (teacher - student.detach())
    kl = linear_jsd(student, teacher, weight, beta=0.0).divergence
    for beta in BETAS:
        ours = linear_jsd(student, teacher, weight, beta=beta, normalize=True).divergence
        torch.testing.assert_close(ours, kl, rtol=5e-3, atol=0)


def test_top_k_is_a_lower_bound_that_grows_with_k():
    student, teacher, weight = case(5, 40, 6)
    for beta in BETAS:
        bounds = torch.stack(
            [linear_jsd(student, teacher, weight, beta=beta, top_k=k).divergence for k in (1, 2, 5, 20, 40)]
        )
        assert (bounds.diff(dim=0) >= -1e-12).all()
        assert torch.equal(bounds[-1], linear_jsd(student, teacher, weight, beta=beta).divergence)
        assert (bounds[0] < bounds[-1] - 1e-3).any()


def test_direction_on_asymmetric_inputs():
    """beta=0 is KL(teacher || student): the teacher is peaked, the student uniform over four tokens."""
    student, teacher, weight = (
        torch.zeros(1, 1),
        torch.ones(1, 1),
        torch.tensor([[math.log(97.0)], [0.0], [0.0], [0.0]]),
    )
    forward = 0.97 * math.log(0.97 / 0.25) + 0.03 * math.log(0.01 / 0.25)
    reverse = 0.25 * math.log(0.25 / 0.97) + 0.75 * math.log(0.25 / 0.01)
    assert linear_jsd(student, teacher, weight, beta=0.0).divergence.item() == pytest.approx(forward, rel=1e-5)
    assert linear_jsd(student, teacher, weight, beta=1.0).divergence.item() == pytest.approx(reverse, rel=1e-5)
    # near the ends, JSD goes to 0 as beta * KL(T||S) and (1 - beta) * KL(S||T)
    near = {
        beta: linear_jsd(student.double(), teacher.double(), weight.double(), beta=beta) for beta in (1e-4, 1 - 1e-4)
    }
    assert near[1e-4].divergence.item() == pytest.approx(1e-4 * forward, rel=1e-2)
    assert near[1 - 1e-4].divergence.item() == pytest.approx(1e-4 * reverse, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"softcap": 5.0}, {"normalize": True}], ids=str)
def test_zero_at_equality(dtype, options):
    student, _, weight = case(5, 123, 31, dtype)
    for beta in BETAS:
        value, gradient = value_and_gradient(student, student.detach().clone(), weight, beta=beta, **options)
        assert (value >= 0).all()
        assert value.max() < 1e-6
        assert gradient.abs().max() < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.integers(1, 40),
    beta=st.sampled_from(BETAS) | st.floats(1e-6, 1 - 1e-6),
    spread=st.sampled_from((1e-6, 1e-2, 1.0, 30.0)),
    top_k=st.none() | st.integers(1, 8),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
)
def test_never_negative_and_bounded(seed, vocab, beta, spread, top_k, dtype):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(3, 4, generator=generator)
    teacher = (student + spread * torch.randn(3, 4, generator=generator)).to(dtype)
    weight = torch.randn(vocab, 4, generator=generator).to(dtype)
    value, gradient = value_and_gradient(student.to(dtype), teacher, weight, beta=beta, top_k=top_k)
    assert (value >= 0).all()
    assert torch.isfinite(gradient).all()
    if 0 < beta < 1:  # the entropy of a coin of bias beta
        assert (value <= -beta * math.log(beta) - (1 - beta) * math.log1p(-beta) + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("extra", [{}, {"top_k": 2}, {"clip": 0.1, "clip_mode": "entry"}], ids=str)
def test_extreme_logits_are_finite(beta, dtype, extra):
    """One-hot teacher, one-hot student on another token, both, and tokens that are masked for both."""
    rows = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.01, 0.02], [3.0, -3.0]])
    student, teacher = rows, rows.flip(0)
    weight = torch.tensor([[100.0, 0.0], [0.0, 100.0], [-100.0, 3.0], [1.0, 1.0], [50.0, 50.0]])
    for masked in (0.0, -1e4, -math.inf):
        bias = torch.tensor([0.0, 0.0, 0.0, 0.0, masked])
        value, gradient = value_and_gradient(
            student.to(dtype), teacher.to(dtype), weight.to(dtype), head_bias=bias.to(dtype), beta=beta, **extra
        )
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()
        if not extra and dtype == torch.float32:
            expected = oracles.linear_jsd(student, teacher, weight, beta, bias=bias)
            assert_near(value, expected[0], 2e-5)
            assert (gradient - expected[1]).abs().max() < 2e-3  # of |W| = 100
    far = value_and_gradient(1e3 * student, 1e3 * teacher, weight, beta=beta, **extra)  # logits of 1e5
    assert torch.isfinite(torch.cat([far[0].unsqueeze(-1), far[1]], dim=-1)).all()


def test_a_token_that_only_one_side_masks():
    student, teacher, weight = case(3, 6, 4, torch.float32)
    bias = torch.zeros(6)
    bias[2] = -math.inf
    for beta in BETAS:
        for kwargs in (
            {"head_bias": bias, "teacher_head_weight": weight},
            {"teacher_head_weight": weight, "teacher_head_bias": bias},
        ):
            value, gradient = value_and_gradient(student, teacher, weight, beta=beta, **kwargs)
            assert torch.isfinite(value).all()
            assert torch.isfinite(gradient).all()
            assert (value > 0).all()


def test_statistics():
    student, teacher, weight = case(40, 12, 3, seed=1)
    options = {"temperature": 1.3, "softcap": 4.0, "logit_scale": 0.8}
    ids = torch.arange(40) % 12
    result = linear_jsd(student, teacher, weight, sampled_ids=ids, top_k=3, **options)
    side = {"scale": 0.8, "softcap": 4.0, "temperature": 1.3}
    s = [oracles.probabilities(z, **side) for z in oracles.logits(student, weight).tolist()]
    t = [oracles.probabilities(z, **side) for z in oracles.logits(teacher, weight).tolist()]
    agree = [float(a.index(max(a)) == b.index(max(b))) for a, b in zip(s, t)]
    assert 0 < sum(agree) < 40
    expected = {
        "student_entropy": [oracles.entropy(p) for p in s],
        "teacher_entropy": [oracles.entropy(p) for p in t],
        "top1_agreement": agree,
        "sampled_logprob": [math.log(p[i]) for p, i in zip(s, ids.tolist())],
    }
    for name, values in expected.items():
        ours = getattr(result, name)
        assert not ours.requires_grad
        torch.testing.assert_close(ours, torch.tensor(values, dtype=torch.float64), msg=name)
    assert linear_jsd(student, teacher, weight).sampled_logprob is None


def dense_divergence(zs: torch.Tensor, zt: torch.Tensor, beta: float) -> torch.Tensor:
    """From probabilities in float64, by autograd."""
    s, t = torch.softmax(zs, dim=-1), torch.softmax(zt, dim=-1).detach()
    m = beta * t + (1 - beta) * s
    if beta == 0:
        return (t * (t / s).log()).sum(-1)
    if beta == 1:
        return (s * (s / t).log()).sum(-1)
    return (beta * t * (t / m).log() + (1 - beta) * s * (s / m).log()).sum(-1)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_agrees_with_trl(beta, temperature):
    from trl.experimental.gkd import GKDTrainer
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher, weight = case(7, 123, 31, torch.float32)
    ours = value_and_gradient(student, teacher, weight, beta=beta, temperature=temperature)

    other = student.detach().clone().requires_grad_()
    loss = GKDTrainer.generalized_jsd_loss(
        (other @ weight.T)[None], (teacher @ weight.T)[None], beta=beta, temperature=temperature, reduction="sum"
    )
    loss.backward()
    assert_near(ours[0].sum(), loss.detach(), 1e-5)
    assert_near(ours[1], other.grad, 2e-5)

    other = student.detach().clone().requires_grad_()
    value, entropy = ChunkedDivergenceFunction.apply(other, weight, None, teacher, weight, None, beta, temperature)
    value.sum().backward()
    assert_near(ours[0], value.detach(), 2e-5)
    assert_near(ours[1], other.grad, 2e-5)
    result = linear_jsd(student, teacher, weight, beta=beta, temperature=temperature)
    assert_near(result.student_entropy, entropy, 1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 1.5}, ["beta", "1.5", "[0, 1]"]),
        ({"beta": math.nan}, ["beta", "nan"]),
        ({"temperature": 0.0}, ["temperature", "0.0"]),
        ({"clip": -1.0}, ["clip", "-1.0"]),
        ({"clip_mode": "hard"}, ["clip_mode", "hard", "entry, token, rescale"]),
        ({"top_k": 0}, ["top_k", "0"]),
        ({"softcap": -3.0}, ["softcap", "-3.0"]),
        ({"logit_scale": 0.0}, ["logit_scale", "0.0"]),
        ({"chunk_mib": 0}, ["chunk_mib", "0"]),
        ({"sampled_ids": torch.zeros(2, dtype=torch.long)}, ["sampled_ids", "(2,)", "(3,)"]),
        ({"head_bias": torch.zeros(4)}, ["head_bias", "(4,)", "(5,)"]),
        ({"teacher_head_weight": torch.zeros(5, 3)}, ["teacher_head_weight", "(5, 3)", "(V, 2)"]),
        ({"teacher_head_weight": torch.zeros(6, 2)}, ["5 tokens", "6", "vocabulary"]),
    ],
    ids=lambda o: next(iter(o)) if isinstance(o, dict) else "",
)
def test_mistakes_are_named(options, words):
    with pytest.raises(ConfigError) as error:
        linear_jsd(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(5, 2), **options)
    for word in words:
        assert word in str(error.value)


def test_rows_that_do_not_match():
    with pytest.raises(ConfigError, match=r"3 rows.*teacher_hidden 4"):
        linear_jsd(torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(5, 2))
    with pytest.raises(ConfigError, match=r"\(1, 3, 2\).*masked-in"):
        linear_jsd(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), torch.zeros(5, 2))
    with pytest.raises(ConfigError, match="its own"):
        linear_jsd(torch.zeros(3, 2), torch.zeros(3, 2), nn.Linear(2, 5), head_bias=torch.zeros(5))
