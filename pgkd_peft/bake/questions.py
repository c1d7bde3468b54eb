"""``questions.jsonl``: one question a line, to be read and edited; what stands there is what is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

from ..data.row import load_json
from ..errors import DataError
from ..run.jsonl import write_lines
from .read import utf8_text

_TYPES: dict[str, tuple[type, ...]] = {
    **{"str": (str,), "int": (int,), "str | None": (str, NoneType)},
    **{"int | None": (int, NoneType), "float | None": (float, int, NoneType)},
}
USES = ("train", "heldout", "anchor", "dropped")
OWN, OF_THE_TEXT = "own", "of the text"  # kinds of questions that nobody wrote for this: the user's, the document's


@dataclass
class Question:
    """One request, and what became of it.

    Attributes:
        question: what the user says.
        passage: number of the passage that it is about; None for an anchor, which has no PI.
        kind: of question, see :data:`pgkd_peft.bake.ask.KINDS`; "own" for the user's, "of the text" for those that the
            document asks, "everyday" and "common" for what the model asks when it is told nothing.
        system: a system turn that teacher and student both read; None for the template's own.
        use: train, heldout, anchor or dropped; empty until it was judged.
        why: why it is dropped, an anchor, or held out.
        gap: nats that the PI gains on the teacher's answer: log p(answer | PI) - log p(answer).
        unsure: the teacher's own surprise at its answer, nats a token.
        answer: the teacher's answer (of an anchor: the base's).
        asked: digest of what the answer was made from; another one means that a line was edited since.
        call: number of the call that wrote it; -1 for the user's own.
    """

    question: str
    passage: int | None = None
    kind: str = OWN
    system: str | None = None
    use: str = ""
    why: str = ""
    gap: float | None = None
    unsure: float | None = None
    answer: str = ""
    asked: str = ""
    call: int = -1

    def digest(self, privileged: str) -> str:
        content = json.dumps([self.question, self.passage, self.system, privileged])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def messages(self) -> list[dict[str, str]]:
        """The conversation up to the answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.question}]


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """All of them, whole or not at all."""
    write_lines(path, map(asdict, questions))


def read_questions(path: Path, passages: int) -> list[Question]:
    """What the file says now, the user's edits included.

    Args:
        passages: how many there are.

    Raises:
        DataError: names each line that cannot be used, or the file where it is not UTF-8.
    """
    known = {f.name for f in fields(Question)}
    found, faults = [], []
    for number, line in enumerate(utf8_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(_parsed(load_json(line), known, passages))
        except (ValueError, TypeError) as error:
            faults.append(f"line {number}: {error}")
    if faults:
        raise DataError(f"{path} cannot be used:\n" + "\n".join(f"  {fault}" for fault in faults[:20]))
    return found


def _parsed(record: Any, known: set[str], passages: int) -> Question:
    if not isinstance(record, dict):
        raise ValueError('it is no JSON object; give {"question": ..., "passage": ...}')
    unknown = set(record) - known
    if unknown:
        raise ValueError(f"unknown key {sorted(unknown)[0]!r}; known are {', '.join(sorted(known))}")
    question = Question(**record)
    for f in fields(Question):
        value = getattr(question, f.name)
        if type(value) not in _TYPES[str(f.type)]:
            raise ValueError(f"{f.name} is {value!r}; it is {f.type}")
    if not question.question.strip():
        raise ValueError("question is empty; write one, or delete the line")
    if question.passage is not None and not 0 <= question.passage < passages:
        raise ValueError(f"passage is {question.passage!r}; there are passages 0 to {passages - 1}")
    if question.use not in ("", *USES):
        raise ValueError(f"use is {question.use!r}; accepted are {', '.join(USES)}, or leave it out")
    return question
