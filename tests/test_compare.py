"""Two sets of weights on the same tokens: against plain loops over one unpadded forward a row, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from adapters import lora
from conftest import perturb
from peft import get_peft_model
from tiny import tiny_model

from pgkd_peft.compare import compare, read, read_as, token_nll
from pgkd_peft.errors import ModelError
from pgkd_peft.export.verify import Sequence, check_reading

# Lengths that differ, a prompt of one token, a completion of one, and two rows of one prompt.
ROWS = [
    ([7, 99, 30], [41, 8, 120, 255, 3]),
    ([11], [12, 13]),
    ([5, 6, 7, 8, 9, 10, 11], [77]),
    ([7, 99, 30], [200, 41, 17]),
]
TOKENS = [token for _, completion in ROWS for token in completion]


def log_probs(model, which: str) -> list[list[float]]:
    """Of every completion token of ROWS the whole distribution, a forward a row, in float64."""
    found = []
    for prompt, completion in ROWS:
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            if which == "disabled":
                with model.disable_adapter():
                    logits = model(ids).logits[0]
            else:
                logits = model(ids).logits[0]
        found += logits.double().log_softmax(-1)[len(prompt) - 1 : -1].tolist()
    return found


def student(kind: str, **settings):
    torch.manual_seed(0)
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "down_proj"]
    model = get_peft_model(tiny_model(kind), lora(**{"target_modules": targets, **settings}))
    return perturb(model, 0.3).double().eval()


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])  # gemma caps its logits
@pytest.mark.parametrize("at_once", [None, 1, 3])
def test_every_number_is_that_of_its_definition(kind, at_once):
    model = student(kind)
    p, q = log_probs(model, "disabled"), log_probs(model, "shared")
    base, moved = (read_as(model, which, ROWS, 0, at_once=at_once) for which in ("disabled", "shared"))
    found = compare(base, moved)
    kl = [sum(math.exp(a) * (a - b) for a, b in zip(x, y)) for x, y in zip(p, q)]
    back = [sum(math.exp(b) * (b - a) for a, b in zip(x, y)) for x, y in zip(p, q)]
    assert found.divergence.tolist() == pytest.approx(kl, rel=1e-6)
    assert compare(moved, base).divergence.tolist() == pytest.approx(back, rel=1e-6)
    assert compare(base, moved, beta=1.0).divergence.tolist() == pytest.approx(back, rel=1e-6)
    assert max(abs(a - b) for a, b in zip(kl, back)) > 1e-3  # the direction matters
    agree = [
        float(max(range(len(x)), key=x.__getitem__) == max(range(len(y)), key=y.__getitem__)) for x, y in zip(p, q)
    ]
    assert found.agreement.tolist() == agree
    for reading, oracle in ((base, p), (moved, q)):
        nll = token_nll(reading, [completion for _, completion in ROWS])
        assert [len(part) for part in nll] == [5, 2, 1, 3]
        assert torch.cat(nll).tolist() == pytest.approx([-row[t] for row, t in zip(oracle, TOKENS)], rel=1e-6)


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_head_of_the_adapter_is_asked_in_the_state_that_was_read(settings):
    model = student("llama", **settings)
    head = model.get_base_model().lm_head
    for name, parameter in head.named_parameters():
        if "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter) * 0.3
    p, q = log_probs(model, "disabled"), log_probs(model, "shared")
    found = compare(read_as(model, "disabled", ROWS, 0), read_as(model, "shared", ROWS, 0))
    kl = [sum(math.exp(a) * (a - b) for a, b in zip(x, y)) for x, y in zip(p, q)]
    assert min(kl) > 1e-3
    assert found.divergence.tolist() == pytest.approx(kl, rel=1e-6)


def test_the_merge_of_itself_is_nothing_and_what_is_read_of_other_weights_is_not_touched():
    model = student("llama").float()
    before = model(torch.tensor([[7, 99, 30]])).logits
    one = read(model, ROWS, 0)
    assert compare(one, read(model, ROWS, 0)).divergence.abs().max() < 1e-6
    assert compare(one.exact(), one.exact()).divergence.abs().max() < 1e-12
    assert compare(one.some([1, 3]), one.some([1, 3])).divergence.shape == (5,)
    assert torch.equal(model(torch.tensor([[7, 99, 30]])).logits, before)


def test_logits_that_are_not_the_heads_are_refused():
    model = student("llama")
    reading = read_as(model, "shared", ROWS, 0)
    sequence = Sequence(tuple(ROWS[0][0] + ROWS[0][1]), len(ROWS[0][0]), False)
    check_reading(model, sequence, reading)
    model.get_base_model().lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    with pytest.raises(ModelError, match="does something to its logits that is not known here"):
        check_reading(model, sequence, reading)
