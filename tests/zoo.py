"""Tiny random models of the text architectures that people run on one GPU, and what each must pass."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import ROWS, VOCAB, byte_tokenizer

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
LINEAR_ATTENTION = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 16}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
# class prefix -> what its config needs beside COMMON
DENSE: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 16},
    "Ministral3": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {"sliding_window": 16, "final_logit_softcapping": 5.0},
    "Gemma3": {"text": True, "sliding_window": 16},
    "Phi": {},
    "Phi3": {"resid_pdrop": 0.1, "attention_dropout": 0.1},
    "Olmo": {},
    "Olmo2": {},
    "Olmo3": {"sliding_window": 16},
    "SmolLM3": {},
    "Granite": {"logits_scaling": 2.0},
    "Glm": {},
    "Glm4": {},
    "Cohere": {},
    "Cohere2": {"sliding_window": 16},
    "Exaone4": {"sliding_window": 16},
    "HunYuanDenseV1": {},
    "Ernie4_5": {},
    "GPTNeoX": {},
    "SeedOss": {"residual_dropout": 0.1, "attention_dropout": 0.1},
    "StableLm": {},
    "Starcoder2": {},
    "Nemotron": {},
    "Helium": {},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024},
    "OPT": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "MiniCPM3": {**MLA},
    "Apertus": {},
    "Arcee": {},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": EXPERTS,
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 64},
    "Mixtral": EXPERTS,
    "Olmoe": EXPERTS,
    "GptOss": {**EXPERTS, "sliding_window": 16},
    "GraniteMoe": EXPERTS,
    "Phimoe": EXPERTS,
    "Ernie4_5_Moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2},
    "Glm4Moe": {**EXPERTS, "n_group": 1, "topk_group": 1},
    "Glm4MoeLite": {**EXPERTS, **MLA, "n_group": 1, "topk_group": 1},
    "DeepseekV3": {**EXPERTS, **MLA, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "Llama4": {**EXPERTS, "text": True, "intermediate_size_mlp": 128},
}
RECURRENT: dict[str, dict[str, Any]] = {
    "Qwen3_5": {**LINEAR_ATTENTION, "text": True},
    "Qwen3Next": {**LINEAR_ATTENTION, **EXPERTS, "shared_expert_intermediate_size": 64},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "GraniteMoeHybrid": {**EXPERTS, **MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
    "Bamba": {**MAMBA, "attn_layer_indices": [1]},
    "FalconH1": {**MAMBA, "mamba_d_ssm": 128},
    "NemotronH": {
        **EXPERTS,
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 16,
        "chunk_size": 16,
    },
    "OlmoHybrid": LINEAR_ATTENTION,
    "Mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 16, "chunk_size": 16},
    "Jamba": {**EXPERTS, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "RecurrentGemma": {"lru_width": 64, "attention_window_size": 16, "num_hidden_layers": 3},
}
ALL = {**DENSE, **MIXTURES, **RECURRENT}


def zoo_model(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """The tiny random model of a class prefix, its weights sharpened so that outputs depend on the context."""
    torch.manual_seed(seed)
    settings = {**COMMON, **ALL[name]}
    config_name = f"{name}{'Text' if settings.pop('text', False) else ''}Config"
    config = getattr(transformers, config_name)(**settings)
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)
    return model.eval()


def save(name: str, path: Path) -> str:
    zoo_model(name).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


def trainer_of(base: str, out: Path, *, quantization: str = "none", engine: str = "auto", **settings: Any) -> Any:
    from pgkd_peft import PrivilegedGKDConfig, PrivilegedSelfDistillTrainer

    defaults = {
        "max_new_tokens": 6,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lmbda": 1.0,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "bf16": False,
    }
    args = PrivilegedGKDConfig(
        output_dir=str(out), base_quantization=quantization, rollout_engine=engine, **{**defaults, **settings}
    )
    return PrivilegedSelfDistillTrainer(model=base, args=args, train_dataset=ROWS)


def check(name: str, folder: Path) -> None:
    """Everything on one architecture: start checks in full, a step with either engine, NF4, merge and resume."""
    from pgkd_peft.conformance import check_model
    from pgkd_peft.export.merge import merge_adapter

    base = save(name, folder / "base")
    trainer = trainer_of(base, folder / "adapter", engine="adapter", max_steps=2, save_strategy="steps", save_steps=1)
    check_model(trainer.model, trainer.processing_class, always=True)
    trainer.train()
    trainer.save_model()
    final = {key: value.clone() for key, value in trainer.model.state_dict().items() if "lora_" in key}
    untrained = [key for key, value in final.items() if "lora_B" in key and not value.any()]
    assert not untrained, f"LoRA that never trains: {untrained[:3]}"
    again = trainer_of(base, folder / "adapter", engine="adapter", max_steps=2, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=str(folder / "adapter" / "checkpoint-1"))
    for key, value in again.model.state_dict().items():
        if "lora_" in key:
            torch.testing.assert_close(value, final[key], msg=f"resume: {key}")
    trainer_of(base, folder / "merged", engine="merged").train()
    trainer_of(base, folder / "nf4", quantization="nf4").train()
    merge_adapter(str(folder / "adapter"), str(folder / "out"), log=lambda _: None)


def main(target: Path, names: list[str]) -> int:
    """Write the table; returns how many are neither green nor refused by name."""
    import tempfile

    from pgkd_peft.errors import PGKDError

    lines, red = [], 0
    for name in names or list(ALL):
        try:
            with tempfile.TemporaryDirectory() as folder:
                check(name, Path(folder))
            result = "green"
        except PGKDError as error:
            result = f"refused: {str(error).splitlines()[0]}"
        except Exception as error:  # the table is of whatever happens
            red += 1
            result = f"RED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(f"{name}: {result}", flush=True)
        lines.append(f"| {name} | {result.replace('|', '/')} |")
    if not names:
        head = (
            "# Architectures\n\nWritten by `make zoo`: each as a tiny random model against a plain forward of the same "
            "model, with\nboth rollout engines, unquantized and in NF4, two steps, resumed and merged.\n\n"
            "| architecture | result |\n| --- | --- |\n"
        )
        target.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    return red


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(__file__).parent.parent / "docs" / "architectures.md", sys.argv[1:]) > 0)
