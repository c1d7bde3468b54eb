"""Tiny random models of the text architectures that people run on one GPU; what each must pass is in zoo_checks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import ROWS, VOCAB, byte_tokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

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
# Windows shorter than the rows.
WINDOW = {"sliding_window": 16}
WINDOWS = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
GROUPS = {**EXPERTS, "n_group": 1, "topk_group": 1}
DENSE_FIRST = {**GROUPS, "first_k_dense_replace": 1}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 64}
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
MAMBA2 = {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 16, "chunk_size": 16}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
VISION = {**TOWER, "image_size": 28, "patch_size": 14}
# model_type -> what its config has beside COMMON
DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOW,
    "ministral": WINDOWS,
    "ministral3": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {**WINDOWS, "final_logit_softcapping": 5.0},
    "gemma3_text": WINDOWS,
    "gemma3n_text": {
        **WINDOWS,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
        "activation_sparsity_pattern": None,
    },
    "gemma4_text": {
        **WINDOWS,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
        "global_head_dim": 16,
    },
    "vaultgemma": WINDOWS,
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOWS,
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "granite_swa": WINDOWS,
    "glm": {},
    "glm4": {},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {**WINDOWS, "logit_scale": 0.5},
    "exaone4": WINDOWS,
    "hunyuan_v1_dense": {},
    "hyperclovax": {"logits_scaling": 2.0},
    "ernie4_5": {},
    "seed_oss": {},
    "apertus": {},
    "arcee": {},
    "helium": {},
    "internlm3": {},
    "jais2": {},
    "nanochat": {},
    "cwm": WINDOWS,
    "diffllama": {"attention_dropout": 0.0},  # it has no other
    "doge": {},
    "bitnet": {},
    "minicpm3": MLA,
    "youtu": MLA,
    "modernbert-decoder": {**WINDOWS, "local_attention": 16},
    "stablelm": {},
    "starcoder2": WINDOW,
    "nemotron": {},
    "persimmon": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "codegen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 128},
    "biogpt": {},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [0]},
    "qwen2_moe": SHARED,
    "mixtral": EXPERTS,
    "olmoe": EXPERTS,
    "flex_olmo": EXPERTS,
    "gpt_oss": {**EXPERTS, **WINDOWS},
    "granitemoe": EXPERTS,
    "granitemoeshared": {**EXPERTS, "shared_intermediate_size": 64},
    "granitemoe_swa": {**EXPERTS, **WINDOWS},
    "phimoe": EXPERTS,
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2},
    "glm4_moe": DENSE_FIRST,
    "glm4_moe_lite": {**DENSE_FIRST, **MLA},
    "deepseek_v2": {**DENSE_FIRST, **MLA},
    "deepseek_v3": {**DENSE_FIRST, **MLA},
    "dots1": {**DENSE_FIRST, "n_shared_experts": 1},
    "llama4_text": {**EXPERTS, "intermediate_size_mlp": 128, "attention_chunk_size": 16},
    "afmoe": {**EXPERTS, **WINDOW, "num_dense_layers": 1},
    "exaone_moe": {**GROUPS, **WINDOWS},
    "hunyuan_v1_moe": {**EXPERTS, "moe_topk": 2},
    "cohere2_moe": {**EXPERTS, **WINDOWS},
    "solar_open": GROUPS,
    "minimax_m2": EXPERTS,
    "mimo_v2_flash": {**EXPERTS, **WINDOWS},
    "mellum": EXPERTS,
    "jetmoe": EXPERTS,
    "laguna": EXPERTS,
}
RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_5_text": LINEAR_ATTENTION,
    "qwen3_5_moe_text": {**LINEAR_ATTENTION, **SHARED},
    "qwen3_next": {**LINEAR_ATTENTION, **SHARED},
    "olmo_hybrid": LINEAR_ATTENTION,
    "minimax": {**EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "kimi_linear": {
        **DENSE_FIRST,
        **MLA,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "bailing_hybrid": {
        **DENSE_FIRST,
        **MLA,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {**EXPERTS, **MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "nemotron_h": {
        **EXPERTS,
        "layers_block_type": ["mamba", "attention", "mlp", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 16,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 64,
    },
    "zamba2": {
        **{"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_mem_blocks": 1},
        **{"mamba_d_state": 16, "mamba_headdim": 16, "mamba_ngroups": 1, "chunk_size": 16, "adapter_rank": 8},
    },
    "mamba": {"state_size": 16},
    "mamba2": MAMBA2,
    "falcon_mamba": {"state_size": 16},
    "jamba": {**EXPERTS, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 16, "num_hidden_layers": 3},
    "rwkv": {"attention_hidden_size": 64},
    "xlstm": {"num_heads": 4, "chunk_size": 16, "mode": "inference"},
}
# Published with towers for images or sound, of which training uses the text model alone.
WITH_TOWERS: dict[str, dict[str, Any]] = {
    "gemma3": {"text": ("gemma3_text", WINDOWS), "vision_config": VISION, "mm_tokens_per_image": 4},
    "mistral3": {"text": ("mistral", WINDOW), "vision_config": {**VISION, "model_type": "pixtral"}},
    "qwen3_5": {
        "text": ("qwen3_5_text", LINEAR_ATTENTION),
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 64,
        },
    },
    "qwen3_vl": {
        "text": ("qwen3_vl_text", {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}),
        "vision_config": {
            **{"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64},
            "deepstack_visual_indexes": [0],
        },
    },
    "lfm2_vl": {
        "text": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        "vision_config": {**VISION, "model_type": "siglip2_vision_model", "num_patches": 4},
    },
}
KINDS = {"dense": DENSE, "experts": MIXTURES, "states": RECURRENT, "towers": WITH_TOWERS}
ALL = {name: settings for group in KINDS.values() for name, settings in group.items()}
# Numbers that take effect in training alone; the tiny models have them on, whatever the released ones have.
NOISE = ("drop", "jitter")


def zoo_config(name: str) -> transformers.PreTrainedConfig:
    settings = dict(ALL[name])
    if "text" in settings:
        text, own = settings.pop("text")
        settings = {"text_config": {**COMMON, **own, "model_type": text}, "image_token_id": 9, **settings}
        if name in ("gemma3", "mistral3"):
            settings["image_token_index"] = settings.pop("image_token_id")
        settings["tie_word_embeddings"] = False
    else:
        settings = {**COMMON, **settings}
    kind = CONFIG_MAPPING[name]
    for key in [key for key in settings if isinstance(getattr(kind, key, None), property)]:
        del settings[key]  # what a class works out for itself
    config = kind(**settings)
    text = config.get_text_config()
    for key, value in vars(text).items():
        if key in settings:
            continue
        if any(part in key for part in NOISE) and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(text, key, 0.1)
    return config


def zoo_model(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """The tiny random model of a model type, its weights sharpened so that outputs depend on the context."""
    torch.manual_seed(seed)
    config = zoo_config(name)
    auto = transformers.AutoModelForImageTextToText if name in WITH_TOWERS else transformers.AutoModelForCausalLM
    model: transformers.PreTrainedModel = auto.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "A_log" not in key:
                parameter.mul_(4.0)
            if key.endswith(("correct_output_scale", "self_attn.A")):
                parameter.fill_(1.0)  # zero at first, which keeps what stands before it from training
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
