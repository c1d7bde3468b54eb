"""The weights that must not change are proven not to have changed."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from test_teacher import logits, lora, run, student
from tiny import save_tiny, tiny_model
from transformers import TrainerCallback

from pgkd_peft.errors import FrozenBaseError
from pgkd_peft.model.adapters import INITIAL, adapter_tensors
from pgkd_peft.model.frozen import FrozenCheck
from pgkd_peft.model.load import load_base
from pgkd_peft.teacher import Teacher


def merge_behind_the_back(step: int):
    """A callback that merges the adapter into the base and takes it out again, as rollout engines do."""

    class Merge(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == step:
                model.merge_adapter()
                model.unmerge_adapter()

    return Merge()


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_merge_behind_the_trainers_back_is_caught(tmp_path, quantization):
    base = save_tiny(tmp_path / "base")
    trainer = run(tmp_path, base, base_quantization=quantization, callbacks=[merge_behind_the_back(1)])
    with pytest.raises(FrozenBaseError, match=r"at the end of training.*layers\.0\.\w+\.\w+_proj\.weight"):
        trainer.train()


def test_a_merge_is_caught_at_the_next_save(tmp_path):
    trainer = run(tmp_path, callbacks=[merge_behind_the_back(1)], max_steps=4, save_strategy="steps", save_steps=2)
    with pytest.raises(FrozenBaseError, match="when saving"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert not list((tmp_path / "out").glob("*checkpoint*"))


@pytest.mark.parametrize("which", ["disabled", "shared", "initial", "ema"])
def test_an_honest_run_passes(tmp_path, which):
    trainer = run(tmp_path, teacher_adapter=which, lmbda=1.0)
    before = dict(trainer.frozen.digests)
    trainer.train()
    assert trainer.frozen.digests == before
    assert (trainer.frozen.probe is not None) == (which in ("disabled", "initial"))


def test_the_frozen_adapter_and_the_separate_teacher_are_covered():
    model = student()
    check = FrozenCheck(model, Teacher(model, "initial"))
    check.verify("now")
    digest = check.digest
    next(iter(adapter_tensors(model, INITIAL).values())).data.add_(1)
    with pytest.raises(FrozenBaseError, match=r"\.initial\."):
        check.verify("now")
    assert FrozenCheck(model).digest == digest  # the base's own digest is about the base alone

    other = tiny_model(seed=3).requires_grad_(False)
    check = FrozenCheck(model, Teacher(model, separate=other))
    other.model.norm.weight.data[0] += 1e-3
    with pytest.raises(FrozenBaseError, match=r"teacher: model\.norm\.weight"):
        check.verify("now")


@pytest.mark.parametrize("used", [False, True])
def test_the_scales_of_an_int8_base_are_seen(tmp_path, used):
    """They are neither parameters nor buffers, and the first forward moves them from the weight to the layer."""
    model = get_peft_model(load_base(save_tiny(tmp_path / "base"), quantization="int8", device="cpu"), lora())
    check = FrozenCheck(model)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    lora_layer = model.base_model.model.model.layers[1].mlp.down_proj.base_layer
    if used:
        logits(model)
    check.verify("now")
    for changed, name in ((layer, "up_proj"), (lora_layer, "down_proj")):
        scales = changed.state.SCB if used else changed.weight.SCB
        scales.mul_(2)
        with pytest.raises(FrozenBaseError, match=rf"layers\.1\.mlp\.{name}\.weight \(scales\)"):
            check.verify("now")
        scales.div_(2)
    check.verify("now")


def test_one_flipped_bit_of_a_quantized_base_is_seen(tmp_path):
    model = get_peft_model(load_base(save_tiny(tmp_path / "m"), quantization="nf4", device="cpu"), lora())
    check = FrozenCheck(model)
    weight = model.get_base_model().model.layers[1].mlp.up_proj.weight
    weight.data.view(-1)[3] ^= 1
    with pytest.raises(FrozenBaseError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        check.verify("now")
    weight.data.view(-1)[3] ^= 1
    check.verify("now")
    weight.quant_state.absmax.view(torch.uint8)[0] ^= 1
    with pytest.raises(FrozenBaseError, match=r"up_proj\.weight \(scales\)"):
        check.verify("now")


def test_the_probe_sees_what_no_weight_shows(tmp_path):
    trainer = run(tmp_path)
    trainer.frozen.take_probe()
    trainer.frozen.verify("now", probe=True)
    hook = trainer.model.get_base_model().model.layers[0].register_forward_hook(lambda m, i, o: o * 1.001)
    trainer.frozen.verify("now")
    with pytest.raises(FrozenBaseError, match="no longer says"):
        trainer.frozen.verify("now", probe=True)
    hook.remove()
    trainer.frozen.verify("now", probe=True)
