"""Which questions are worth training on: the teacher's answer must be one that the base would not have given.

That filter only a tool with both contexts can have: gap = log p(answer | question, PI) - log p(answer | question), in
nats, on the teacher's own greedy answer. Below a bound the PI changes nothing there, and the row would teach nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..data.collator import DataCollatorForPrivilegedGKD, stop_ids
from ..errors import DataError
from ..evaluation.nats import answer_nll
from ..model.load import base_of
from ..rollout import generate
from .ask import HELD_OUT_KIND, content_words, speaks_of_the_text
from .questions import OWN, Question

LEAST_GAP = 2.0
"""Nats by which the PI must favour the teacher's answer: a factor of seven."""
MOST_UNSURE = 1.0
"""Nats a token: a teacher less sure of its own answer than this guesses, for the passage does not say it."""
MOST_FOREIGN = 0.34
"""Share of an answer's words that stand neither in passage nor question: more, and the teacher makes things up."""
HELD_OUT_EVERY = 12
HELD_OUT_ANCHORS_EVERY = 6  # there are fewer of them
SHORT = "Answer in one short sentence."
SYSTEMS = (None, SHORT, "You are a helpful assistant.")
"""System turns that requests stand under, in turn: nobody knows which one will stand there. What is taught of a system
prompt holds where no other system turn stands, so its anchors all have one."""


def systems_of(collator: DataCollatorForPrivilegedGKD) -> tuple[str | None, ...]:
    """:data:`SYSTEMS`, or (None,) where the chat template has no system turn."""
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello."}]
    try:
        collator.encode({"messages": turns})
    except DataError:
        return (None,)
    return SYSTEMS


def encoded_by_name(collator: DataCollatorForPrivilegedGKD, row: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What the collator makes of a row.

    Raises:
        DataError: the row cannot be used; `what` says which it is.
    """
    try:
        return collator.check_length(collator.encode(row))
    except DataError as error:
        raise type(error)(f"{what} cannot be used: {error}") from error


class Keeper:
    """Answers questions as teacher (or, of anchors, as base) and decides what becomes of them.

    Args:
        model: the base.
        collator: places the PI.
        privileged: passage number -> what the teacher reads.
        least_gap: see :data:`LEAST_GAP`; None keeps all.
        facts: an answer must say something that stands in the passage and not in the question; not asked of the
            answers to a system prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        collator: DataCollatorForPrivilegedGKD,
        privileged: Mapping[int, str],
        *,
        max_new_tokens: int,
        least_gap: float | None = LEAST_GAP,
        facts: bool = True,
        seed: int = 0,
    ):
        self.model = model
        self.collator = collator
        self.privileged = privileged
        self.max_new_tokens = max_new_tokens
        self.least_gap = least_gap
        self.facts = facts
        self.can_shorten = facts and SHORT in systems_of(collator)
        self.seed = seed
        self.stops = stop_ids(collator.tokenizer, base_of(model).generation_config)

    def digest(self, question: Question) -> str:
        return question.digest(self.privileged[question.passage] if question.passage is not None else "")

    def needs_judging(self, question: Question) -> bool:
        """Whether a line is new, or was edited since it was answered."""
        return question.asked != self.digest(question)

    def row(self, question: Question, *, with_answer: bool = True) -> dict[str, Any]:
        """A row to train on, or without the answer one to judge on: the teacher's sentence is no label to be met."""
        messages = question.messages()
        if question.answer and with_answer:
            messages.append({"role": "assistant", "content": question.answer})
        row: dict[str, Any] = {"messages": messages}
        if question.passage is not None and question.use != "anchor":
            row[self.collator.builder.privileged_key] = self.privileged[question.passage]
        return row

    def judge(self, questions: Sequence[Question]) -> None:
        """Answer and decide, in place.

        A small teacher left to itself rambles; a question on a document whose answer is no use is asked once more for
        one short sentence.
        """
        encoded, answers, faults = self._answer(questions)
        again = [i for i, question in enumerate(questions) if faults[i] and self._may_be_short(question)]
        if again:
            for i in again:
                questions[i].system = SHORT
            for i, row, ids, fault in zip(again, *self._answer([questions[i] for i in again])):
                encoded[i], answers[i], faults[i] = row, ids, fault
        # Read twice is only what may be trained on.
        read = [i for i, question in enumerate(questions) if question.passage is not None and not faults[i]]
        chosen, pad = [answers[i] for i in read], self.collator.pad_token_id
        told = answer_nll(self.model, [encoded[i]["teacher_ids"] for i in read], chosen, pad)
        untold = answer_nll(self.model, [encoded[i]["student_ids"] for i in read], chosen, pad)
        for i, with_privileged, without in zip(read, told, untold):
            questions[i].gap = round(float(without - with_privileged), 3)
            questions[i].unsure = round(float(with_privileged / len(answers[i])), 3)
        for question, fault in zip(questions, faults):
            self.decide(question, fault)

    def _may_be_short(self, question: Question) -> bool:
        is_ours = question.passage is not None and question.kind != OWN
        return self.can_shorten and is_ours and question.system != SHORT

    def _answer(self, questions: Sequence[Question]) -> tuple[list[dict[str, Any]], list[list[int]], list[str]]:
        """Answer as teacher (anchors: as base), in place; encoded rows, answers' ids, and what is wrong with them."""
        for question in questions:
            question.answer, question.gap, question.unsure = "", None, None
        encoded = [
            encoded_by_name(self.collator, self.row(question), f"the question {question.question[:40]!r}")
            for question in questions
        ]
        prompts, pad = [row["teacher_ids"] for row in encoded], self.collator.pad_token_id
        answers = generate(self.model, prompts, max_new_tokens=self.max_new_tokens, stop_ids=self.stops, pad_id=pad)
        for question, ids in zip(questions, answers):
            question.asked = self.digest(question)
            question.answer = self.collator.tokenizer.decode(ids, skip_special_tokens=True).strip()
        faults = [self._fault(question, ids[-1] in self.stops) for question, ids in zip(questions, answers)]
        return encoded, answers, faults

    def decide(self, question: Question, fault: str = "") -> None:
        """Set ``use`` and ``why``; what the user has set stays, as long as it can be trained.

        Args:
            fault: of the answer, see :meth:`_fault`.
        """
        own = question.use
        question.use, question.why = ("dropped", fault) if fault else self._verdict(question)
        if own and not (own in ("train", "heldout") and not question.answer):
            question.use, question.why = own, question.why if own == question.use else "by hand"

    def _fault(self, question: Question, ended: bool) -> str:
        """What is wrong with an answer by itself, "" if nothing is."""
        if not question.answer:
            return "the teacher says nothing"
        if question.passage is None or self.least_gap is None:
            return ""
        if not ended:
            return "the answer does not end"
        if speaks_of_the_text(question.answer):
            return "the answer speaks of the text"
        if self.facts and not self._informs(question):
            return "the answer says nothing new"
        if self.facts and self._foreign(question) > MOST_FOREIGN:
            return "the answer says what does not stand there"
        return ""

    def _verdict(self, question: Question) -> tuple[str, str]:
        held_out = self._held_out(question)
        if question.passage is None:
            return ("heldout" if held_out else "anchor"), ("held out" if held_out else "")
        if self.least_gap is not None:
            assert question.gap is not None
            assert question.unsure is not None
            if question.gap < self.least_gap:
                return "anchor", "without effect"
            if question.unsure > MOST_UNSURE:
                return "dropped", "the teacher guesses"
        if question.kind == HELD_OUT_KIND:
            return "heldout", f"all of the kind {HELD_OUT_KIND!r} are held out"
        return ("heldout", "held out") if held_out else ("train", "")

    def _informs(self, question: Question) -> bool:
        assert question.passage is not None
        known = content_words(self.privileged[question.passage], shortest=3)
        new = content_words(question.answer, shortest=3) - content_words(question.question, shortest=3)
        return not known or bool(new & known)

    def _foreign(self, question: Question) -> float:
        assert question.passage is not None
        words = content_words(question.answer)
        known = content_words(f"{self.privileged[question.passage]} {question.question}", shortest=1)
        return len(words - known) / max(1, len(words))

    def _held_out(self, question: Question) -> bool:
        digest = hashlib.sha256(f"{self.seed} {question.passage} {question.question}".encode()).digest()
        return digest[0] % (HELD_OUT_ANCHORS_EVERY if question.passage is None else HELD_OUT_EVERY) == 0
