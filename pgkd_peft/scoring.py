"""Rows of one optimizer step -> the hidden states that predict their completion tokens.

Shapes: B rows, T padded length, N kept positions of a batch, D hidden width, P prompt length, C completion length.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from .model.load import base_of
from .rows import TOKEN_BUDGET, Row, by_length, hand_out, pack


def without_padding(model: nn.Module) -> bool:
    """Whether the model's attention reads several rows in one line, telling them apart by their positions, at no cost:
    FlashAttention's variable-length kernels. Others would make a mask of the line's length squared."""
    return "flash" in str(base_of(model).config._attn_implementation)


def add_hidden_states_forward(base: PreTrainedModel) -> None:
    """Let ``model(..., hidden_mask=mask)`` return the last hidden states at `mask` (N, D) instead of logits.

    The backbone runs through the model's own ``forward``, so autocast, DDP hooks and checkpointing apply; the head
    does not run. Without `hidden_mask` the forward is the original one. A second call changes nothing.
    """
    original = base.forward
    if getattr(original, "gives_hidden_states", False):
        return

    @functools.wraps(type(base).forward)
    def forward(self: PreTrainedModel, *args: Any, hidden_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if hidden_mask is None:
            return original(*args, **kwargs)
        kwargs.setdefault("use_cache", False)
        return self.base_model(*args, **kwargs).last_hidden_state[hidden_mask]

    forward.gives_hidden_states = True  # type: ignore[attr-defined]
    base.forward = types.MethodType(forward, base)


@torch.no_grad()
def score_teacher(model: nn.Module, rows: Sequence[Row], pad_id: int, token_budget: int = TOKEN_BUDGET) -> None:
    """Store in every row the hidden states with which `model` predicts its kept tokens after the teacher's prompt.

    Rows are sorted by length into sub-batches of at most `token_budget` padded tokens. Rows that share one prompt
    (``num_generations`` > 1) read it once: its cache is computed for one row and copied.
    """
    device = next(model.parameters()).device
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        if row.kept:
            groups.setdefault(tuple(row.teacher_prompt), []).append(row)
        else:
            row.teacher_hidden = torch.empty(0, 0, device=device)
    single = [group[0] for group in groups.values() if len(group) == 1]
    for batch in by_length(single, lambda r: len(r.teacher_prompt) + len(r.completion), token_budget):
        packed = pack([r.teacher_prompt for r in batch], batch, pad_id, device, flat=without_padding(model))
        hand_out(batch, model(**packed))
    for prompt, group in groups.items():
        if len(group) > 1:
            _score_shared_prompt(model, list(prompt), group, pad_id, token_budget, device)


def _score_shared_prompt(
    model: nn.Module, prompt: list[int], group: list[Row], pad_id: int, token_budget: int, device: torch.device
) -> None:
    """One prefill of `prompt` but for its last token, then all its completions on copies of the cache."""
    prefix = torch.tensor([prompt[:-1]], device=device)
    for batch in by_length(group, lambda r: len(prompt) + len(r.completion), token_budget):
        cache = DynamicCache(config=base_of(model).config.get_text_config())
        if prefix.shape[1]:
            nothing = torch.zeros_like(prefix, dtype=torch.bool)
            model(input_ids=prefix, past_key_values=cache, use_cache=True, hidden_mask=nothing)
            cache.batch_repeat_interleave(len(batch))
        packed = pack([prompt[-1:]] * len(batch), batch, pad_id, device)
        packed["position_ids"] = packed["position_ids"] + prefix.shape[1]
        seen = packed["attention_mask"].new_ones(len(batch), prefix.shape[1])
        packed["attention_mask"] = torch.cat([seen, packed["attention_mask"]], dim=1)
        hand_out(batch, model(**packed, past_key_values=cache, use_cache=True))
