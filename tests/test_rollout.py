"""Rollouts against the model library's own generation and against plain loops."""

from __future__ import annotations

import pytest
import torch
from conftest import perturb
from tiny import byte_tokenizer, tiny_model
from transformers import DynamicCache

from pgkd_peft import rollout
from pgkd_peft.engines.merged import MergedCopy, RolloutEngine, choose_engine, merged_bytes
from pgkd_peft.errors import ConfigError
from pgkd_peft.model.cpu import guard_cpu_linear4bit
from pgkd_peft.model.frozen import FrozenCheck
from pgkd_peft.model.load import attach_lora, base_of, bnb_config, load_base
from pgkd_peft.rollout import budget_of, cache_bytes, generate, pick, window_generator
from pgkd_peft.rows import Row
from pgkd_peft.scoring import add_hidden_states_forward, score_teacher

PROMPTS = [[5, 40, 41], [5, 60, 61, 62, 63, 64, 65, 66], [5, 90], [5, 100, 101, 102, 103]]
SETTINGS = {"max_new_tokens": 12, "stop_ids": [4], "pad_id": 0}


def plain_greedy(model, prompt: list[int], stop: set[int], limit: int) -> list[int]:
    """Oracle: no cache, no batch, no padding."""
    out: list[int] = []
    with torch.no_grad():
        while len(out) < limit and not (out and out[-1] in stop):
            out.append(int(model(input_ids=torch.tensor([prompt + out])).logits[0, -1].argmax()))
    return out


@pytest.mark.parametrize("kind", ["llama", "qwen", "gemma", "gpt2"])
@pytest.mark.parametrize("budget", [None, 20])
def test_greedy_equals_an_unbatched_loop(kind, budget):
    model = tiny_model(kind)
    stop = plain_greedy(model, PROMPTS[0], set(), 12)[3]  # a token that really comes up, so that rows end early
    done = generate(model, PROMPTS, max_new_tokens=12, stop_ids=[stop], pad_id=0, token_budget=budget)
    expected = [plain_greedy(model, prompt, {stop}, 12) for prompt in PROMPTS]
    assert done == expected
    assert min(map(len, expected)) < 12


def test_sampling_does_not_depend_on_batching_and_follows_the_seed():
    model = tiny_model()
    one = generate(model, PROMPTS, **SETTINGS, temperature=1.0, seed=3)
    assert one == generate(model, PROMPTS, **SETTINGS, temperature=1.0, seed=3, token_budget=1)
    assert one != generate(model, PROMPTS, **SETTINGS, temperature=1.0, seed=4)


def test_copies_share_a_prompt_but_not_their_dice():
    model = tiny_model()
    done = generate(model, PROMPTS[:2], **SETTINGS, temperature=1.0, copies=5)
    assert len(done) == 10
    assert len({tuple(c) for c in done[:5]}) == 5
    greedy = generate(model, PROMPTS[:2], **SETTINGS, copies=3)
    assert greedy[:3] == [plain_greedy(model, PROMPTS[0], {4}, 12)] * 3


def test_picks_follow_the_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.3, 0.0]])).expand(40_000, -1)
    uniform = torch.rand(40_000, generator=window_generator(0, 1), dtype=torch.float64)
    shares = torch.bincount(pick(logits, 1.0, uniform), minlength=4) / 40_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.2, 0.3, 0.0]), atol=0.01, rtol=0)
    assert shares[3] == 0  # an impossible token is never picked, not even by 0.0 or by almost 1
    edges = torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)
    assert pick(logits[:2], 1.0, edges).tolist() == [0, 2]
    sharp = torch.bincount(pick(logits, 0.25, uniform), minlength=4) / 40_000
    assert sharp[0] > 0.8


@pytest.mark.parametrize("vocab", [3, 511, 512, 513, 5000])
def test_picks_are_those_of_the_whole_running_sum(vocab):
    """Oracle: the inverse of the cumulative distribution in float64, over the whole vocabulary."""
    generator = torch.Generator().manual_seed(vocab)
    logits = 5 * torch.randn(400, vocab, generator=generator)
    logits[:, vocab // 2 :: 3] = -torch.inf
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    cumulative = torch.softmax(logits.double() / 0.8, -1).cumsum(-1)
    expected = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    tokens = pick(logits, 0.8, uniform)
    assert (tokens == expected).float().mean() > 0.99  # but for numbers that fall on a boundary, rounded in float32
    assert torch.isfinite(logits.gather(1, tokens[:, None])).all()
    assert torch.equal(tokens, torch.cat([pick(logits[i : i + 1], 0.8, uniform[i : i + 1]) for i in range(400)]))


def test_a_pick_never_leaves_the_vocabulary():
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    one = torch.full((3, 700), -torch.inf)
    one[:, 513] = 3.0
    assert pick(one, 1.0, uniform).tolist() == [513] * 3
    assert pick(torch.full((3, 700), torch.nan), 1.0, uniform).max() < 700


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stops_that_are_read_every_eight_tokens_give_the_same_completions(temperature, monkeypatch):
    """As on a GPU: rows go on past their stop for some tokens, which are cut off; and some leave in between."""
    model = tiny_model()
    stop = plain_greedy(model, PROMPTS[0], set(), 12)[3]
    settings = {
        "max_new_tokens": 30,
        "stop_ids": [stop, 7, 30, 100],
        "pad_id": 0,
        "temperature": temperature,
        "copies": 2,
    }
    expected = generate(model, PROMPTS, **settings)
    assert len({len(c) for c in expected}) > 1
    for every in (3, 8, 100):
        monkeypatch.setattr(rollout, "READ_EVERY", {"cpu": every})
        assert generate(model, PROMPTS, **settings) == expected


def test_the_budget_is_what_the_cards_memory_holds(monkeypatch):
    model = tiny_model()
    assert budget_of(model) == rollout.TOKEN_BUDGET
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([PROMPTS[1]]), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(model) * len(PROMPTS[1]) == held
    weights = sum(p.nbytes for p in model.parameters())

    class Card:
        total_memory = weights + 10_000 * cache_bytes(model)

    class Elsewhere(torch.nn.Module):
        config, dtype = model.config, model.dtype

        def parameters(self, recurse=True):
            yield from (Weight(p) for p in model.parameters())

    class Weight:
        device = torch.device("cuda", 0)

        def __init__(self, tensor):
            self.numel, self.element_size = tensor.numel, tensor.element_size

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    assert budget_of(Elsewhere()) == 4_000


def test_generators_depend_on_the_place_in_the_run_alone():
    draws = {
        tuple(torch.rand(4, generator=window_generator(*path)).tolist())
        for path in [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)]
    }
    assert len(draws) == 4
    assert torch.equal(torch.rand(4, generator=window_generator(7, 3)), torch.rand(4, generator=window_generator(7, 3)))


def test_generation_leaves_the_model_as_it_was():
    model = attach_lora(tiny_model())
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    generate(model, PROMPTS, **SETTINGS)
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_merged_copy_is_the_student_and_never_touches_the_base(llama_path, quantization):
    student = perturb(attach_lora(load_base(llama_path, quantization=quantization, dtype=torch.float32)), 0.02)
    frozen = FrozenCheck(student)
    merged = MergedCopy(student, torch.float32)
    ids = torch.tensor(PROMPTS[1:2])
    for step in range(3):  # after several updates
        perturb(student, 0.02, seed=step)
        copy = merged.refresh()
        with torch.no_grad():
            torch.testing.assert_close(
                torch.log_softmax(copy(input_ids=ids).logits, -1),
                torch.log_softmax(student(input_ids=ids).logits, -1),
                # int8 rounds the activations too, which a dense copy does not
                atol=0.05 if quantization == "int8" else 2e-4,
                rtol=1e-3,
            )
        if quantization != "int8":
            assert generate(copy, PROMPTS, **SETTINGS) == generate(student, PROMPTS, **SETTINGS)
    frozen.verify("in the test")
    embedding = base_of(student).get_input_embeddings().weight
    assert copy.get_input_embeddings().weight.data_ptr() == embedding.data_ptr()
    assert copy.get_output_embeddings().weight.data_ptr() == base_of(student).get_output_embeddings().weight.data_ptr()
    assert not any("lora" in name for name, _ in copy.named_modules())


def test_auto_takes_merged_where_it_fits(monkeypatch, llama_path):
    student = attach_lora(load_base(llama_path))
    assert choose_engine(student, "auto")[0] == "merged"
    needed = merged_bytes(student)
    assert needed == 2 * sum(
        m.in_features * m.out_features for n, m in student.named_modules() if n.endswith("proj.base_layer")
    )
    monkeypatch.setattr("pgkd_peft.engines.merged.free_bytes", lambda device: 2 * needed)
    assert choose_engine(student, "auto")[0] == "adapter"
    assert choose_engine(student, "merged")[0] == "merged"


def test_dora_is_not_merged_and_says_why():
    from peft import LoraConfig

    student = attach_lora(tiny_model(), LoraConfig(use_dora=True, target_modules="all-linear"))
    assert choose_engine(student, "auto")[0] == "adapter"
    with pytest.raises(ConfigError, match="DoRA"):
        RolloutEngine(student, "merged", torch.float32)


def test_a_rollout_that_runs_out_of_memory_goes_on_in_halves(monkeypatch, caplog):
    whole, sizes = rollout._decode, []

    def small_machine(model, prompts, *args):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("no room")
        return whole(model, prompts, *args)

    model = tiny_model()
    expected = generate(model, PROMPTS, **SETTINGS)
    monkeypatch.setattr(rollout, "_decode", small_machine)
    assert generate(model, PROMPTS, **SETTINGS, token_budget=80) == expected
    assert sizes[0] == 4
    assert max(sizes[1:]) <= 2
    assert "half" in caplog.text


def test_model_helpers(llama_path):
    assert bnb_config("none", torch.bfloat16) is None
    assert guard_cpu_linear4bit(load_base(llama_path)) == 14
    assert len(byte_tokenizer().decode(generate(tiny_model(), PROMPTS[:1], **SETTINGS)[0])) > 0


@pytest.mark.parametrize("shared", [False, True])
def test_a_teacher_pass_that_runs_out_of_memory_goes_on_in_halves(shared, monkeypatch, caplog):
    model = tiny_model()
    add_hidden_states_forward(model)

    def rows():
        prompts = [PROMPTS[1]] * 5 if shared else [[5, 40 + i, 50, 60 + i] for i in range(5)]
        return [Row(prompt, prompt, [70 + i, 80, 90], True, 0) for i, prompt in enumerate(prompts)]

    expected, halved = rows(), rows()
    score_teacher(model, expected, pad_id=0)
    sizes, whole = [], type(model.model).forward

    def small_machine(self, input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("no room")
        return whole(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", small_machine)
    score_teacher(model, halved, pad_id=0)
    assert max(sizes) == 5
    assert "half" in caplog.text
    for a, b in zip(expected, halved):
        torch.testing.assert_close(a.teacher_hidden, b.teacher_hidden, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(type(model.model), "forward", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError):  # a single row that does not fit
        score_teacher(model, rows(), pad_id=0)
