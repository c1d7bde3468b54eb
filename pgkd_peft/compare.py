"""Two sets of weights on the same completion tokens: the one comparison behind drift, traces, preflight and the proof
of a merge.

What is kept of each side is its hidden states and its head; logits exist for a chunk of tokens at a time.
:meth:`Reading.exact` makes the comparison one in float64.

Shapes: N completion tokens of all rows, V vocabulary, D hidden width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .divergence import Divergence, jsd_between
from .model.adapters import adapter_state, switchable_layers
from .model.head import Head
from .model.load import base_of
from .rows import Row
from .scoring import add_hidden_states_forward, score_teacher

Pairs = Sequence[tuple[list[int], list[int]]]
"""Prompt and completion of each row, token ids."""


@dataclass(frozen=True)
class Reading:
    """What one set of weights makes of the rows: hidden states (n, D) that predict each row's completion, and the head
    that turns them into logits."""

    hidden: list[Tensor]
    head: Head

    def exact(self) -> Reading:
        """The same in float64; in float32 where the head is a module (quantized, or with an adapter)."""
        dtype = torch.float64 if isinstance(self.head.weight, Tensor) else torch.float32
        head = copy.copy(self.head)
        head.dtype = None  # its rows are not to be rounded back
        return Reading([part.to(dtype) for part in self.hidden], head)

    def some(self, rows: Sequence[int]) -> Reading:
        return replace(self, hidden=[self.hidden[i] for i in rows])


@dataclass(frozen=True)
class Comparison:
    """One number a completion token (N,), the rows one after the other, in float64 on the CPU.

    Attributes:
        divergence: nats; at `beta` 0 it is KL(first || second).
        agreement: 1 where both have the same likeliest token, else 0.
    """

    divergence: Tensor
    agreement: Tensor


@torch.no_grad()
def read(
    model: nn.Module, rows: Pairs, pad_id: int, *, head: Head | None = None, at_once: int | None = None
) -> Reading:
    """How `model` reads the rows, with the weights that are active now.

    Args:
        head: the model's, where it is known.
        at_once: rows of one forward; default: as many as :data:`pgkd_peft.rows.TOKEN_BUDGET` tokens hold.
    """
    add_hidden_states_forward(base_of(model))
    made = [Row([], prompt, completion, False, 0) for prompt, completion in rows]
    order = sorted(made, key=lambda row: len(row.teacher_prompt) + len(row.completion))
    for start in range(0, len(order), at_once or max(1, len(order))):
        score_teacher(model, order[start : start + at_once] if at_once else order, pad_id)
    return Reading([row.teacher_hidden for row in made if row.teacher_hidden is not None], head or Head(model))


def read_as(model: nn.Module, which: str, rows: Pairs, pad_id: int, *, at_once: int | None = None) -> Reading:
    """:func:`read` with the adapter as :func:`~pgkd_peft.model.adapters.adapter_state` has it, in eval mode."""
    with adapter_state(model, which):
        reading = read(model, rows, pad_id, at_once=at_once)
    if isinstance(reading.head.weight, nn.Module) and list(switchable_layers(reading.head.weight)):
        reading.head.weight = _InState(reading.head.weight, which)  # it is asked when the state is left
    return reading


class _InState(nn.Module):
    """A head with an adapter of its own, as it answers in a state of that adapter."""

    def __init__(self, head: nn.Module, which: str):
        super().__init__()
        self.head, self.which = head, which

    def forward(self, hidden: Tensor) -> Tensor:
        with adapter_state(self.head, self.which):
            return self.head(hidden)


def compare(first: Reading, second: Reading, **options: Any) -> Comparison:
    """The divergence of two readings of the same rows; `first` is :func:`~pgkd_peft.divergence.linear_jsd`'s teacher.

    Args:
        options: ``beta`` (default 0), ``temperature``, ``normalize``, ``top_k``, ``chunk_mib`` of that function.
    """
    result = _measure(first, second, **options)
    return Comparison(result.divergence.double().cpu(), result.top1_agreement.double().cpu())


def token_nll(reading: Reading, completions: Sequence[Sequence[int]], *, temperature: float = 1.0) -> list[Tensor]:
    """-log p of every completion token: a tensor (n,) a row, in nats, float64 on the CPU."""
    device = reading.hidden[0].device
    ids_N = torch.tensor([token for completion in completions for token in completion], device=device)
    logprob_N = _measure(reading, reading, sampled_ids=ids_N, temperature=temperature).sampled_logprob
    assert logprob_N is not None
    return list((-logprob_N).double().cpu().split([len(completion) for completion in completions]))


@torch.no_grad()
def _measure(first: Reading, second: Reading, *, beta: float = 0.0, **options: Any) -> Divergence:
    options = {"beta": beta, **options}
    return jsd_between(torch.cat(second.hidden), second.head, torch.cat(first.hidden), first.head, **options)
