"""Row: one conversation on its way through an optimizer step; and rows packed into a batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

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
    counts: bool = True  # False: it stands in, so that there is a step or a micro-batch; nothing is learned from it
    keep: slice = field(default_factory=lambda: slice(0, None))  # completion tokens that count in the loss
    teacher_hidden: torch.Tensor | None = None  # (kept tokens, D)
    logprobs: list[float] | None = None  # of each completion token, where a rollout server has written it
    server: int = 0  # which of them
    source: Any = None  # the data row, where something asks for it (feedback)

    @property
    def kept(self) -> list[int]:
        """The completion tokens that count in the loss."""
        return self.completion[self.keep]

    def answered(self, completion: list[int], stop_ids: Sequence[int], **more: Any) -> Row:
        """The same prompts with a completion that was written in this step; `more` are fields that come with it."""
        truncated = completion[-1] not in stop_ids
        return replace(self, completion=completion, generated=True, truncated=truncated, **more)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion)


def rows_of(batch: dict[str, torch.Tensor]) -> list[Row]:
    """The rows of a collator batch, without their padding (by the masks, never by the pad id).

    A collator that does not say which rows have PI (`has_privileged`) has it where the teacher's prompt is another.
    """

    def unpad(ids: str, mask: str) -> list[list[int]]:
        return [row[keep.bool()].tolist() for row, keep in zip(batch[ids].cpu(), batch[mask].cpu())]

    count = len(batch["prompts"])
    prompts = unpad("prompts", "prompt_attention_mask")
    teacher_prompts = unpad("teacher_prompts", "teacher_prompt_attention_mask")
    differ = [teacher != own for teacher, own in zip(teacher_prompts, prompts)]
    return [
        Row(prompt, teacher_prompt, completion, bool(has), int(cut), source=source)
        for prompt, teacher_prompt, completion, has, cut, source in zip(
            prompts,
            teacher_prompts,
            unpad("completions", "completion_mask"),
            batch.get("has_privileged", differ),
            batch.get("privileged_tokens_cut", torch.zeros(count)),
            batch.get("sources", [None] * count),
        )
    ]


class RowCollator:
    """A collator's rows as lists of ids; a class, so that loader processes can be started with it."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, rows: list[Any]) -> dict[str, list[Row]]:
        return {"rows": rows_of(self.collator(rows))}


def rows_in(batch: dict[str, Any]) -> list[Row]:
    """The rows of what a loader gives: made by :class:`RowCollator`, or a collator's padded tensors."""
    return batch["rows"] if "rows" in batch else rows_of(batch)


def pack(
    prompts: Sequence[list[int]], rows: Sequence[Row], pad_id: int, device: torch.device, *, flat: bool = False
) -> dict[str, torch.Tensor]:
    """Prompt + completion of each row, right-padded, with explicit positions; or, `flat`, one after the other.

    What the host knows is not left to be read from the device: the kept positions are numbers instead of a mask, and
    rows that need no padding go without ``attention_mask`` and ``position_ids``, at which Transformers would look to
    find out as much.

    Returns:
        ``input_ids``, ``attention_mask``, ``position_ids`` (B, T) and ``hidden_index`` (N,), the places among the B * T
        whose hidden state predicts a kept completion token, row by row. Flat: (1, sum of T), positions from 0 in every
        row, and no ``attention_mask``.
    """
    lengths = [len(p) + len(r.completion) for p, r in zip(prompts, rows)]
    longest = max(lengths)
    starts = list(itertools.accumulate(lengths, initial=0)) if flat else range(0, longest * len(rows), longest)
    index: list[int] = []
    for start, prompt, row in zip(starts, prompts, rows):
        first, last, _ = row.keep.indices(len(row.completion))
        # token t of the completion is predicted one position earlier, at P - 1 + t
        index += range(start + len(prompt) - 1 + first, start + len(prompt) - 1 + last)
    whole = [list(prompt) + list(row.completion) for prompt, row in zip(prompts, rows)]
    if flat:
        batch = {
            "input_ids": torch.tensor([list(itertools.chain.from_iterable(whole))]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        }
    else:
        batch = {"input_ids": torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids in whole])}
        if min(lengths) < longest:
            batch["attention_mask"] = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
            batch["position_ids"] = torch.arange(longest).repeat(len(rows), 1)
    batch["hidden_index"] = torch.tensor(index, dtype=torch.long)
    return {name: to_device(tensor, device) for name, tensor in batch.items()}


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor there; from pinned memory, else the host would wait until the GPU has done all that came before."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def hand_out(rows: Sequence[Row], hidden: torch.Tensor) -> None:
    """Give each row its part of the stacked hidden states (N, D)."""
    for row, part in zip(rows, hidden.split([len(r.kept) for r in rows])):
        row.teacher_hidden = part


def by_length(rows: Sequence[Row], length: Any, token_budget: int, most: int | None = None) -> list[list[Row]]:
    """Sort by length and cut into batches of at most `token_budget` padded tokens (one row at least), and of at most
    `most` rows."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=length):
        count = len(batches[-1]) + 1 if batches else 0
        if batches and count * length(row) <= token_budget and (most is None or count <= most):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
