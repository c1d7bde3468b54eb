"""Rows of one optimizer step -> the hidden states that predict their completion tokens.

Shapes: B rows, T padded length, N kept positions of a batch, D hidden width, P prompt length, C completion length.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from .model.load import base_of

# Tokens of one scoring sub-batch without gradient.
TOKEN_BUDGET = 16_384


@dataclass
class Row:
    """One conversation on its way through an optimizer step; token ids, unpadded."""

    prompt: list[int]
    teacher_prompt: list[int]
    completion: list[int]
    has_privileged: bool
    privileged_tokens_cut: int
    generated: bool = False  # written in this step, not taken from the data
    truncated: bool = False  # ran into max_new_tokens without a stop token
    keep: slice = field(default_factory=lambda: slice(0, None))  # completion tokens that count in the loss
    teacher_hidden: torch.Tensor | None = None  # (kept tokens, D)

    @property
    def kept(self) -> list[int]:
        """The completion tokens that count in the loss."""
        return self.completion[self.keep]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion)


def rows_of(batch: dict[str, torch.Tensor]) -> list[Row]:
    """The rows of a collator batch, without their padding (by the masks, never by the pad id)."""

    def unpad(ids: str, mask: str) -> list[list[int]]:
        return [row[keep.bool()].tolist() for row, keep in zip(batch[ids].cpu(), batch[mask].cpu())]

    count = len(batch["prompts"])
    return [
        Row(prompt, teacher_prompt, completion, bool(has), int(cut))
        for prompt, teacher_prompt, completion, has, cut in zip(
            unpad("prompts", "prompt_attention_mask"),
            unpad("teacher_prompts", "teacher_prompt_attention_mask"),
            unpad("completions", "completion_mask"),
            batch.get("has_privileged", torch.zeros(count)),
            batch.get("privileged_tokens_cut", torch.zeros(count)),
        )
    ]


def without_padding(model: nn.Module) -> bool:
    """Whether the model's attention reads several rows in one line, telling them apart by their positions, at no cost:
    FlashAttention's variable-length kernels. Others would make a mask of the line's length squared."""
    return "flash" in str(base_of(model).config._attn_implementation)


def pack(
    prompts: Sequence[list[int]], rows: Sequence[Row], pad_id: int, device: torch.device, *, flat: bool = False
) -> dict[str, torch.Tensor]:
    """Prompt + completion of each row, right-padded, with explicit positions; or, `flat`, one after the other.

    Returns:
        ``input_ids``, ``attention_mask``, ``position_ids`` (B, T) and ``hidden_mask`` (B, T), true at the positions
        whose hidden state predicts a kept completion token. Flat: (1, sum of T), positions from 0 in every row, and no
        ``attention_mask``. The kept positions stand in the same order in both.
    """
    if flat:
        parts = [pack([prompt], [row], pad_id, device) for prompt, row in zip(prompts, rows)]
        names = ("input_ids", "position_ids", "hidden_mask")
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in names}
    longest = max(len(p) + len(r.completion) for p, r in zip(prompts, rows))
    ids = torch.full((len(rows), longest), pad_id)  # (B, T)
    mask = torch.zeros_like(ids)
    hidden_mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, row) in enumerate(zip(prompts, rows)):
        length = len(prompt) + len(row.completion)
        ids[i, :length] = torch.tensor(prompt + row.completion)
        mask[i, :length] = 1
        first, last, _ = row.keep.indices(len(row.completion))
        # token t of the completion is predicted one position earlier, at P - 1 + t
        hidden_mask[i, len(prompt) - 1 + first : len(prompt) - 1 + max(first, last)] = True
    positions = torch.arange(longest).expand(len(rows), -1)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "hidden_mask": hidden_mask}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def add_hidden_states_forward(base: PreTrainedModel) -> None:
    """Let ``model(..., hidden_mask=mask)`` return the last hidden states at `mask` (N, D) instead of logits.

    The backbone runs through the model's own ``forward``, so autocast, DDP hooks and checkpointing apply; the head
    does not run. Without `hidden_mask` the forward is the original one.
    """
    original = base.forward

    @functools.wraps(type(base).forward)
    def forward(self: PreTrainedModel, *args: Any, hidden_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if hidden_mask is None:
            return original(*args, **kwargs)
        kwargs.setdefault("use_cache", False)
        return self.base_model(*args, **kwargs).last_hidden_state[hidden_mask]

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


def hand_out(rows: Sequence[Row], hidden: torch.Tensor) -> None:
    """Give each row its part of the stacked hidden states (N, D)."""
    for row, part in zip(rows, hidden.split([len(r.kept) for r in rows])):
        row.teacher_hidden = part


def by_length(rows: Sequence[Row], length: Any, token_budget: int) -> list[list[Row]]:
    """Sort by length and cut into batches of at most `token_budget` padded tokens (one row at least)."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=length):
        if batches and (len(batches[-1]) + 1) * length(row) <= token_budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
