"""Decode loops into a cache of fixed size write what those into a growing one write; and the recording of their step,
with a graph that is none."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny import tiny_model

from pgkd_peft.engines import decode
from pgkd_peft.rollout import generate

PROMPTS = [[5, 40, 41], [5, 60, 61, 62, 63, 64, 65, 66], [5, 90], [5, 40, 41, 103]]
SETTINGS = {"max_new_tokens": 40, "stop_ids": list(range(4, 12)), "pad_id": 0, "copies": 4}


@pytest.fixture
def fixed(monkeypatch):
    """Switches the loops of the CPU to caches of fixed size; the list holds those that were made."""
    made = []

    class Seen(decode.Fixed):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    def switch():
        monkeypatch.setattr(decode, "Fixed", Seen)
        monkeypatch.setattr(decode, "FIXED_ON", {"cpu"})
        return made

    return switch


@pytest.mark.parametrize("stride", [16, 256])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2"])
def test_the_same_tokens(kind, temperature, stride, fixed, monkeypatch):
    """Rows of different length, with copies, some of which stop early, so that the others go on in a smaller batch;
    within one stride, and over several."""
    monkeypatch.setattr(decode, "STRIDE", stride)
    model = tiny_model(kind)
    expected = generate(model, PROMPTS, temperature=temperature, seed=3, **SETTINGS)
    made = fixed()
    assert generate(model, PROMPTS, temperature=temperature, seed=3, **SETTINGS) == expected
    assert made
    if temperature:
        lengths = sorted(map(len, expected))
        assert lengths[0] < lengths[-1]
        assert len(made[0].mask_RS) < len(expected)  # rows have left


@pytest.mark.parametrize("change", ["window", "eager", "few", "class"])
def test_what_is_not_known_to_fit_grows(change, fixed, monkeypatch):
    model = tiny_model("gemma" if change == "window" else "llama")
    settings = SETTINGS
    if change == "eager":
        model.set_attn_implementation("eager")
    elif change == "few":
        settings = {**SETTINGS, "max_new_tokens": decode.LEAST_TOKENS - 1}
    elif change == "class":
        monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    made = fixed()
    assert generate(model, PROMPTS, **settings)
    assert not made


def graph_that_is_none(step, rehearse):
    """Rehearses as the real one does, and gives every result in the same tensor."""
    for _ in range(decode.WARM_UP):
        rehearse()
    place = []

    def replay():
        result = step()
        if not place:
            place.append(torch.empty_like(result))
        return place[0].copy_(result)

    return replay


def test_rehearsals_leave_no_trace(fixed, monkeypatch):
    monkeypatch.setattr(decode, "STRIDE", 3)
    model = tiny_model()
    expected = generate(model, PROMPTS, temperature=1.0, seed=3, **SETTINGS)
    made, recordings = fixed(), []

    def recorded(reader):
        recordings.append((len(reader.mask_RS), reader.length))
        return graph_that_is_none(reader._step, reader._rehearse)

    monkeypatch.setattr(decode.Fixed, "_recorded", recorded)
    assert generate(model, PROMPTS, temperature=1.0, seed=3, **SETTINGS) == expected
    assert made
    assert len({rows for rows, _ in recordings}) > 1  # anew when rows have left
    assert len({length for rows, length in recordings if rows == recordings[0][0]}) > 1  # and for every stride


@pytest.mark.parametrize("memory", [True, False])
def test_a_step_that_cannot_be_recorded_runs_as_it_is(memory, fixed, monkeypatch, caplog):
    """Except for want of memory, which the loop answers with fewer rows."""
    model = tiny_model()
    made = fixed()
    generate(model, PROMPTS, **SETTINGS)
    reader = made[0]
    reader.length, reader.mask_RS = 1, torch.empty(4, 40, device="meta")  # as on another device than the CPU

    def fails(*args):
        raise (torch.OutOfMemoryError if memory else RuntimeError)("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode, "recorded", fails)
    monkeypatch.setattr(decode, "RECORDED_ON", {"meta"})
    if memory:
        with pytest.raises(torch.OutOfMemoryError):
            reader._recorded()
        return
    with caplog.at_level(logging.WARNING):
        assert reader._recorded() is None
    assert "LlamaForCausalLM cannot be recorded" in caplog.text
    assert "not permitted" in caplog.text
