"""Attention on a CPU: what `sdpa` computes, with a faster backward where sequences are short."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import ModelError

CPU_ATTENTION = "sdpa_with_short_backward"
MOST_SCORES = 2**21  # above it (8 MB in float32) the products fall out of the caches, and SDPA's blocks win
OTHER_KINDS = ("position_bias", "cache", "softcap", "s_aux")  # arguments that ask for more than plain attention


def use_short_backward(model: PreTrainedModel, device: torch.device) -> None:
    """Where a model trains on the CPU and its attention is `sdpa`, have it computed by :func:`attention`.

    Args:
        device: where it will train (``TrainingArguments.device``), which need not be where it is now: the Trainer moves
            unquantized models.
    """
    if device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(CPU_ATTENTION)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of T queries over S keys: few scores as float32 products, single queries and many scores by SDPA.

    PyTorch's CPU kernel (2.13) takes three times as long as the bare products for the backward of 4 rows of 108 tokens
    in bf16, and its gradients have twice their error. Passes without a gradient take no longer, and use the products
    too: teacher and student must round alike, or rows without PI train on noise.

    Args:
        query: (B, H, T, D); key, value: (B, K, S, D), with H a multiple of K.
        attention_mask: (B or 1, 1 or H, T, S), True where a query may look, or a number to add; None: causal.

    Returns:
        (B, T, H, D), and None for the attention weights.
    """
    rows, heads, queries, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    if (
        queries == 1
        or query.device.type != "cpu"  # a model that was moved after training
        or rows * heads * queries * keys > MOST_SCORES
        or dropout
        or any(kwargs.get(name) is not None for name in OTHER_KINDS)
        or (attention_mask is None and not (getattr(module, "is_causal", True) if is_causal is None else is_causal))
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if attention_mask is None:
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    scale = scaling if scaling is not None else width**-0.5
    with torch.autocast(query.device.type, enabled=False):  # it would round the products to bf16
        grouped = (query.float() * scale).reshape(rows, groups, -1, width)  # (B, K, H/K*T, D)
        scores = (grouped @ key.float().transpose(-1, -2)).view(rows, heads, queries, keys)
        if attention_mask.dtype == torch.bool:
            attention_mask = torch.zeros_like(attention_mask, dtype=scores.dtype).masked_fill_(
                ~attention_mask, torch.finfo(scores.dtype).min
            )
        scores += attention_mask
        weights = scores.softmax(-1).view(rows, groups, -1, keys)
        out = (weights @ value.float()).view(rows, heads, queries, -1)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(CPU_ATTENTION, attention)
AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)


def guard_cpu_linear4bit(model: nn.Module) -> int:
    """Keep bitsandbytes from repacking 4-bit weights in place for CPU inference; returns how many layers it guarded.

    On CPUs with AVX512-BF16 an eval-mode forward without gradient (every teacher pass, every rollout) repacks the
    weight of a ``Linear4bit``; from then on a training forward passes no gradient to its input, and
    ``dequantize_4bit`` of the weight is wrong (bitsandbytes 0.50). Nothing warns of it: the loss goes on moving.
    """
    import bitsandbytes as bnb

    guarded = 0
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise ModelError(
                    "a 4-bit layer was already repacked for CPU inference by an evaluation before training: its "
                    "gradients would be wrong in silence. Load the model again and pass it on before using it."
                )
            module.support_avx512bf16_for_cpu = False
            guarded += 1
    return guarded
