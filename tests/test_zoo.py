"""Architectures: each fault that a user of another model than Llama met, and a bounded part of the zoo."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import zoo
import zoo_checks
from conftest import perturb
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, save_tiny, tiny_model
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Mistral3Config, Mistral3ForConditionalGeneration

from pgkd_peft import conformance
from pgkd_peft.engines.merged import MergedCopy, choose_engine
from pgkd_peft.errors import ConfigError, ModelError
from pgkd_peft.model.architecture import lora_targets, zero_dropout
from pgkd_peft.model.load import attach_lora, load_base
from pgkd_peft.scoring import add_hidden_states_forward

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
import refresh

LINES = {line["name"]: line for line in zoo_checks.results()}
GREEN = {line["model_type"] for line in LINES.values() if line["result"] == "green"}


@pytest.mark.parametrize("name", ["seed_oss", "mixtral", "qwen3_5_text", "gpt2", "apertus"])
def test_zoo(name, tmp_path):
    """`make zoo` runs all of them. Here: dropout kept as a number; experts and a router that jitters; recurrent states;
    linear layers the other way round; parameters of one number, which the merge must not take for the adapter's."""
    line = zoo_checks.check(name, tmp_path)
    assert line["result"] == "green", line["checks"]
    assert name not in LINES or LINES[name]["result"] == "green"


def test_each_architecture_is_green_or_refused_by_name():
    assert list(LINES) == [name for name in zoo.ALL if name in LINES]  # what has not been run is on no list either
    for name, line in LINES.items():
        if line["result"] == "refused":
            assert name in line["checks"]["start"]
        else:
            assert line["result"] == "green", f"{name}: {line['checks']}"


def test_what_is_on_the_tested_list_is_green():
    assert conformance.TESTED == GREEN, "run python docs/refresh.py architectures"


def test_the_page_shows_what_the_file_says():
    page = refresh.ARCHITECTURES.read_text(encoding="utf-8")
    assert page == refresh.architectures(page), "run python docs/refresh.py architectures"
    assert all(f"| `{name}` | {line['result']} |" in page for name, line in LINES.items())


def test_numbers_that_are_off_are_red():
    """The checks can fail."""
    assert zoo_checks.outcome({"start": "ok", "aligned": "WRONG: loss 1, by plain forwards 2"}) == "red"
    assert zoo_checks.outcome({"start": "ok", "merge": "refused: other names"}) == "red"
    assert zoo_checks.outcome({"start": "refused: x cannot be trained here: y"}) == "refused"
    assert zoo_checks.outcome({"start": "ok", "merged": "not offered: DoRA"}) == "green"


def student(model):
    student = attach_lora(model)
    add_hidden_states_forward(student.get_base_model())
    return student


def test_dropout_kept_as_a_number_is_found_and_switched_off():
    model = student(zoo.zoo_model("seed_oss"))
    with pytest.raises(ModelError, match=r"seed_oss.*training mode"):
        conformance.check_model(model, byte_tokenizer(), always=True)
    assert any("residual_dropout" in name for name in zero_dropout(model))
    conformance.check_model(model, byte_tokenizer(), always=True)


def test_an_unknown_scale_behind_the_head_is_refused_by_name():
    model = student(tiny_model("llama"))
    head = model.get_base_model().lm_head
    conformance.check_model(model, byte_tokenizer())
    head.register_forward_hook(lambda module, args, output: 3 * output)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*head, scale and soft-cap"):
        conformance.check_model(model, byte_tokenizer())


def test_padding_that_leaks_is_refused_by_name(monkeypatch):
    model = student(tiny_model("llama"))
    real = conformance.score_teacher

    def leaking(model, rows, pad_id):
        real(model, rows, pad_id)
        rows[0].teacher_hidden = rows[0].teacher_hidden.roll(1, 0)

    monkeypatch.setattr(conformance, "score_teacher", leaking)
    conformance.check_model(model, byte_tokenizer())  # llama is on the list
    model.get_base_model().config.model_type = "brand_new"
    with pytest.raises(ModelError, match=r"'brand_new'.*padding leaks"):
        conformance.check_model(model, byte_tokenizer())


def test_rollouts_that_go_wrong_are_refused_by_name(monkeypatch):
    model = student(tiny_model("llama"))
    model.get_base_model().config.model_type = "brand_new"
    real = conformance.select_rows
    monkeypatch.setattr(conformance, "select_rows", lambda cache, rows: real(cache, torch.zeros_like(rows)))
    with pytest.raises(ModelError, match=r"'brand_new'.*\(rollouts\)"):
        conformance.check_model(model, byte_tokenizer())
    conformance.check_model(model, byte_tokenizer(), writes=False)

    def crash(*args):
        raise AttributeError("'OwnCache' object has no attribute 'reorder_cache'")

    monkeypatch.setattr(conformance, "select_rows", crash)
    with pytest.raises(ModelError, match=r"'brand_new'\) cannot be trained here: .*'OwnCache'"):
        conformance.check_model(model, byte_tokenizer())


def test_jitter_of_routers_is_switched_off_and_sampling_of_experts_is_refused():
    mixtral = student(zoo.zoo_model("mixtral"))
    with pytest.raises(ModelError, match=r"'mixtral'.*training mode"):
        conformance.check_model(mixtral, byte_tokenizer(), always=True)
    assert any("jitter_noise" in name for name in zero_dropout(mixtral))
    conformance.check_model(mixtral, byte_tokenizer(), always=True)
    phimoe = student(zoo.zoo_model("phimoe"))
    assert not any("router_jitter_noise" in name for name in zero_dropout(phimoe))  # evaluation uses it too
    with pytest.raises(ModelError, match=r"'phimoe'.*training mode"):
        conformance.check_model(phimoe, byte_tokenizer(), always=True)


def test_a_merged_copy_of_layers_the_other_way_round():
    """GPT-2's Conv1D holds (in, out)."""
    model = perturb(student(zoo.zoo_model("gpt2")))
    assert choose_engine(model, "auto")[0] == "merged"
    ids = torch.tensor([[9, 8, 7, 6]])
    with torch.no_grad():
        wanted, found = model.eval()(input_ids=ids).logits, MergedCopy(model, torch.float32).refresh()(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_the_check_leaves_the_model_and_the_random_numbers_as_they_were():
    model = perturb(student(tiny_model("llama"))).train()
    before, trains = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    conformance.check_model(model, byte_tokenizer(), always=True)
    assert torch.equal(before, torch.get_rng_state())
    assert trains == [p.requires_grad for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]


@pytest.mark.parametrize("name", ["falcon_h1", "llama4_text", "phimoe", "qwen3_moe", "deepseek_v3"])
def test_default_targets_leave_out_what_cannot_train(name):
    model = zoo.zoo_model(name)
    targets, reasons = lora_targets(model)
    assert isinstance(targets, list)
    assert reasons
    adapted = attach_lora(model)
    names = [n for n, m in adapted.named_modules() if hasattr(m, "lora_A")]
    assert any("q_proj" in n or "q_b_proj" in n for n in names)
    assert not any(n.endswith((".router", ".gate", "mamba.out_proj")) or ".experts" in n for n in names)
    assert not adapted.peft_config["default"].target_parameters


def vision() -> dict:
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {**tower, "image_size": 28, "patch_size": 14, "head_dim": 16}


def text(**more) -> dict:
    return {**zoo.COMMON, **more}


def test_image_text_checkpoints_train_on_text_and_towers_get_no_lora(tmp_path):
    torch.manual_seed(0)
    config = Mistral3Config(
        text_config={**text(), "model_type": "mistral"},
        vision_config={**vision(), "model_type": "pixtral"},
        image_token_index=9,
    )
    Mistral3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    trainer = zoo.trainer_of(str(tmp_path / "base"), tmp_path / "run")
    trainer.train()
    names = [n for n, m in trainer.model.named_modules() if hasattr(m, "lora_A")]
    assert names
    assert not any("vision" in n or "projector" in n for n in names)


def test_gemma3_with_its_tower_merges(tmp_path):
    """Its files hold language_model.model.*, the module model.language_model.*: Transformers renames them."""
    from pgkd_peft.export.merge import merge_adapter

    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=text(sliding_window=16), vision_config=vision(), mm_tokens_per_image=4, image_token_index=9
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    assert any(key.startswith("language_model.model.") for key in load_file(tmp_path / "base" / "model.safetensors"))
    trainer = zoo.trainer_of(str(tmp_path / "base"), tmp_path / "run")
    trainer.train()
    trainer.save_model()
    merge_adapter(str(tmp_path / "run"), str(tmp_path / "out"), log=lambda _: None)


def test_router_logits_stay_off_and_their_loss_is_refused(tmp_path, make_config):
    trainer = zoo.trainer_of(zoo.save("qwen3_moe", tmp_path / "base"), tmp_path / "run")
    assert not trainer.model.config.output_router_logits
    with pytest.raises(ConfigError, match="router_aux_loss_coef"):
        make_config(router_aux_loss_coef=0.01)


def test_files_that_lack_a_weight_or_have_another_shape_are_refused_by_name(tmp_path):
    base = save_tiny(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(base, quantization="none")
    save_file({**tensors, name: tensors[name][:-1].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight"):
        load_base(base, quantization="none")


@pytest.mark.parametrize("method", ["mxfp4", "fp8", "gptq", "awq"])
def test_files_quantized_otherwise_are_refused_by_name(tmp_path, method):
    base = save_tiny(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    settings = {"quant_method": method, "bits": 4}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    with pytest.raises(ModelError, match=f"'{method}'"):
        load_base(base, quantization="nf4")
