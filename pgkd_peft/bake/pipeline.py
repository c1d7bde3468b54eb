"""From passages to ``questions.jsonl``: written and judged call by call; a killed bake goes on where it stopped.

Every call's prompts, batch and random numbers depend on the settings and the call's number alone, so what is written
after an interruption is what would have been written without it.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..run.folder import ASKED_FILE, QUESTIONS_FILE
from ..run.jsonl import append_lines, read_lines, write_whole
from . import ask
from .ask import BaseWriter, Task, Writer
from .keep import SYSTEMS, Keeper
from .questions import Question, read_questions, write_questions
from .split import Passage

ROWS_A_CALL = 128
ANCHORS_A_CALL = 48
JUDGED_AT_ONCE = 64

Say = Callable[[str], None]


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
        questions: to write about each passage.
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
    """Writes questions and anchors into the run folder.

    Args:
        folder: the run's.
        passages: what is asked about.
        writer: of questions.
        base: writes anchors, and requests for a system prompt.
        tick: called with (done, all, what) after each call.
    """

    def __init__(
        self,
        folder: Path,
        passages: Sequence[Passage],
        writer: Writer,
        base: BaseWriter,
        plan: Plan,
        budget: Budget,
        tick: Callable[[int, int, str], None],
    ):
        self.folder, self.passages, self.writer, self.base = folder, list(passages), writer, base
        self.plan, self.budget, self.tick = plan, budget, tick
        self.file = folder / ASKED_FILE

    def calls(self) -> list[tuple[str, list[Task]]]:
        """All calls, in order: of passages as many rounds at once as make a good batch."""
        wanted = [p for p in self.passages if self.plan.only is None or p.number in set(self.plan.only)]
        no_tasks: list[Task] = []
        anchors = [("anchors", no_tasks)] * -(-self.plan.anchors // ANCHORS_A_CALL)
        if self.plan.is_prompt:
            requests = [("requests", no_tasks)] * -(-self.plan.questions // ANCHORS_A_CALL)
            return requests + anchors
        tasks = [
            Task(passage, kind, opening)
            for kind, opening in ask.rounds(self.plan.questions, first=self.plan.first_round)
            for passage in wanted
        ]
        batches = [tasks[i : i + ROWS_A_CALL] for i in range(0, len(tasks), ROWS_A_CALL)]
        return anchors + [("questions", batch) for batch in batches]

    def run(self) -> list[Question]:
        """Everything that was written, by this call and those before it; stops early when the time is used up."""
        done = self._done()
        calls = self.calls()
        seconds = 0.0
        for number in range(len(done), len(calls)):
            if number > 1 and self.budget.is_over(0.3, seconds):
                break
            started = time.monotonic()
            kind, tasks = calls[number]
            records = self._one(kind, tasks, (self.plan.seed, self.plan.first_round, number), done)
            append_lines(self.file, [{"call": number, "records": records}])
            done.append(records)
            seconds = time.monotonic() - started
            self.tick(number + 1, len(calls), "asking")
        own = [
            Question(question=request, passage=passage.number)
            for request in self.plan.requests
            for passage in self.passages
            if self.plan.is_prompt or ask.is_about(request, passage)
        ]
        return own + [Question(**record) for records in done for record in records]

    def _done(self) -> list[list[dict[str, Any]]]:
        """What earlier calls wrote; a line that a kill cut short is as if it had not been."""
        found: list[list[dict[str, Any]]] = []
        for line in read_lines(self.file):
            if line.get("call") == len(found):
                found.append(line["records"])
        return found

    def _one(
        self, kind: str, tasks: Sequence[Task], path: tuple[int, ...], done: Sequence[Sequence[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        if kind == "anchors":
            return [{"question": text, "kind": "everyday"} for text in self.base.everyday(ANCHORS_A_CALL, path)]
        if kind == "requests":
            prompt = self.passages[0]
            found = ask.for_prompt(prompt.text, self.base, ANCHORS_A_CALL, path)
            return [{"question": text, "kind": topic, "passage": prompt.number} for topic, text in found]
        earlier: dict[int, list[str]] = {}
        for records in done:
            for record in records:
                if record.get("passage") is not None:
                    earlier.setdefault(record["passage"], []).append(record["question"])
        written = self.writer.questions(tasks, earlier, path)
        return [
            {"question": text, "kind": task.kind, "passage": task.passage.number}
            for task, text in zip(tasks, written)
            if text
        ]


def sift(questions: Sequence[Question], passages: Sequence[Passage], *, is_prompt: bool) -> list[Question]:
    """Mark as dropped what can be seen to be no use without a model, and give every question its system turn."""
    seen: set[str] = set()
    by_number = {passage.number: passage for passage in passages}
    for i, question in enumerate(questions):
        passage = by_number.get(question.passage) if question.passage is not None and not is_prompt else None
        fault = ask.fault_of(question.question, passage, seen)
        seen.add(ask.normal(question.question))
        if not is_prompt and question.passage is not None and question.system is None:
            question.system = SYSTEMS[i % len(SYSTEMS)]
        if fault and question.kind != "own":
            question.use, question.why = "dropped", fault
    return list(questions)


def judge(
    folder: Path,
    questions: list[Question],
    keeper: Keeper,
    budget: Budget,
    tick: Callable[[int, int, str], None],
) -> list[Question]:
    """Answer and decide what is not judged yet; ``questions.jsonl`` is brought up to date after every batch."""
    path = folder / QUESTIONS_FILE
    waiting = [q for q in questions if q.use != "dropped" and keeper.needs_judging(q)]
    seconds = 0.0
    for start in range(0, len(waiting), JUDGED_AT_ONCE):
        if start and budget.is_over(0.5, seconds):
            for question in waiting[start:]:
                question.use, question.why = "dropped", "no time was left to judge it"
            break
        started = time.monotonic()
        part = waiting[start : start + JUDGED_AT_ONCE]
        keeper.judge(part)
        write_questions(path, questions)
        seconds = time.monotonic() - started
        tick(min(start + JUDGED_AT_ONCE, len(waiting)), len(waiting), "judging")
    write_questions(path, questions)
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


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
