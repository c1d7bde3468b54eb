"""From passages to ``questions.jsonl``: written and judged call by call; a killed bake goes on where it stopped.

Every call's prompts, batch and random numbers depend on the settings, the call's number and what was judged before it,
so what is written after an interruption is what would have been written without it.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..run.folder import ASKED_FILE, QUESTIONS_FILE
from ..run.jsonl import append_lines, read_lines
from . import ask
from .ask import BaseWriter, Task, Writer
from .keep import SYSTEMS, Keeper, systems_of
from .questions import OF_THE_TEXT, OWN, Question, read_questions, write_questions
from .split import Passage, asked_in

ROWS_A_CALL = 128
ANCHORS_A_CALL = 48
JUDGED_AT_ONCE = 64
SHARE_OF_ASKING = 0.3  # of --minutes, judging included

logger = logging.getLogger(__name__)


@dataclass
class Budget:
    """Seconds that a step may take; without a limit all is done."""

    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started

    def is_over(self, share: float, next_seconds: float = 0.0) -> bool:
        """Whether `share` of the time is used up, or would be after `next_seconds` more."""
        return self.seconds is not None and self.spent + next_seconds > share * self.seconds


@dataclass
class Plan:
    """What is asked for.

    Attributes:
        questions: to write about each passage, on average.
        anchors: everyday requests to write.
        requests: the user's own, which come first; each is asked about every passage or the whole prompt.
        first_round: of the openings; ``--more`` goes on behind those that were used.
        only: numbers of the passages to ask about; None for all.
        is_prompt: the one passage is a system prompt.
        seed: of sampling.
    """

    questions: int
    anchors: int
    requests: Sequence[str] = ()
    first_round: int = 0
    only: Sequence[int] | None = None
    is_prompt: bool = False
    seed: int = 0


class Asking:
    """Writes questions and anchors into the run folder, and judges them as they come.

    Every call asks most about the passages of which the fewest questions were worth keeping: some facts are hard to ask
    about for a small model, and the student learns what it is asked.

    Args:
        folder: the run's.
        passages: what is asked about.
        writer: of questions.
        base: writes anchors, and requests for a system prompt.
        keeper: judges.
        tick: called with (done, all, what) after each call.
    """

    def __init__(
        self,
        folder: Path,
        passages: Sequence[Passage],
        writer: Writer,
        base: BaseWriter,
        keeper: Keeper,
        plan: Plan,
        budget: Budget,
        tick: Callable[[int, int, str], None],
    ):
        self.folder, self.passages, self.writer, self.base = folder, list(passages), writer, base
        self.keeper, self.plan, self.budget, self.tick = keeper, plan, budget, tick
        self.file = folder / ASKED_FILE
        self.wanted = [p for p in self.passages if plan.only is None or p.number in set(plan.only)]
        self.systems = systems_of(base.collator)
        # Where no system turn can tell them apart, anchors would unteach what the requests teach.
        told_apart = not plan.is_prompt or self.systems != (None,)
        self.anchor_calls = -(-plan.anchors // ANCHORS_A_CALL) if told_apart else 0
        self.rounds = ask.rounds(plan.questions * len(self.wanted), first=plan.first_round)  # for any one of them
        self.tried: Counter[int] = Counter()  # passage -> questions asked for

    def run(self, questions: list[Question]) -> list[Question]:
        """Everything that was written, by this call and those before it, judged; ends early when the time is up, but
        not before the first call of questions.

        Args:
            questions: what an interrupted call has left in ``questions.jsonl``.
        """
        done = self._done()
        taken = max((q.call for q in questions), default=-2)  # the newest call that stands in questions.jsonl
        if not questions:
            questions = self._sifted([*self._own(), *self._found()], [])
            taken = -1
        questions = judge(self.folder, questions, self.keeper)
        seconds, number = 0.0, 0
        while True:
            started = time.monotonic()
            if number == len(done):
                if number > self.anchor_calls and self.budget.is_over(SHARE_OF_ASKING, seconds):
                    break
                kind, tasks = self.next_call(number, questions)
                if kind == "nothing":
                    break
                line = {
                    "call": number,
                    "passages": [task.passage.number for task in tasks],
                    "records": self._one(kind, tasks, (self.plan.seed, self.plan.first_round, number), questions),
                }
                append_lines(self.file, [line])
                done.append(line)
            self.tried.update(done[number]["passages"])
            if number > taken:
                new = [Question(call=number, **record) for record in done[number]["records"]]
                questions = judge(self.folder, [*questions, *self._sifted(new, questions)], self.keeper)
                seconds = time.monotonic() - started
            number += 1
            self.tick(number, max(number, self._calls()), "asking")
        return questions

    def _calls(self) -> int:
        """About how many there will be."""
        rows = ANCHORS_A_CALL if self.plan.is_prompt else ROWS_A_CALL
        return self.anchor_calls + -(-self.plan.questions * (1 if self.plan.is_prompt else len(self.wanted)) // rows)

    def next_call(self, number: int, questions: Sequence[Question]) -> tuple[str, list[Task]]:
        """What call `number` asks for: "anchors", "requests", "questions" (with the tasks) or "nothing"."""
        if number < self.anchor_calls:
            return "anchors", []
        if self.plan.is_prompt:
            more = number < self.anchor_calls + -(-self.plan.questions // ANCHORS_A_CALL)
            return ("requests" if more else "nothing"), []
        left = self.plan.questions * len(self.wanted) - self.tried.total()
        tasks = self._tasks(min(ROWS_A_CALL, left), questions)
        return ("questions" if tasks else "nothing"), tasks

    def _tasks(self, count: int, questions: Sequence[Question]) -> list[Task]:
        """Each goes to the passage with the fewest kept questions; what was tried in vain counts a little too."""
        kept = Counter(q.passage for q in questions if q.use in ("train", "heldout"))
        tried = self.tried.copy()
        heap = [(kept[p.number] + tried[p.number] / 8, p.number) for p in self.wanted]
        heapq.heapify(heap)
        by_number = {p.number: p for p in self.wanted}
        tasks = []
        for _ in range(count):
            score, number = heap[0]
            kind, opening = self.rounds[tried[number]]
            tasks.append(Task(by_number[number], kind, opening))
            tried[number] += 1
            heapq.heapreplace(heap, (score + 0.5, number))  # about every third is kept
        return tasks

    def _own(self) -> list[Question]:
        """The user's requests, each about every passage of which it names something, else about the one with which it
        shares most words; the log says how many have nothing in common with any."""
        found: list[Question] = []
        left_out = []
        for request in self.plan.requests:
            about = [p for p in self.passages if self.plan.is_prompt or ask.is_about(request, p)]
            about = about or nearest(request, self.passages)
            found += [Question(question=request, passage=passage.number) for passage in about]
            if not about:
                left_out.append(request)
        if left_out:
            logger.warning(
                "%d of %d requests have no word in common with the text and are left out; the first is %r.",
                len(left_out),
                len(self.plan.requests),
                left_out[0],
            )
        return found

    def _found(self) -> list[Question]:
        """Those that the document itself asks."""
        return [
            Question(question=question, passage=passage.number, kind=OF_THE_TEXT)
            for question, passage in asked_in([] if self.plan.is_prompt or not self.plan.questions else self.wanted)
        ]

    def _sifted(self, new: Sequence[Question], earlier: Sequence[Question]) -> list[Question]:
        return sift(new, self.passages, earlier, self.systems, is_prompt=self.plan.is_prompt)

    def _done(self) -> list[dict[str, Any]]:
        """What earlier calls wrote; a line that a kill cut short is as if it had not been."""
        found: list[dict[str, Any]] = []
        for line in read_lines(self.file):
            if line.get("call") == len(found):
                found.append(line)
        return found

    def _one(
        self, kind: str, tasks: Sequence[Task], path: tuple[int, ...], questions: Sequence[Question]
    ) -> list[dict[str, Any]]:
        if kind == "anchors":
            half = ANCHORS_A_CALL // 2
            everyday = [("everyday", text) for text in self.base.everyday(half, (*path, 0))]
            common = [("common", text) for text in self.base.common(half, (*path, 1))]
            return [{"question": text, "kind": topic} for topic, text in everyday + common]
        if kind == "requests":
            prompt = self.passages[0]
            found = ask.for_prompt(prompt.text, self.base, ANCHORS_A_CALL, path)
            return [{"question": text, "kind": topic, "passage": prompt.number} for topic, text in found]
        earlier: dict[int, list[str]] = {}
        for question in questions:
            if question.passage is not None:
                earlier.setdefault(question.passage, []).append(question.question)
        written = self.writer.questions(tasks, earlier, path)
        return [
            {"question": ask.named(text, task.passage), "kind": task.kind, "passage": task.passage.number}
            for task, text in zip(tasks, written)
            if text
        ]


def nearest(request: str, passages: Sequence[Passage]) -> list[Passage]:
    """The passage that shares most words with a request; [] where none shares one."""
    asked = ask.content_words(request)
    shared = {p.number: len(asked & ask.content_words(p.privileged)) for p in passages}
    best = max(passages, key=lambda p: shared[p.number])
    return [best] if shared[best.number] else []


def sift(
    questions: Sequence[Question],
    passages: Sequence[Passage],
    earlier: Sequence[Question] = (),
    systems: Sequence[str | None] = SYSTEMS,
    *,
    is_prompt: bool,
) -> list[Question]:
    """Mark as dropped what can be seen to be no use without a model, and give every question its system turn.

    Args:
        earlier: those that stand there already.
        systems: that the template can carry; the anchors of a system prompt always have one.
    """
    seen = {ask.normal(question.question) for question in earlier}
    by_number = {passage.number: passage for passage in passages}
    for i, question in enumerate(questions, start=len(earlier)):
        passage = by_number.get(question.passage) if question.passage is not None and not is_prompt else None
        fault = ask.fault_of(question.question, passage, seen)
        seen.add(ask.normal(question.question))
        if question.system is None and not (is_prompt and question.passage is not None):
            choices = [system for system in systems if system is not None or not is_prompt]
            question.system = choices[i % len(choices)]
        if fault and question.kind not in (OWN, OF_THE_TEXT):
            question.use, question.why = "dropped", fault
    return list(questions)


def judge(folder: Path, questions: list[Question], keeper: Keeper) -> list[Question]:
    """Answer and decide what is not judged yet; ``questions.jsonl`` is brought up to date after every batch."""
    waiting = [q for q in questions if q.use != "dropped" and keeper.needs_judging(q)]
    for start in range(0, len(waiting), JUDGED_AT_ONCE):
        keeper.judge(waiting[start : start + JUDGED_AT_ONCE])
        write_questions(folder / QUESTIONS_FILE, questions)
    write_questions(folder / QUESTIONS_FILE, questions)
    return questions


def known_questions(folder: Path, passages: int) -> list[Question] | None:
    """``questions.jsonl`` with the user's edits; None where there is none yet."""
    path = folder / QUESTIONS_FILE
    return read_questions(path, passages) if path.is_file() else None


def rows_of(questions: Sequence[Question], keeper: Keeper) -> tuple[list[dict], list[dict], list[dict]]:
    """(rows to train on, held-out rows with PI, held-out anchors).

    Raises:
        DataError: nothing is left to train on.
    """
    train = [keeper.row(q) for q in questions if q.use in ("train", "anchor")]
    if not any(keeper.collator.builder.privileged_key in row for row in train):
        raise DataError(
            f"no question is worth training on: {counted(questions)}. Look at {QUESTIONS_FILE}; a larger base or "
            "--writer_url writes better questions, --requests gives your own, --questions asks for more."
        )
    judged = [q for q in questions if q.use == "heldout"]
    held_out = [keeper.row(q, with_answer=False) for q in judged if q.passage is not None]
    neutral = [keeper.row(q, with_answer=False) for q in judged if q.passage is None]
    return train, held_out, neutral


def counted(questions: Sequence[Question]) -> str:
    """One line: how many of each."""
    about = [q for q in questions if q.passage is not None]
    uses = Counter(q.use for q in about)
    why = Counter(q.why for q in about if q.use == "dropped")
    reasons = ", ".join(f"{count} {reason}" for reason, count in why.most_common())
    anchors = sum(q.use == "anchor" for q in questions)
    parts = [
        f"{len(about)} questions: {uses['train']} to train on, {uses['heldout']} held out",
        f"{uses['dropped']} dropped" + (f" ({reasons})" if reasons else ""),
        f"{anchors} anchors ({uses['anchor']} of them questions without effect)",
    ]
    return "; ".join(parts)
