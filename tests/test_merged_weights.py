"""The merged weights against PEFT merging, in float32, a dense copy of what bitsandbytes holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import dense_copy, lora, save_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pgkd_peft.errors import ConfigError, ModelError
from pgkd_peft.export.adapter import read_run
from pgkd_peft.export.merged_weights import MergedWeights
from pgkd_peft.model.load import load_base


def oracle(
    adapter: str, base: str, *, quantization="nf4", original=False, dtype=torch.bfloat16, qc=None
) -> dict[str, torch.Tensor]:
    """PEFT's own merge of the adapter into the dense float32 base."""
    if original:
        dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    else:
        dense = dense_copy(load_base(base, quantization=quantization, dtype=dtype, quantization_config=qc), base)
    dense.config.tie_word_embeddings = False
    if dense.get_output_embeddings().weight is dense.get_input_embeddings().weight:
        # untied on purpose: LoRA on one of two tied modules must not move the other
        dense.get_output_embeddings().weight = nn.Parameter(dense.get_input_embeddings().weight.detach().clone())
    # .float(): PEFT leaves an embedding's LoRA in the dtype that it was saved in, and would add in that
    return PeftModel.from_pretrained(dense, adapter).float().merge_and_unload().state_dict()


def merged(adapter: str, **options) -> tuple[dict[str, torch.Tensor], MergedWeights]:
    weights = MergedWeights(read_run(adapter, log=lambda _: None), **options)
    tensors = {t.key: t.merged.float() for t in weights.tensors()}
    assert {key: tuple(t.shape) for key, t in tensors.items()} == weights.shapes()
    return tensors, weights


CASES = {
    "plain": ("llama", lora(), {}),
    "rank and alpha patterns": ("qwen", lora(rank_pattern={"q_proj": 8}, alpha_pattern={"k_proj": 32}), {}),
    "rslora": ("llama", lora(use_rslora=True), {}),
    "dora": ("llama", lora(use_dora=True), {}),
    "lora_bias": ("qwen", lora(lora_bias=True, target_modules=["q_proj", "v_proj"]), {}),
    "bias": ("qwen", lora(bias="lora_only"), {}),
    "modules_to_save": ("llama", lora(modules_to_save=["norm", "lm_head"]), {}),
    "embedding and head": ("llama", lora(target_modules=["q_proj", "embed_tokens", "lm_head"]), {}),
    "conv1d": ("gpt2", lora(target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True), {}),
    "conv1d dora": ("gpt2", lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True), {}),
    "tied head": ("llama", lora(target_modules=["q_proj", "lm_head"]), {"tie_word_embeddings": True}),
    "tied embedding": ("gemma", lora(target_modules=["q_proj", "embed_tokens"]), {}),
    "trainable tokens": ("llama", lora(trainable_token_indices=[3, 7]), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_peft_in_float32(tmp_path, case):
    kind, config, overrides = CASES[case]
    base = save_tiny(tmp_path / "base", kind, **overrides)
    adapter = save_adapter(tmp_path / "run", base, config)
    base_kind = "original" if case in ("dora", "tied head", "conv1d") else "dequantized"
    tensors, weights = merged(adapter, base=base_kind)
    expected = oracle(adapter, base, original=base_kind == "original")
    plain = dict(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict())
    assert weights.untied == case.startswith("tied")
    moved = 0
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
        moved += not torch.allclose(expected[key], plain[key], atol=1e-2)
    assert moved >= 3  # the adapter is no bystander
    if case.startswith("tied"):
        assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    else:
        assert set(tensors) == set(load_file(Path(base) / "model.safetensors"))


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_base_is_exactly_what_the_loaded_model_computes_with(tmp_path, quantization, kind):
    base = save_tiny(tmp_path / "base", kind)
    adapter = save_adapter(tmp_path / "run", base, lora(target_modules="all-linear"), quantization=quantization)
    held = dense_copy(load_base(base, quantization=quantization, dtype=torch.bfloat16), base).state_dict()
    stored = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    weights = MergedWeights(read_run(adapter))
    rounded = 0
    for tensor in weights.tensors():
        assert torch.equal(tensor.base.float(), held[tensor.key]), tensor.key
        rounded += not torch.equal(held[tensor.key], stored[tensor.key])
    assert rounded >= 8


def test_settings_of_the_run_are_used(tmp_path):
    """Other 4-bit settings than the default: fp4, no double quantization, float16 compute on bfloat16 weights."""
    qc = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float16)
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(tmp_path / "run", base, lora(), quantization="fp4", qc=qc)  # as run.json names it
    run = read_run(adapter)
    assert run.compute_dtype == torch.float16
    assert run.quantization_config.bnb_4bit_quant_type == "fp4"
    key = "model.layers.0.mlp.up_proj.weight"
    (tensor,) = MergedWeights(run).tensors([key])
    module = load_base(base, dtype=torch.bfloat16, quantization_config=qc).get_submodule(key.removesuffix(".weight"))
    eye = torch.eye(64, dtype=torch.float16)  # the forward itself says what the weight is
    assert torch.equal(tensor.base, module(eye).T.float())


def test_base_stored_quantized(tmp_path):
    plain = save_tiny(tmp_path / "plain", "llama")
    quantized = tmp_path / "nf4"
    load_base(plain, dtype=torch.bfloat16).save_pretrained(quantized)
    adapter = save_adapter(tmp_path / "run", plain, lora())
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(quantized)
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(config))
    run = read_run(adapter)
    assert run.prequantized
    stored = {t.key: t.merged.float() for t in MergedWeights(run).tensors()}
    expected = oracle(adapter, plain)
    assert stored.keys() == expected.keys()
    for key, tensor in stored.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-6)
    with pytest.raises(ModelError, match="stored quantized"):
        MergedWeights(run, base="original")


def test_files_without_the_models_prefix(tmp_path):
    base = save_tiny(tmp_path / "base", "gpt2")
    adapter = save_adapter(tmp_path / "run", base, lora(target_modules=["c_attn"], fan_in_fan_out=True))
    with_prefix, _ = merged(adapter)
    file = Path(base) / "model.safetensors"
    save_file({k.removeprefix("transformer."): v for k, v in load_file(file).items()}, file)
    without, _ = merged(adapter)
    assert {f"transformer.{k}" for k in without} == set(with_prefix)
    assert all(torch.equal(v, with_prefix[f"transformer.{k}"]) for k, v in without.items())


def test_tie_is_kept_when_both_ends_were_trained_alike(tmp_path):
    base = save_tiny(tmp_path / "base", "llama", tie_word_embeddings=True)
    config = lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    adapter = save_adapter(tmp_path / "run", base, config)
    tensors, weights = merged(adapter)
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert not weights.untied
    assert "lm_head.weight" not in tensors
    assert torch.equal(
        tensors["model.embed_tokens.weight"], saved["base_model.model.model.embed_tokens.weight"].float()
    )


def broken_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def test_refusals_by_name(tmp_path):
    base = save_tiny(tmp_path / "base")
    folder = tmp_path / "run"
    adapter = save_adapter(folder, base, lora(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="no directory"):
        read_run(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match=r"no adapter_model.safetensors.*Did you mean .*run"):
        read_run(str(tmp_path))
    with pytest.raises(ConfigError, match="--quantization is 'gptq'; accepted are nf4, int8, none"):
        read_run(adapter, quantization="gptq")
    with pytest.raises(ModelError, match=r"base model '/gone/base' .* not there"):
        read_run(adapter, base_model="/gone/base")
    with pytest.raises(ModelError, match=r"adapter 'nobody/nothing' is no local directory, nor does the Hub give it"):
        read_run("nobody/nothing")
    for changes, message in [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    ]:
        broken_config(folder, **changes)
        with pytest.raises(ModelError, match=message):
            read_run(adapter)
        broken_config(folder, peft_type="LORA", init_lora_weights=True)
    broken_config(folder, target_modules=["no_such_module"])
    with pytest.raises(ModelError, match="does not fit base"):
        MergedWeights(read_run(adapter))
    broken_config(folder, target_modules=["q_proj"], alora_invocation_tokens=[1, 2])
    with pytest.raises(ModelError, match="has no merged form"):
        MergedWeights(read_run(adapter))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="is a pickle"):
        read_run(adapter)


def test_base_with_pickled_or_missing_weights_is_refused(tmp_path):
    base = Path(save_tiny(tmp_path / "base"))
    adapter = save_adapter(tmp_path / "run", str(base), lora())
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights"):
        MergedWeights(read_run(adapter))
    (base / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="neither model"):
        MergedWeights(read_run(adapter))


def test_broken_adapter_is_refused(tmp_path):
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(tmp_path / "run", base, lora())
    file = tmp_path / "run" / "adapter_model.safetensors"
    weights = load_file(file)
    key = next(k for k in weights if "lora_B" in k)
    weights[key][0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(ModelError, match="NaN or infinite"):
        list(MergedWeights(read_run(adapter)).tensors())


def test_without_run_json_the_assumption_is_said(tmp_path):
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(tmp_path / "run", base, lora())
    (tmp_path / "run" / "run.json").unlink()
    said: list[str] = []
    run = read_run(adapter, log=said.append)
    assert run.quantization == "nf4"
    assert any("nf4" in line and "--quantization" in line for line in said)
    said.clear()
    assert read_run(adapter, quantization="none", log=said.append).quantization_config is None
    assert not any("nf4" in line for line in said)


def test_checkpoint_inside_a_run_finds_the_runs_settings(tmp_path):
    base = save_tiny(tmp_path / "base")
    save_adapter(tmp_path / "run", base, lora(), quantization="int8")
    checkpoint = tmp_path / "run" / "checkpoint-5"
    checkpoint.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "run" / name).rename(checkpoint / name)
    run = read_run(str(checkpoint))
    assert (run.quantization, run.run_folder) == ("int8", tmp_path / "run")
