"""The attention of a base that trains on a CPU: SDPA's numbers, by float32 products where sequences are short."""

import pytest
import torch
from tiny import save_tiny, tiny_model
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pgkd_peft import PrivilegedGKDConfig
from pgkd_peft.model import cpu as attention
from pgkd_peft.model.caches import ReadOnlyLayer
from pgkd_peft.model.cpu import CPU_ATTENTION, use_short_backward
from pgkd_peft.model.student import load_quantized


class Layer(nn.Module):
    num_key_value_groups = 3
    is_causal = True


def inputs(dtype, queries=7, keys=7, seed=0):
    """Query (2, 6, T, 8), key and value (2, 2, S, 8), and a gradient of the output (2, T, 6, 8)."""
    dice = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (2 * torch.randn(shape, generator=dice)).to(dtype)

    return draw(2, 6, queries, 8), draw(2, 2, keys, 8), draw(2, 2, keys, 8), draw(2, queries, 6, 8)


def padded(queries, keys):
    """Causal, the first row's two leftmost keys are padding (2, 1, T, S)."""
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None].repeat(2, 1, 1, 1)
    mask[0, :, :, :2] = False
    mask[0, :, :2, 0] = queries == keys  # a padding position looks at something
    return mask


def masks(queries, keys):
    boolean = padded(queries, keys)
    return {
        "none": None if queries == keys else boolean,
        "boolean": boolean,
        "to add": torch.zeros(boolean.shape).masked_fill(~boolean, -1e9),
        "of each head": torch.zeros(boolean.shape).masked_fill(~boolean, -1e9).repeat(1, 6, 1, 1),
    }


def run(function, tensors, mask, dtype, **kwargs):
    """Output and gradients of query, key, value, in float64."""
    query, key, value, out_grad = (tensor.to(dtype) for tensor in tensors)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    out, _ = function(Layer(), *leaves, mask, **kwargs)
    return [tensor.double() for tensor in (out, *torch.autograd.grad(out, leaves, out_grad))]


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("queries", [7, 3])
@pytest.mark.parametrize("kind", ["none", "boolean", "to add", "of each head"])
def test_outputs_and_gradients_are_those_of_sdpa(kind, queries, scaling, monkeypatch):
    mask = masks(queries, 7)[kind]
    tensors = inputs(torch.float32, queries)
    expected = run(sdpa_attention_forward, tensors, mask, torch.float64, scaling=scaling)
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)  # the products are what is tested
    for ours, theirs in zip(run(attention.attention, tensors, mask, torch.float32, scaling=scaling), expected):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_in_bf16_are_no_further_from_the_truth_than_sdpas(autocast):
    tensors = inputs(torch.bfloat16, 64, 64)
    mask = padded(64, 64)
    truth = run(sdpa_attention_forward, tensors, mask, torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = run(attention.attention, tensors, mask, torch.bfloat16)
        theirs = run(sdpa_attention_forward, tensors, mask, torch.bfloat16)
    for mine, its, right in zip(ours, theirs, truth):
        assert (mine - right).norm() <= 1.05 * (its - right).norm()


@pytest.mark.parametrize(
    "change",
    [
        {"query": lambda q: q[:, :, :1]},
        {"MOST_SCORES": 2 * 6 * 7 * 7 - 1},
        {"dropout": 0.5},
        {"softcap": 30.0},
        {"position_bias": torch.zeros(2, 6, 7, 7)},
        {"is_causal": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_all_else_is_left_to_sdpa(change, monkeypatch):
    query, key, value, _ = inputs(torch.float32)
    query.requires_grad_()
    query = change.get("query", lambda q: q)(query)
    if "MOST_SCORES" in change:
        monkeypatch.setattr(attention, "MOST_SCORES", change["MOST_SCORES"])
    seen = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *args, **kwargs: seen.append((args, kwargs)) or 1)
    kwargs = {name: v for name, v in change.items() if name not in ("query", "MOST_SCORES")}
    assert attention.attention(Layer(), query, key, value, None, **kwargs) == 1
    for name, v in kwargs.items():
        assert seen[0][1][name] is v


def begun_alike(dtype, length=40, queries=7):
    """Inputs as :func:`inputs`, of which the first `length` keys are one beginning; and a mask, (2, 1, T, P + T)."""
    query, key, value, _ = inputs(dtype, queries, queries)
    _, beginning, beginning_values, _ = inputs(dtype, queries, length, seed=1)
    layer = ReadOnlyLayer([(beginning[:1], beginning_values[:1])], [0, 0], length)
    mask = padded(queries, queries)
    mask = torch.cat([torch.ones(2, 1, queries, length, dtype=torch.bool), mask], -1)
    return (query, *layer.update(key, value)), mask


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_a_beginning_that_rows_share_is_looked_at_once(dtype, off, added, monkeypatch):
    (query, key, value), mask = begun_alike(dtype)
    given = torch.zeros(mask.shape).masked_fill(~mask, -1e9).to(dtype) if added else mask
    truth, _ = sdpa_attention_forward(Layer(), query.double(), key.double(), value.double(), mask)
    monkeypatch.setattr(attention, "MOST_SCORES", 100)
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)
    found, _ = attention.attention(Layer(), query, key, value, given)
    assert found.dtype == dtype
    assert (found - truth).norm() <= off * truth.norm()


@pytest.mark.parametrize(
    "case", ["a row does not see all of it", "numbers are added", "a gradient is wanted", "copied"]
)
def test_a_beginning_that_is_not_seen_alike_is_left_to_sdpa(case, monkeypatch):
    (query, key, value), mask = begun_alike(torch.float32)
    if case == "a row does not see all of it":
        mask[1, :, :, 3] = False
    if case == "numbers are added":
        mask = torch.linspace(-1, 0, mask.shape[-1]).expand(mask.shape)
    query.requires_grad_(case == "a gradient is wanted")
    key = key + 0 if case == "copied" else key
    monkeypatch.setattr(attention, "MOST_SCORES", 100)
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *args, **kwargs: 1)
    assert attention.attention(Layer(), query, key, value, mask) == 1


@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2"])  # (Gemma 2 has softcapping, hence eager attention)
def test_whole_models_answer_and_learn_as_before(kind):
    model = tiny_model(kind)
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found = []
    for _ in range(2):
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits[:, 4:]
        logits.logsumexp(-1).sum().backward()
        found.append([logits.detach(), *(param.grad.clone() for param in model.parameters())])
        use_short_backward(model, model.device)
    assert model.config._attn_implementation == CPU_ATTENTION
    for before, after in zip(*found):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def test_a_base_that_trains_on_a_cpu_has_it_unless_another_was_asked_for(tmp_path):
    path = save_tiny(tmp_path / "model")

    def loaded(teacher=False, **kwargs):
        config = PrivilegedGKDConfig(
            output_dir=str(tmp_path / "run"), base_quantization="none", use_cpu=True, model_init_kwargs=kwargs or None
        )
        return load_quantized(path, config, None, teacher=teacher)

    model = loaded()
    assert model.config._attn_implementation == CPU_ATTENTION
    model.save_pretrained(tmp_path / "saved")
    assert CPU_ATTENTION not in (tmp_path / "saved" / "config.json").read_text("utf-8")
    assert loaded(attn_implementation="sdpa").config._attn_implementation == "sdpa"
    assert loaded(attn_implementation="eager").config._attn_implementation == "eager"
    assert loaded(teacher=True).config._attn_implementation == "sdpa"
