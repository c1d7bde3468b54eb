"""Adapters to merge and export: every trainable weight perturbed, saved with the run.json that training writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from pgkd_peft.model.load import dequantized_weight, load_base

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **settings})


def save_adapter(
    path: Path, base: str, config: LoraConfig, *, quantization="nf4", scale=0.1, dtype=torch.bfloat16, qc=None
):
    """A LoRA whose every trainable weight was perturbed, saved with the run.json that training writes."""
    torch.manual_seed(1)
    model = get_peft_model(
        load_base(base, quantization=quantization, dtype=dtype, quantization_config=qc), copy.deepcopy(config)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(path)
    run = {
        "base_quantization": quantization,
        "quantization_config": qc.to_dict() if qc is not None else None,
        "compute_dtype": str(dtype).removeprefix("torch."),
    }
    (path / "run.json").write_text(json.dumps(run))
    return str(path)


def dense_copy(model: nn.Module, base: str) -> nn.Module:
    """The float32 model of exactly the values that `model`, loaded by load_base, computes with."""
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            for kind, parameter in module.named_parameters(recurse=False):
                target = dense.get_submodule(name)
                quantized = kind == "weight" and "bit" in type(module).__name__
                value = dequantized_weight(module) if quantized else parameter
                if quantized and isinstance(target, Conv1D):
                    value = value.T
                getattr(target, kind).copy_(value.float())
    return dense
