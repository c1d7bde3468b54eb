"""How often the host would wait for a GPU, counted on a CPU; and tensors that would be made on the wrong device, found
on torch's `meta` device: its tensors refuse to mix with those of a CPU, and cannot be read."""

from __future__ import annotations

import pytest
import torch
from conftest import perturb
from hostreads import HostReads
from tiny import ROWS, tiny_model
from transformers import AttentionInterface, TrainerCallback

from pgkd_peft import divergence, projection, rollout, scoring
from pgkd_peft.divergence import linear_jsd
from pgkd_peft.engines import decode
from pgkd_peft.model.load import attach_lora
from pgkd_peft.rollout import generate, pick
from pgkd_peft.rows import Row, pack

STEP = 1  # reads of an optimizer step, however many micro-batches it has
SETTINGS = {"stop_ids": [], "pad_id": 0, "temperature": 1.0}
PROMPTS = [[5, 40, 41], [5, 60, 61, 62]]


def test_what_is_counted():
    """Each kind once, or the bounds below say nothing."""
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    for read in (
        lambda: values[0].item(),
        lambda: bool(values[0]),
        lambda: float(values.sum()),
        lambda: values.tolist(),
        lambda: values.cpu(),
        lambda: mask.nonzero(),
        lambda: values[mask],
        lambda: values.index_put((mask,), torch.tensor(1.0)),
        lambda: torch.equal(values, values),
        lambda: values.masked_select(mask),
    ):
        with HostReads() as reads:
            read()
        assert reads.count == 1, reads.places
    with HostReads() as reads:
        values[torch.tensor([0, 2])].where(mask[:2], 0.0).sum().topk(1)
    assert reads.count == 0


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"clip": 0.1, "clip_mode": "token"}], ids=str)
def test_the_loss_reads_nothing(options):
    student = torch.randn(6, 8, requires_grad=True)
    with HostReads() as reads:
        result = linear_jsd(student, torch.randn(6, 8), torch.randn(30, 8), sampled_ids=torch.arange(6), **options)
        result.divergence.sum().backward()
    assert reads.count == 0, reads.places


class Step(TrainerCallback):
    """Reads of everything between the first micro-batch and the log."""

    def __init__(self):
        self.counts = []

    def on_step_begin(self, *args, **kwargs):
        self.reads = HostReads()
        self.reads.__enter__()

    def on_step_end(self, *args, **kwargs):
        self.reads.__exit__(None, None, None)
        self.counts.append(self.reads)


@pytest.mark.parametrize("teacher", ["disabled", "shared"])
@pytest.mark.parametrize("bf16", [False, True])
def test_reads_of_a_step(bf16, teacher, make_trainer, monkeypatch):
    """Four micro-batches forward and backward, clipping, the optimizer's step: one look at the losses. Rollouts: their
    stops and their tokens. The teacher: none. The first step also probes how the model goes on from a prefix."""
    monkeypatch.setattr(rollout, "READ_EVERY", {"cpu": 8})  # as on a GPU
    written = []
    trainer = make_trainer(
        model=perturb(attach_lora(tiny_model())),
        rows=ROWS,
        config={
            "bf16": bf16,
            "lmbda": 1.0,
            "teacher_adapter": teacher,
            "max_new_tokens": 16,
            "per_device_train_batch_size": 2,  # of different length
            "gradient_accumulation_steps": 4,
            "max_steps": 3,
            "optim": "sgd",  # AdamW looks at its count of steps, which is on the host
        },
    )
    trainer.model.get_base_model().set_attn_implementation("sdpa")  # as on a GPU
    step, roll_out_and_score = Step(), trainer.roll_out_and_score
    trainer.add_callback(step)

    def counted(*args, **kwargs):
        with HostReads() as reads:
            rows = roll_out_and_score(*args, **kwargs)
        written.append(reads)
        return rows

    trainer.roll_out_and_score = counted
    trainer.train()
    assert len(step.counts) == len(written) == 3
    for reads in step.counts:
        assert reads.count == STEP, reads.places
    for reads in written[1:]:
        assert reads.count <= 16 // 8 + 1, reads.places
    assert trainer.model.get_base_model().config._attn_implementation == "sdpa"


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2"])
def test_reads_of_a_token(kind, fixed, monkeypatch):
    """Once in eight tokens and once at the end, whatever the number of rows and of layers."""
    monkeypatch.setattr(rollout, "READ_EVERY", {"cpu": 8})
    monkeypatch.setattr(decode, "FIXED_ON", {"cpu"} if fixed else set())
    model = tiny_model(kind)
    for new in (8, 32):
        with HostReads() as reads:
            generate(model, PROMPTS, max_new_tokens=new, **SETTINGS)
        assert reads.count <= new // 8, reads.places
    assert model.config._attn_implementation == "sdpa"  # put back


def test_masks_that_nobody_reads_change_nothing(monkeypatch):
    model = tiny_model()
    expected = generate(model, PROMPTS, max_new_tokens=20, **SETTINGS)
    monkeypatch.setattr(rollout, "READ_EVERY", {"cpu": 8})
    assert generate(model, PROMPTS, max_new_tokens=20, **SETTINGS) == expected


@pytest.mark.parametrize("padded", [False, True])
def test_rows_without_padding_come_without_a_mask(padded, monkeypatch):
    """The fast kernels of attention take none."""
    monkeypatch.setattr(rollout, "READ_EVERY", {"cpu": 8})
    masks = []
    original = AttentionInterface._global_mapping[rollout.MASK_UNREAD]

    def attention(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return original(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, rollout.MASK_UNREAD, attention)
    model = tiny_model()
    scoring.add_hidden_states_forward(model)
    rows = [Row([5, 6 + i], [5, 6 + i], [30 + i] * (3 + padded * i), False, 0) for i in range(3)]
    batch = pack([row.prompt for row in rows], rows, 0, torch.device("cpu"))
    with rollout.masks_unread(model), torch.no_grad(), HostReads() as reads:
        found = model(**batch)
    # Without a mask Transformers looks whether several texts stand in one row.
    assert reads.count == (0 if padded else 1), reads.places
    assert masks
    assert all((mask is not None) == padded for mask in masks)
    for row, part in zip(rows, found.split([len(row.completion) for row in rows])):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([row.prompt + row.completion]), output_hidden_states=True)
        torch.testing.assert_close(part, alone.hidden_states[-1][0, 1:-1], rtol=1e-4, atol=1e-4)


# ---- a device that is not the CPU ------------------------------------------------------------------------------------

META = torch.device("meta")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The paths of a GPU, on `meta`; the kernel without its compiler."""
    seen = []

    def eager(settings):
        seen.append(settings)
        return lambda zs, zt, ids: divergence._rows(zs.clone(), zt.clone(), ids, *settings)

    monkeypatch.setattr(divergence, "_compiled", eager)
    monkeypatch.setattr(divergence, "fuses", lambda device: device == META)
    monkeypatch.setattr(projection, "has_wide_products", lambda device: device == META)
    monkeypatch.setattr(rollout, "READ_EVERY", {"meta": 8})
    monkeypatch.setattr(decode, "FIXED_ON", {"meta"})
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiles", [True, False])
def test_every_tensor_of_the_loss_is_on_its_device_and_none_is_read(dtype, compiles, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(divergence, "_can_compile", compiles)
    student = torch.empty(12, 16, dtype=dtype, device=META, requires_grad=True)
    teacher, weight = (torch.empty(n, 16, dtype=dtype, device=META) for n in (12, 300))
    ids = torch.empty(12, dtype=torch.long, device=META)
    for options in ({}, {"top_k": 4}, {"softcap": 3.0, "clip": 1.0}, {"teacher_head_weight": weight.clone()}):
        result = linear_jsd(student, teacher, weight, sampled_ids=ids, chunk_mib=0.02, **options)
        result.divergence.sum().backward()
        assert result.divergence.device == student.grad.device == META
        assert (result.divergence.dtype, student.grad.dtype) == (torch.float32, dtype)
    assert bool(as_on_a_gpu) == compiles
    for *_, grad_dtype in as_on_a_gpu:
        assert grad_dtype == dtype  # products of 16-bit gradients, not of float32 ones


def test_a_tensor_on_the_wrong_device_would_be_seen(as_on_a_gpu):
    student, weight = torch.empty(12, 16, device=META), torch.empty(300, 16, device=META)
    with pytest.raises(RuntimeError, match="device"):
        linear_jsd(student, torch.empty(12, 16), weight)
    with pytest.raises(RuntimeError, match="device"):
        pick(torch.empty(3, 700, device=META), 0.7, torch.empty(3, dtype=torch.float64))


def test_every_tensor_of_a_rollout_is_on_its_device_and_the_first_read_is_that_of_the_stops(as_on_a_gpu):
    passes = []
    model = tiny_model().to(META)
    model.register_forward_hook(lambda *_: passes.append(None))
    with pytest.raises(NotImplementedError, match="meta") as error:
        generate(model, PROMPTS, max_new_tokens=20, **SETTINGS)
    lines = [str(entry.statement) for entry in error.traceback if entry.path.name == "rollout.py"]
    assert "finished.tolist()" in lines[-1]
    assert len(passes) == 8  # the prompts, and seven tokens
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("common", [0, 40])
def test_every_tensor_of_a_scoring_is_on_its_device_and_none_is_read(common, as_on_a_gpu, monkeypatch):
    """Rows of different length, read whole, and after a beginning that they share."""
    monkeypatch.setattr(scoring, "why_not_shared", lambda model: None)  # the probe reads once a model
    model = tiny_model().to(META)
    scoring.add_hidden_states_forward(model)
    beginning = [5, *range(60, 60 + common)]
    rows = [Row(p, [*beginning, *p, 8], [30 + i] * (3 + i), True, 0) for i, p in enumerate(PROMPTS)]
    rows += [Row(p, p, [40] * 4, False, 0) for p in PROMPTS]  # without PI
    with rollout.masks_unread(model):
        scoring.score_teacher(model, rows, 0)
    for row in rows:
        assert row.teacher_hidden.device == META
        assert row.teacher_hidden.shape == (len(row.completion), model.config.hidden_size)
