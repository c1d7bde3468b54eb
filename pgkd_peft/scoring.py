"""Rows of one optimizer step -> the hidden states that predict their completion tokens.

Shapes: B rows, T padded length, N kept positions of a batch, D hidden width, P prompt length, C completion length.
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .model.architecture import backbone_of
from .model.caches import for_rows, has_states, why_not_shared
from .model.load import base_of
from .prefix import Prefix, Prefixes, TeacherMemory
from .rows import TOKEN_BUDGET, Row, by_length, hand_out, pack, to_device
from .run.memory import in_halves


def reads_packed_rows(model: nn.Module) -> bool:
    """Whether the model reads several rows in one line, telling them apart by their positions, at no cost:
    FlashAttention's variable-length kernels do. Others would make a mask of the line's length squared, and recurrent
    and convolution states would go on from one row into the next."""
    return "flash" in str(base_of(model).config._attn_implementation) and not has_states(model)


def add_hidden_states_forward(base: PreTrainedModel) -> None:
    """Let ``model(..., hidden_index=index)`` return last hidden states (N, D) instead of logits: those at the places
    `index` (N,) of the B * T positions.

    The backbone runs through the model's own ``forward``, so autocast, DDP hooks and checkpointing apply; the head
    does not run. Without `hidden_index` the forward is the original one. A second call changes nothing.
    """
    original = base.forward
    if getattr(original, "gives_hidden_states", False):
        return

    @functools.wraps(type(base).forward)
    def forward(self: PreTrainedModel, *args: Any, hidden_index: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if hidden_index is None:
            return original(*args, **kwargs)
        kwargs.setdefault("use_cache", False)
        return backbone_of(self)(*args, **kwargs).last_hidden_state.flatten(0, 1).index_select(0, hidden_index)

    forward.gives_hidden_states = True  # type: ignore[attr-defined]
    base.forward = types.MethodType(forward, base)


@torch.no_grad()
def score_teacher(
    model: nn.Module,
    rows: Sequence[Row],
    pad_id: int,
    token_budget: int = TOKEN_BUDGET,
    *,
    memory: TeacherMemory | None = None,
    rows_at_once: int | None = None,
) -> None:
    """Store in every row the hidden states with which `model` predicts its kept tokens after the teacher's prompt.

    Rows are sorted by length into sub-batches of at most `token_budget` padded tokens. Beginnings that rows have in
    common are read once; a fixed teacher's `memory` holds what earlier steps read. Rows whose teacher's prompt is the
    student's (no PI) are read in every step, whole and `rows_at_once`, as the student reads them: both must round
    alike, for AdamW makes full steps of a gradient that is nothing but rounding.

    Args:
        rows_at_once: rows of the student's batches (``per_device_train_batch_size``); None: as many as fit.
    """
    device = next(model.parameters()).device
    anchors: list[Row] = []
    shared: list[Row] = []
    for row in rows:
        if not row.kept:
            row.teacher_hidden = torch.empty(0, 0, device=device)
        elif row.teacher_prompt == row.prompt:
            anchors.append(row)
        elif memory is not None and memory.recall(row, device):
            pass
        elif memory is not None and memory.stays(row):
            _score_alone(model, row, memory, pad_id, device)
        else:
            shared.append(row)
    whole: list[Row] = []
    if shared and why_not_shared(model) is not None:
        whole, shared = shared, []
    if memory is not None:
        shared = _score_planned(model, shared, memory, pad_id, token_budget, device)
    whole += _score_planned(
        model, shared, Prefixes([row.teacher_prompt for row in shared]), pad_id, token_budget, device
    )

    def read(batch: list[Row]) -> None:
        packed = pack([r.teacher_prompt for r in batch], batch, pad_id, device, flat=reads_packed_rows(model))
        hand_out(batch, model(**packed))

    for some, most in ((anchors, rows_at_once), (whole, None)):
        for batch in by_length(some, lambda r: len(r.teacher_prompt) + len(r.completion), token_budget, most):
            in_halves(read, batch)


def _score_alone(model: nn.Module, row: Row, memory: TeacherMemory, pad_id: int, device: torch.device) -> None:
    """A row whose answer comes again: by itself, so that it has the same bits in every step."""
    node = memory.find(row.teacher_prompt)
    if node is None:
        hand_out([row], model(**pack([row.teacher_prompt], [row], pad_id, device)))
    else:
        _score_after(model, [(node, row)], memory, pad_id, device)
        memory.forget(needed=[node.parent] if node.parent else [])
    memory.remember(row)


def _score_planned(
    model: nn.Module, rows: list[Row], plan: Prefixes, pad_id: int, token_budget: int, device: torch.device
) -> list[Row]:
    """Score the rows that begin as `plan` knows; returns the others."""
    nodes = [plan.find(row.teacher_prompt) for row in rows]
    if device.type != "cpu":  # a GPU rounds by the batch anyway, and reads one long batch faster than single rows
        users = Counter(nodes)
        nodes = [node if node is None or users[node] > 1 or plan.keeps(node) else node.parent for node in nodes]
    planned = [(node, row) for node, row in zip(nodes, rows) if node is not None]
    planned.sort(key=lambda pair: (pair[0].end, pair[0].order, len(pair[1].teacher_prompt) + len(pair[1].completion)))
    batches: list[list[tuple[Prefix, Row]]] = []
    longest = 0  # new tokens of a row in the last batch
    for node, row in planned:
        new = len(row.teacher_prompt) + len(row.completion) - node.end
        count, most = len(batches[-1]) + 1 if batches else 0, max(longest, new)
        # the prefixes are held once, and a layer at a time as often as there are rows
        if batches and count * most <= token_budget and count * (node.end + most) <= 4 * token_budget:
            batches[-1].append((node, row))
            longest = most
        else:
            batches.append([(node, row)])
            longest = new
    for i, batch in enumerate(batches):
        in_halves(lambda part: _score_after(model, part, plan, pad_id, device), batch)
        plan.forget(needed={node for later in batches[i + 1 :] for node, _ in later})
    return [row for node, row in zip(nodes, rows) if node is None]


def _score_after(
    model: nn.Module, batch: list[tuple[Prefix, Row]], plan: Prefixes, pad_id: int, device: torch.device
) -> None:
    """What follows the beginnings that have been read, in one forward."""
    rows, order = [row for _, row in batch], list(dict.fromkeys(node for node, _ in batch))
    ends = [node.end for node, _ in batch]
    cache = for_rows(
        [plan.read(model, node) for node in order],
        [node.end for node in order],
        [order.index(node) for node, _ in batch],
        device,
    )
    packed = pack([row.teacher_prompt[end:] for row, end in zip(rows, ends)], rows, pad_id, device)
    lengths = [len(row.teacher_prompt) + len(row.completion) - end for row, end in zip(rows, ends)]
    start, end, length = max(ends), torch.tensor(ends)[:, None], torch.tensor(lengths)[:, None]
    place = torch.arange(start + max(lengths))  # (start + T,), each row's beginning right before its rest
    mask = (place >= start - end) & (place < start + length)
    packed["attention_mask"] = to_device(mask.long(), device)
    packed["position_ids"] = to_device(place[start:] - start + end, device)
    hand_out(rows, model(**packed, past_key_values=cache, use_cache=True))
