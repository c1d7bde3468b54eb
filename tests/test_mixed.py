"""Mixed rollouts: against a loop of plain forwards, one row at a time, without a cache."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from conftest import perturb
from tiny import tiny_model

from pgkd_peft.model.adapters import adapter_state
from pgkd_peft.model.head import Head
from pgkd_peft.model.load import attach_lora, base_of
from pgkd_peft.rollout import generate, generate_mixed, half_jsd
from pgkd_peft.scoring import add_hidden_states_forward

PROMPTS = [[10, 20, 30], [40, 50], [60, 61, 62, 63, 64, 65, 66]]
TEACHER_PROMPTS = [[10, 20, 30, 31, 32], [90, 91, 92, 40, 50], [60, 61, 62, 63, 64, 65, 66]]
STOPS = [4]
MIXES = 0.1  # nats at which both models write


@pytest.fixture(scope="module")
def model():
    made = perturb(attach_lora(tiny_model()), scale=0.3)
    add_hidden_states_forward(base_of(made))
    return made


def mixed(model, takeover, **settings):
    head = Head(model)
    return generate_mixed(
        lambda: adapter_state(model, "shared"),
        lambda: adapter_state(model, "disabled"),
        lambda hidden: hidden @ head.weight.T,
        PROMPTS,
        TEACHER_PROMPTS,
        takeover=takeover,
        max_new_tokens=8,
        stop_ids=STOPS,
        pad_id=0,
        **settings,
    )


def next_logits(model, which, ids):
    with adapter_state(model, which) as weights, torch.no_grad():
        return weights(input_ids=torch.tensor([ids])).logits[0, -1].double()


def plain(model, prompt, teacher_prompt, takeover):
    completion, by_teacher = [], []
    while len(completion) < 8 and not (completion and completion[-1] in STOPS):
        p = next_logits(model, "shared", prompt + completion).softmax(-1)
        q = next_logits(model, "disabled", teacher_prompt + completion).softmax(-1)
        m = (p + q) / 2
        jsd = 0.5 * (p * (p / m).log()).nansum() + 0.5 * (q * (q / m).log()).nansum()
        by_teacher.append(bool(jsd > takeover))
        completion.append(int((q if by_teacher[-1] else p).argmax()))
    return completion, by_teacher


@pytest.mark.parametrize("takeover", [0.05, MIXES, 0.2, 0.3])
def test_each_token_is_whose_the_divergence_says(model, takeover):
    found = mixed(model, takeover)
    expected = [plain(model, a, b, takeover) for a, b in zip(PROMPTS, TEACHER_PROMPTS)]
    assert [(row.completion, row.by_teacher) for row in found] == expected
    shares = [flag for row in found for flag in row.by_teacher]
    assert takeover != MIXES or 0 < sum(shares) < len(shares), shares


def test_the_ends_are_the_two_models_alone(model):
    settings = {"max_new_tokens": 8, "stop_ids": STOPS, "pad_id": 0}
    with adapter_state(model, "shared") as student:
        own = generate(student, PROMPTS, **settings)
    with adapter_state(model, "disabled") as base:
        better = generate(base, TEACHER_PROMPTS, **settings)
    assert [row.completion for row in mixed(model, 1.0)] == own
    assert [row.completion for row in mixed(model, -1.0)] == better
    assert own != better


def test_the_teacher_s_states_are_those_of_a_pass_afterwards(model):
    for row, prompt in zip(mixed(model, MIXES), TEACHER_PROMPTS):
        ids = torch.tensor([prompt + row.completion])
        wanted = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        with adapter_state(model, "disabled") as base, torch.no_grad():
            expected = base(input_ids=ids, hidden_index=wanted)
        torch.testing.assert_close(row.teacher_hidden, expected, rtol=1e-4, atol=1e-4)


def test_sampling_depends_on_the_generator_alone(model):
    runs = [
        [row.completion for row in mixed(model, MIXES, temperature=1.0, generator=torch.Generator().manual_seed(seed))]
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    one = [
        row.completion
        for row in mixed(model, MIXES, temperature=1.0, generator=torch.Generator().manual_seed(1), rows_at_once=1)
    ]
    assert one == runs[0]


def test_half_jsd_is_zero_for_equals_and_log_2_for_strangers():
    same = torch.randn(2, 5)
    assert half_jsd(same, same).abs().max() < 1e-6
    assert half_jsd(torch.tensor([[50.0, -50.0]]), torch.tensor([[-50.0, 50.0]])).item() == pytest.approx(math.log(2))


def test_modes_are_left_as_they_were(model):
    model.train()
    with contextlib.suppress(Exception):
        mixed(model, MIXES)
    assert model.training
    model.eval()


def test_a_run_with_takeover_has_the_teacher_s_states_without_a_pass(make_trainer, monkeypatch):
    from pgkd_peft import trainer as module

    trainer = make_trainer(config={"teacher_takeover": 0.01, "max_steps": 2, "rollout_engine": "adapter"})
    scored = []
    original = module.score_teacher
    monkeypatch.setattr(
        module,
        "score_teacher",
        lambda model, rows, pad, **kwargs: (scored.extend(rows), original(model, rows, pad, **kwargs)),
    )
    batch_of, whole = trainer.batch_of, []
    monkeypatch.setattr(
        trainer,
        "batch_of",
        lambda rows: (whole.extend(len(r.teacher_hidden) == len(r.kept) > 0 for r in rows), batch_of(rows))[1],
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert whole
    assert all(whole)
    shares = [log["taken_over"] for log in trainer.state.log_history if "taken_over" in log]
    assert any(0 < share < 1 for share in shares), shares
    assert scored == [] or not any(row.has_privileged for row in scored)
