"""How much of each passage was taken over: its own recovered gap in nats, on its held-out questions and all others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from ..data.collator import DataCollatorForPrivilegedGKD, stop_ids
from ..evaluation.nats import SMALLEST_GAP, answer_nll, teacher_answers
from ..model.adapters import adapter_state
from ..model.load import base_of
from ..rollout import generate
from .keep import LEAST_GAP
from .questions import Question
from .split import Passage, rules

PALE = 0.5
"""A passage of which less than this share was taken over is asked about again by ``--more``."""
QUESTIONS_A_PASSAGE = 4


def choose(questions: Sequence[Question]) -> list[Question]:
    """At most :data:`QUESTIONS_A_PASSAGE` of each passage, held-out ones first."""
    chosen: dict[int, list[Question]] = defaultdict(list)
    for question in sorted(questions, key=lambda q: q.use != "heldout"):
        if question.passage is None or question.use not in ("heldout", "train"):
            continue
        if len(chosen[question.passage]) < QUESTIONS_A_PASSAGE:
            chosen[question.passage].append(question)
    return [question for number in sorted(chosen) for question in chosen[number]]


def measure(
    model: nn.Module,
    collator: DataCollatorForPrivilegedGKD,
    passages: Sequence[Passage],
    privileged: Mapping[int, str],
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    least_gap: float = 0.0,
) -> dict[str, Any]:
    """What the report shows: every passage with its recovered gap, its questions, and the three answers to them.

    Args:
        model: a PeftModel; the base is the model with its adapter disabled.
        least_gap: nats an answer that a passage must change on average, for a share of it to be told.

    Returns:
        Plain JSON types: ``passages``, each with ``number``, ``source``, ``headings``, ``text``, ``recovered`` (None
        where no question was kept, or too little is changed) and ``questions``, each with ``question``, ``held_out``,
        ``recovered``, ``base``, ``teacher``, ``student``.
    """
    asked = choose(questions)
    key = collator.builder.privileged_key
    rows = [{"messages": q.messages(), key: privileged[q.passage]} for q in asked if q.passage is not None]
    encoded = [collator.encode(row) for row in rows]
    plain, better = [row["student_ids"] for row in encoded], [row["teacher_ids"] for row in encoded]
    pad, stops = collator.pad_token_id, stop_ids(collator.tokenizer, base_of(model).generation_config)
    distinct = list(dict.fromkeys(map(tuple, plain)))  # rules are asked the same requests

    def plainly(weights: nn.Module) -> list[list[int]]:
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop_ids": stops, "pad_id": pad}
        written = dict(zip(distinct, generate(weights, [list(ids) for ids in distinct], **settings)))
        return [written[tuple(ids)] for ids in plain]

    answers = teacher_answers(model, collator, rows, max_new_tokens=max_new_tokens)
    with adapter_state(model, "disabled") as weights:
        base, teacher = answer_nll(weights, plain, answers, pad), answer_nll(weights, better, answers, pad)
        said = {"teacher": answers, "base": plainly(weights)}
    with adapter_state(model, "shared") as weights:
        student = answer_nll(weights, plain, answers, pad)
        said["student"] = plainly(weights)
    texts = {
        name: [collator.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions]
        for name, completions in said.items()
    }
    lengths = np.array([len(ids) for ids in answers], dtype=float)
    records: dict[int, list[dict[str, Any]]] = defaultdict(list)
    places: dict[int, list[int]] = defaultdict(list)
    for i, question in enumerate(asked):
        assert question.passage is not None
        places[question.passage].append(i)
        records[question.passage].append(
            {
                "question": question.question,
                "held_out": question.use == "heldout",
                "recovered": share(base[[i]], teacher[[i]], student[[i]], lengths[[i]]),
                **{name: texts[name][i] for name in ("base", "teacher", "student")},
            }
        )
    found = []
    for passage in passages:
        at = places[passage.number]
        found.append(
            {
                "number": passage.number,
                "source": passage.source,
                "headings": list(passage.headings),
                "text": passage.text,
                "recovered": share(base[at], teacher[at], student[at], lengths[at], least_gap) if at else None,
                "questions": records[passage.number],
            }
        )
    return {"passages": found}


def rule_by_rule(
    model: nn.Module,
    collator: DataCollatorForPrivilegedGKD,
    prompt: Passage,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """What each rule of a system prompt changes by itself, and how much of that was taken over: as the passages of
    :func:`measure`, with the rule alone as PI and the requests of the whole prompt. Empty for a prompt of one rule."""
    parts = rules(prompt.text)
    if len(parts) < 2:
        return []
    passages = [Passage(number, prompt.source, (), text) for number, text in enumerate(parts)]
    asked = [replace(question, passage=passage.number) for passage in passages for question in choose(questions)]
    alone = {passage.number: passage.text for passage in passages}
    found = measure(model, collator, passages, alone, asked, max_new_tokens=max_new_tokens, least_gap=LEAST_GAP)
    return found["passages"]


def share(
    base: np.ndarray, teacher: np.ndarray, student: np.ndarray, lengths: np.ndarray, least_gap: float = 0.0
) -> float | None:
    """(NLL_base - NLL_student) / (NLL_base - NLL_teacher); None where the PI changes next to nothing, or less than
    `least_gap` nats an answer."""
    gap = float((base - teacher).sum())
    if gap <= max(SMALLEST_GAP * float(lengths.sum()), least_gap * len(lengths)):
        return None
    return round(float((base - student).sum()) / gap, 4)


def pale(coverage: Mapping[str, Any]) -> list[int]:
    """Numbers of the passages of which too little was taken over, or about which no question was kept."""
    return [p["number"] for p in coverage["passages"] if p["recovered"] is None or p["recovered"] < PALE]
