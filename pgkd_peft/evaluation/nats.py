"""How much of what the PI changes was taken over, without a label: in nats, on the teacher's own answers.

The teacher (the base with PI) answers; base, teacher and student then read prompt and answer, and

    recovered = (NLL_base - NLL_student) / (NLL_base - NLL_teacher)

is 0 where the student finds the answers as surprising as the base does, and 1 where it expects them as the teacher
does. NLL is the sum of -log p over all answer tokens (the end of turn included), without PI for base and student.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import nn

from ..compare import read, token_nll
from ..data.collator import DataCollatorForPrivilegedGKD, stop_ids
from ..model.adapters import adapter_state
from ..model.load import base_of
from ..rollout import generate
from .answers import Interval, bootstrap_recovered
from .groups import recovered_by_group

SMALLEST_GAP = 0.01
"""Nats a token below which the PI changes next to nothing, and no share of it can be told."""


@dataclass(frozen=True)
class Nats:
    """The recovered gap in nats.

    Attributes:
        recovered: share of what the PI changes that the student has taken over; None where it changes next to nothing.
        interval: bootstrap over rows (or groups) of it; None without one.
        base, teacher, student: negative log-likelihood of the teacher's answers, nats a token.
        rows, tokens: how many were measured.
        by_group: the same for each group of rows, see :func:`pgkd_peft.evaluation.groups.recovered_by_group`; base,
            teacher and student are log-likelihoods of an answer there, so that higher is better.
    """

    recovered: float | None
    interval: Interval | None
    base: float
    teacher: float
    student: float
    rows: int
    tokens: int
    by_group: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def sentence(self) -> str:
        """For people: "62 % of what the PI changes was taken over (95 % interval ...)"."""
        told = f"{self.tokens} tokens of {self.rows} answer{'s' if self.rows != 1 else ''} of the teacher"
        if self.recovered is None:
            means = f"base {self.base:.3f}, teacher {self.teacher:.3f} nats/token"
            return f"the PI changes next to nothing: {means} on {told}"
        between = ""
        if self.interval is not None:
            level, low, high = self.interval.level, self.interval.low, self.interval.high
            between = f" ({level:.0%} interval {low:.0%} to {high:.0%})".replace("%", " %")
        return (
            f"{100 * self.recovered:.0f} % of what the PI changes was taken over{between}: base {self.base:.3f}, "
            f"teacher {self.teacher:.3f}, student {self.student:.3f} nats/token on {told}"
        )


def teacher_answers(
    model: nn.Module, collator: DataCollatorForPrivilegedGKD, rows: Sequence[Any], *, max_new_tokens: int = 64
) -> list[list[int]]:
    """What the base with PI answers greedily to each row: token ids, the end of turn included."""
    prompts = [collator.encode(row)["teacher_ids"] for row in rows]
    stops = stop_ids(collator.tokenizer, base_of(model).generation_config)
    with adapter_state(model, "disabled") as base:
        return generate(base, prompts, max_new_tokens=max_new_tokens, stop_ids=stops, pad_id=collator.pad_token_id)


def answer_nll(
    weights: nn.Module, prompts: Sequence[list[int]], answers: Sequence[list[int]], pad_id: int
) -> np.ndarray:
    """Summed -log p of each answer after its prompt, in nats: (rows,)."""
    if not answers:
        return np.zeros(0)
    reading = read(weights, list(zip(prompts, answers)), pad_id)
    return np.array([float(losses.sum()) for losses in token_nll(reading, answers)])


def recovered_nats(
    model: nn.Module,
    collator: DataCollatorForPrivilegedGKD,
    rows: Sequence[Any],
    answers: Sequence[list[int]] | None = None,
    *,
    max_new_tokens: int = 64,
    groups: Sequence[Hashable] | None = None,
    samples: int = 2000,
    seed: int = 0,
) -> Nats:
    """The recovered gap in nats over `rows`.

    Args:
        model: a PeftModel; the base is the model with its adapter disabled.
        collator: as in training: it places the PI.
        rows: with PI; rows without any are left out.
        answers: the teacher's answers to `rows` as token ids, where they are known (:func:`teacher_answers`).
        max_new_tokens: their length limit, where they are not.
        groups: one name a row; rows of one group are drawn together in the bootstrap.
        samples: of the bootstrap; 0 leaves the interval out.

    Raises:
        DataError: a row cannot be used. ValueError: no row has PI, or `answers` are not one a row.
    """
    if answers is not None and len(answers) != len(rows):
        raise ValueError(f"{len(answers)} answers were given for {len(rows)} rows; give one a row")
    encoded = [collator.encode(row) for row in rows]
    used = [i for i, row in enumerate(encoded) if row["contexts"].has_privileged]
    if not used:
        raise ValueError("no row has PI, so there is nothing to take over")
    if answers is None:
        answers = teacher_answers(model, collator, [rows[i] for i in used], max_new_tokens=max_new_tokens)
    else:
        answers = [answers[i] for i in used]
    pad = collator.pad_token_id
    plain = [encoded[i]["student_ids"] for i in used]
    better = [encoded[i]["teacher_ids"] for i in used]
    with adapter_state(model, "disabled") as weights:
        base = answer_nll(weights, plain, answers, pad)
        teacher = answer_nll(weights, better, answers, pad)
    with adapter_state(model, "shared") as weights:
        student = answer_nll(weights, plain, answers, pad)
    tokens = sum(map(len, answers))
    gap = (base - teacher).sum()
    recovered = float((base - student).sum() / gap) if gap > SMALLEST_GAP * tokens else None
    interval = None
    names = [groups[i] for i in used] if groups is not None else None
    likelihoods = [(-losses).tolist() for losses in (base, teacher, student)]
    if samples and recovered is not None:
        interval = bootstrap_recovered(*likelihoods, groups=names, samples=samples, seed=seed)
    by_group: list[dict[str, Any]] = []
    if names is not None:
        least = [SMALLEST_GAP * len(answer) for answer in answers]
        by_group = recovered_by_group(likelihoods[0], likelihoods[1], likelihoods[2], names, least=least, seed=seed)
    before, with_pi, after = (float(values.sum() / tokens) for values in (base, teacher, student))
    return Nats(recovered, interval, before, with_pi, after, rows=len(used), tokens=tokens, by_group=by_group)
