"""What is read once equals what is read anew: against one plain forward a row, for every kind of cache."""

from __future__ import annotations

import logging
import random

import pytest
import torch
import transformers
from conftest import perturb
from tiny import ROWS, VOCAB, tiny_model

import pgkd_peft.prefix as prefix_module
import pgkd_peft.scoring as scoring
from pgkd_peft.errors import ConfigError, ModelError
from pgkd_peft.model import cpu
from pgkd_peft.model.caches import why_not_shared
from pgkd_peft.prefix import SHORTEST, Prefixes, TeacherMemory, share_read_once
from pgkd_peft.rollout import generate
from pgkd_peft.rows import Row
from pgkd_peft.scoring import add_hidden_states_forward, reads_packed_rows, score_teacher

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 4,
}
HEAD = {"head_dim": 16}
WINDOW = {**HEAD, "sliding_window": 16}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Every kind of cache: plain, windows shorter than the prefix, learned positions, recurrent and convolution states.
KINDS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", HEAD),
    "gemma2": ("Gemma2Config", {**WINDOW, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        {**WINDOW, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "mistral": ("MistralConfig", WINDOW),
    "mpt": ("MptConfig", {"d_model": 64, "n_layers": 2, "n_heads": 4}),  # counts places, also those that are padded
    "gpt_oss": (
        "GptOssConfig",
        {
            **WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **EXPERTS,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_key_value_heads": 4,
        },
    ),
    "qwen3_5": ("Qwen3_5TextConfig", {**HEAD, **LINEAR}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**HEAD, **LINEAR, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32},
    ),
    "olmo_hybrid": ("OlmoHybridConfig", LINEAR),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **MAMBA,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 64,
            "mamba_expand": 2,
        },
    ),
    "falcon_h1": ("FalconH1Config", {**HEAD, **MAMBA, "mamba_d_ssm": 128}),
    "bamba": ("BambaConfig", {**MAMBA, "attn_layer_indices": [1], "mamba_expand": 2}),
    "nemotron_h": (
        "NemotronHConfig",
        {
            **HEAD,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "mamba2": (
        "Mamba2Config",
        {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16, "expand": 2},
    ),
    "jamba": (
        "JambaConfig",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
            "mamba_dt_rank": 8,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {"attention_window_size": 16, "block_types": ["recurrent", "attention"], "lru_width": 64},
    ),
}
WITH_STATES = {
    *("qwen3_5", "qwen3_next", "olmo_hybrid", "lfm2", "granitemoehybrid", "falcon_h1", "bamba", "nemotron_h"),
    *("mamba2", "jamba", "recurrent_gemma"),
}
NOT_SHARED = {"mamba2", "jamba", "recurrent_gemma", "mpt"}


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    name, settings = KINDS[kind]
    if not hasattr(transformers, name):
        pytest.skip(f"this Transformers has no {name}")
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**COMMON, **settings})).eval()
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():  # so that every context matters
        for param in model.parameters():
            if param.dim() == 2:
                param.normal_(0, 0.02 if param is embedding and kind.startswith("gemma") else 0.15)
    add_hidden_states_forward(model)
    return model


def ids(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(6, 260), k=count)


SYSTEM, DOCUMENT = [2, *ids(60, 1)], [2, *ids(60, 1)[:40], *ids(40, 2)]


def some_rows() -> list[Row]:
    """Four rows behind one system prompt, three behind a document that begins like it (one of them twice), a row by
    itself, an anchor."""
    rows = [Row(ids(8 + i, i), SYSTEM + ids(9 + 3 * i, 10 + i), ids(4 + i, 20 + i), True, 0) for i in range(4)]
    rows += [Row(ids(8, i), DOCUMENT + ids(3 * i + 1, 30 + i), ids(6 - i, 40 + i), True, 0) for i in range(3)]
    rows.append(Row(rows[-1].prompt, rows[-1].teacher_prompt, ids(3, 50), True, 0))
    rows.append(Row(ids(4, 5), ids(33, 6), ids(6, 7), True, 0))
    rows.append(Row(ids(12, 8), ids(12, 8), ids(5, 9), False, 0))
    return rows


@torch.no_grad()
def plain_hidden(model, row: Row) -> torch.Tensor:
    """Oracle: one unpadded forward of one row, of the library's own class."""
    out = model(
        input_ids=torch.tensor([row.teacher_prompt + row.completion]), use_cache=False, output_hidden_states=True
    )
    return out.hidden_states[-1][0, len(row.teacher_prompt) - 1 : -1]


@torch.no_grad()
def plain_greedy(model, prompt: list[int], stop: set[int], limit: int) -> list[int]:
    out: list[int] = []
    while len(out) < limit and not (out and out[-1] in stop):
        out.append(int(model(input_ids=torch.tensor([prompt + out]), use_cache=False).logits[0, -1].argmax()))
    return out


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


class Counted:
    """Tokens that a model reads meanwhile, padding included."""

    def __init__(self, model):
        self.model, self.tokens = model.get_base_model() if hasattr(model, "get_base_model") else model, 0

    def __enter__(self):
        self.hook = self.model.get_input_embeddings().register_forward_hook(self._add)
        return self

    def _add(self, module, args, output):
        self.tokens += args[0].numel()

    def __exit__(self, *error):
        self.hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_with_and_without_the_cache(kind):
    model, rows = build(kind), some_rows()
    wanted = [plain_hidden(model, row) for row in rows]
    changed = Row([], [*SYSTEM[:57], 9, *rows[0].teacher_prompt[58:]], rows[0].completion, True, 0)
    assert off(plain_hidden(model, changed), wanted[0]) > 1e-4  # a token of the prefix matters
    assert (why_not_shared(model) is not None) == (kind in NOT_SHARED)
    memory = TeacherMemory([row.teacher_prompt for row in rows], epochs=3, whole=[False] * 9 + [True])
    line = memory.keep_within(0.1, model, 64)
    assert ("no prompts are shared" in line) == (kind in NOT_SHARED)
    read, bits = [], []
    for kept in (None, memory, memory):
        for row in rows:
            row.teacher_hidden = None
        with Counted(model) as count:
            score_teacher(model, rows, 0, memory=kept)
        read.append(count.tokens)
        bits.append([row.teacher_hidden for row in rows])
        assert max(off(row.teacher_hidden, want) for row, want in zip(rows, wanted)) < 1e-5
    assert all(map(torch.equal, bits[1], bits[2]))  # read or remembered: the same bits
    if kind not in NOT_SHARED:
        assert read[2] < 0.5 * sum(len(row.teacher_prompt) + len(row.completion) for row in rows)
        assert read[0] < sum(len(row.teacher_prompt) for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_share_beginnings_and_leave_when_they_are_done(kind, monkeypatch):
    model = build(kind)
    monkeypatch.setattr("pgkd_peft.rollout.WORTH_A_FORWARD", SHORTEST)
    prompts = [*(row.teacher_prompt for row in some_rows()[:7]), ids(3, 3), ids(9, 4)]
    stop = {plain_greedy(model, prompts[0], set(), 3)[-1], plain_greedy(model, prompts[5], set(), 2)[-1]}
    settings = {"max_new_tokens": 10, "stop_ids": sorted(stop), "pad_id": 0}
    if kind == "recurrent_gemma":
        with pytest.raises(ModelError, match="recurrent_gemma"):
            generate(model, prompts, **settings)
        return
    expected = [plain_greedy(model, prompt, stop, 10) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 1
    for some in (slice(None), slice(7, None), slice(8, None)):  # with beginnings; padded; one row
        with Counted(model) as count:
            found = generate(model, prompts[some], copies=2, **settings)
        assert found == [answer for answer in expected[some] for _ in range(2)]
        if some == slice(None) and kind not in NOT_SHARED:
            assert count.tokens < sum(map(len, prompts)) + 2 * 9 * 10 - 100


@pytest.mark.parametrize("kind", KINDS)
def test_only_attention_reads_rows_in_one_line(kind):
    model = build(kind)
    assert not reads_packed_rows(model)  # here it would make a mask
    model.config._attn_implementation = "flash_attention_2"
    assert reads_packed_rows(model) == (kind not in WITH_STATES)


def test_frequencies_that_depend_on_the_length_are_not_shared():
    model = tiny_model(
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64,
            "factor": 2.0,
        }
    )
    assert "length of the whole row" in why_not_shared(model)


def test_the_plan_against_a_plain_search():
    generator = random.Random(0)
    parts = [ids(40, 100 + i) for i in range(4)]
    prompts = [
        [t for _ in range(generator.randrange(1, 5)) for t in generator.choice(parts)]
        + ids(generator.randrange(1, 60), i)
        for i in range(60)
    ]
    prompts += [list(prompt) for prompt in prompts[:5]]
    plan = Prefixes(prompts)
    assert len(plan.nodes) > 10
    for prompt in prompts:
        others = [other for other in prompts if other is not prompt]
        shared = max(
            next((i for i, (a, b) in enumerate(zip(prompt[:-1], o[:-1])) if a != b), min(len(prompt), len(o)) - 1)
            for o in others
        )
        node = plan.find(prompt)
        end = node.end if node else 0
        assert shared - SHORTEST < end <= shared
        assert node is None or [t for part in node.chain() for t in part.ids] == prompt[:end]
    for node in plan.nodes:
        assert node.uses == sum(node in (found.chain() if (found := plan.find(p)) else []) for p in prompts)
        assert node.uses > 1
    assert plan.find(ids(50, 999)) is None
    assert share_read_once([[*SYSTEM, 7, 8, 9]] * 4) == pytest.approx(3 * 63 / (4 * 64))
    assert share_read_once([ids(60, i) for i in range(5)]) == 0.0


def test_on_a_cpu_rows_look_at_a_long_beginning_once(monkeypatch):
    model, rows = build("llama"), some_rows()[:4]
    score_teacher(model, rows, 0)
    before = [row.teacher_hidden for row in rows]
    looked = []
    once = cpu.after_beginning
    monkeypatch.setattr(cpu, "after_beginning", lambda *args: looked.append(len(args[0])) or once(*args))
    monkeypatch.setattr(cpu, "MOST_SCORES", 100)
    cpu.use_short_backward(model, torch.device("cpu"))
    score_teacher(model, rows, 0)
    assert max(looked) > 1
    for row, hidden in zip(rows, before):
        torch.testing.assert_close(row.teacher_hidden, hidden, rtol=1e-4, atol=1e-5)


def test_a_budget_too_small_keeps_less_and_computes_the_same(caplog):
    model, rows = build("llama"), some_rows()
    lines, bits, read = [], [], []
    for budget in (0.0, 60e-6, 1.0):
        memory = TeacherMemory([row.teacher_prompt for row in rows], epochs=2)
        lines.append(memory.keep_within(budget, model, 64))
        score_teacher(model, rows, 0, memory=memory)
        with Counted(model) as count:
            score_teacher(model, rows, 0, memory=memory)
        read.append(count.tokens)
        bits.append([row.teacher_hidden for row in rows])
        held = sum(
            t.numel() * 4 for kept in memory._kept.values() for layer in kept for t in (layer.keys, layer.values)
        )
        assert held <= budget * 2**30
        assert not memory._live
    assert all(torch.equal(a, b) for some in bits[1:] for a, b in zip(bits[0], some))
    assert read[0] > read[1] > read[2]
    assert "need not read 0% again" in lines[0]
    assert "hold 0 of " in lines[0]
    assert "with more it would be" in lines[1]
    assert "with more" not in lines[2]


def test_setting_of_the_budget(make_config):
    assert make_config().teacher_cache_gib is None
    assert make_config(teacher_cache_gib="0.5").teacher_cache_gib == 0.5
    for wrong in (-1, float("nan"), float("inf"), "much"):
        with pytest.raises(ConfigError, match="teacher_cache_gib"):
            make_config(teacher_cache_gib=wrong)


# ---- in a run ------------------------------------------------------------------------------------------------------


def run_rows() -> list[dict]:
    """Three questions with one long PI, two with one each, one without; with answers."""
    shared = "The office opens at nine, closes at five, and nobody answers letters on Fridays. " * 3
    rows = [
        {
            "messages": [{"role": "user", "content": f"{q}?"}, {"role": "assistant", "content": a}],
            "privileged_messages": pi,
        }
        for q, a, pi in [
            ("When does it open", "At nine.", shared),
            ("And close", "Five o'clock.", shared),
            ("Fridays", "No letters.", shared),
            ("Who is it", "Ada.", "It is Ada, who came in on Monday and went home again."),
            ("Where", "Here.", "The place is here, where we are now, behind the river."),
        ]
    ]
    return [*rows, ROWS[2]]


def train(make_trainer, **config) -> tuple[list[float], dict[str, torch.Tensor], object]:
    settings = {
        "privileged_placement": "system",
        "max_steps": 20,
        "per_device_train_batch_size": 3,
        "lmbda": 0.5,
        "learning_rate": 0.02,
        **config,
    }
    trainer = make_trainer(rows=run_rows(), config=settings)
    if trainer.teacher.which != "initial":  # the frozen copy is one of the adapters
        perturb(trainer.model)
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    adapter = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n and "default" in n}
    return losses, adapter, trainer


def test_a_run_with_and_without_the_cache(make_trainer, monkeypatch, tmp_path, caplog):
    """The same losses over 20 steps; the same bits whatever is kept."""
    with caplog.at_level(logging.INFO):
        with_cache, adapter, trainer = train(make_trainer, output_dir=str(tmp_path / "a"))
    assert "of the teacher" in caplog.text or "the teacher need not read" in caplog.text
    assert trainer.memory._kept
    assert trainer.memory._hidden
    nothing_kept, same, _ = train(make_trainer, output_dir=str(tmp_path / "b"), teacher_cache_gib=0.0)
    assert nothing_kept == with_cache
    assert all(torch.equal(adapter[name], same[name]) for name in adapter)
    for module in (prefix_module, scoring):
        monkeypatch.setattr(module, "why_not_shared", lambda model: "the test says so")
    without, other, _ = train(make_trainer, output_dir=str(tmp_path / "c"))
    assert without == pytest.approx(with_cache, rel=1e-4)
    assert max(with_cache) > 1e-3
    assert any(not torch.equal(adapter[name], other[name]) for name in adapter)  # it was off, as far as bits can tell


@pytest.mark.parametrize("teacher", ["disabled", "initial", "shared"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(make_trainer, tmp_path, teacher):
    settings = {"teacher_adapter": teacher, "max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    whole, adapter, trainer = train(make_trainer, output_dir=str(tmp_path / "run"), **settings)
    assert (trainer.memory is None) == (teacher == "shared")
    resumed, again, _ = train(
        make_trainer,
        output_dir=str(tmp_path / "run"),
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"),
        **settings,
    )
    assert resumed == whole
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)


def test_answers_that_stay_are_read_once(make_trainer, monkeypatch):
    trainer = make_trainer(
        rows=run_rows()[:4],
        config={"privileged_placement": "system", "lmbda": 0.0, "max_steps": 6},
    )
    read = []

    def counted(model, rows, *args, **kwargs):
        with Counted(model) as count:
            score_teacher(model, rows, *args, **kwargs)
        read.append(count.tokens)

    monkeypatch.setattr("pgkd_peft.trainer.score_teacher", counted)
    trainer.train()
    assert min(read[:2]) > 0
    assert read[2:] == [0, 0, 0, 0]  # from the second epoch no teacher pass at all


def test_seq_kd_writes_from_what_the_teacher_has_read(make_trainer):
    trainer = make_trainer(
        rows=run_rows(),
        config={"privileged_placement": "system", "lmbda": 0.0, "seq_kd": True, "num_train_epochs": 2, "max_steps": -1},
    )
    calls = []
    original = trainer.memory.read
    trainer.memory.read = lambda *args: calls.append(args) or original(*args)
    trainer.train()
    assert calls
    assert trainer.memory._kept


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("batches", [(6, 1), (2, 3)])
def test_rows_without_pi_train_on_nothing_with_the_memory(make_trainer, lmbda, batches):
    """AdamW makes full steps of the least rounding, so it must be none."""
    size, accumulation = batches
    rows = [{"messages": row["messages"]} for row in run_rows()]
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(rows=rows, config={"lmbda": lmbda, "max_steps": 6, **settings})
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert max(map(abs, losses)) < 1e-6


def test_anchors_are_read_as_the_student_reads_them(make_trainer):
    """Beside rows with PI: no cache stands between the two, and the divergence is rounding of float32."""
    trainer = make_trainer(rows=run_rows(), config={"lmbda": 0.0, "privileged_placement": "system"})
    rows = [Row(SYSTEM + ids(5 + i, i), SYSTEM + ids(5 + i, i), ids(4, i), False, 0) for i in range(4)]
    base = trainer.model
    with trainer.teacher.weights() as teacher, Counted(base) as count:
        score_teacher(teacher, rows, 0, memory=trainer.memory)
    assert count.tokens >= sum(len(row.teacher_prompt) for row in rows)
    packed = scoring.pack([row.prompt for row in rows], rows, 0, torch.device("cpu"))
    with torch.no_grad():
        student = base.eval()(**packed)
    assert torch.equal(student, torch.cat([row.teacher_hidden for row in rows]))
