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
# Of keys that begin alike in every row: keys and values (1, K, P, D) of that beginning.
SHARED_BEGINNING = "shared_beginning"


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
    keys = key.shape[2]
    if (
        queries == 1
        or query.device.type != "cpu"  # a model that was moved after training
        or dropout
        or any(kwargs.get(name) is not None for name in OTHER_KINDS)
        or (attention_mask is None and not (getattr(module, "is_causal", True) if is_causal is None else is_causal))
    ):
        few, beginning = False, None
    else:
        few, beginning = rows * heads * queries * keys <= MOST_SCORES, getattr(key, SHARED_BEGINNING, None)
    scale = scaling if scaling is not None else width**-0.5
    if few:
        if attention_mask is None:
            attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
        out, _ = products(query, key, value, attention_mask, scale)
    elif beginning is not None and not query.requires_grad and sees_all(attention_mask, beginning[0].shape[2]):
        out = after_beginning(query, key, value, attention_mask, scale, beginning)
    else:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float32 (B, H, T, D), and the scores (B, H, T, S) after the mask."""
    rows, heads, queries, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    with torch.autocast(query.device.type, enabled=False):  # it would round the products to bf16
        grouped = (query.float() * scale).reshape(rows, groups, -1, width)  # (B, K, H/K*T, D)
        scores = (grouped @ key.float().transpose(-1, -2)).view(rows, heads, queries, keys)
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, torch.finfo(scores.dtype).min)
        scores += mask
        weights = scores.softmax(-1).view(rows, groups, -1, keys)
        return (weights @ value.float()).view(rows, heads, queries, -1), scores


def sees_all(mask: torch.Tensor | None, keys: int) -> bool:
    """Whether every query may look at the first `keys` keys, and nothing is added to their scores."""
    if mask is None:
        return False
    return bool((mask[..., :keys] if mask.dtype == torch.bool else mask[..., :keys] == 0).all())


def after_beginning(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    beginning: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Attention (B, H, T, D) of rows that begin alike: all queries look at one copy of the beginning, each row's at its
    own keys behind it, and the two are weighted by their sums of exponentials (as FlashAttention joins its blocks,
    arXiv:2205.14135, section 3.1). Without a gradient."""
    rows, heads, queries, width = query.shape
    keys, values = beginning
    groups, length = keys.shape[1], keys.shape[2]
    folded = query.reshape(rows, groups, -1, width).transpose(0, 1).reshape(1, groups, -1, width)  # (1, K, B*H/K*T, D)
    shared, shared_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(folded, keys, values, scale=scale)
    shape = (groups, rows, heads // groups, queries, -1)
    shared = shared.view(shape).transpose(0, 1).reshape(rows, heads, queries, -1)
    shared_sum = shared_sum.view(shape).transpose(0, 1).reshape(rows, heads, queries, 1)
    own, scores = products(query, key[:, :, length:], value[:, :, length:], mask[..., length:], scale)
    share = torch.sigmoid(shared_sum - scores.logsumexp(-1, keepdim=True))
    return share * shared + (1 - share) * own


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
