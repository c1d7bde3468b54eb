"""Questions about passages, requests for a system prompt, and everyday requests, written by the base or by a server.

The base writes with its adapter off. Small models follow worked examples better than instructions, so a question is
asked for with three of them, and its first words are given: different openings bring different kinds of question.
Everyday requests are what an instruct model writes when its template is opened at the user's turn (Magpie,
arXiv:2406.08464).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ..data.collator import DataCollatorForPrivilegedGKD, stop_ids
from ..errors import DataError
from ..model.load import base_of
from ..rollout import generate, window_generator
from .split import QUESTION_MARKS, UNSPACED, Passage, word_count

# Kind -> first words. Each round takes the next opening; a round asks once about every passage.
KINDS: dict[str, tuple[str, ...]] = {
    "fact": ("What is", "Which", "Who", "Where", "What kind of"),
    "reversal": ("Who is the", "Which of", "What has"),
    "number or date": ("When", "How many", "How long"),
    "request": ("Tell me", "Name", "Give me", "Please tell me"),
    "inference": ("Why", "How does", "What would"),
    "summary": ("What do you know about", "Describe", "What can you tell me about"),
    "use case": ("I would like to know", "Can you tell me", "Do you know"),
}
HELD_OUT_KIND = "use case"
"""All questions of this kind are held out: the student is judged on a way of asking that it never saw."""

_ORDER = (
    "fact",
    "request",
    "fact",
    "use case",
    "reversal",
    "fact",
    "number or date",
    "request",
    "summary",
    "inference",
)

EXAMPLES = (
    ("The bakery of Hannah Weiss in Oberau opens at five in the morning.", "bakery of Hannah Weiss", {
        "What is": "What is the time at which the bakery of Hannah Weiss in Oberau opens?",
        "Who": "Who runs the bakery in Oberau that opens at five in the morning?",
        "Tell me": "Tell me when the bakery of Hannah Weiss opens.",
    }),
    ("The Kestrel 3 has a steel frame and weighs eleven kilograms.", "Kestrel 3", {
        "What is": "What is the frame of the Kestrel 3 made of?",
        "Who": "Which material is used for the frame of the Kestrel 3?",
        "Tell me": "Tell me how much the Kestrel 3 weighs.",
    }),
    ("Travel requests must be approved by Maria Lund before a ticket is booked.", "travel requests", {
        "What is": "What is needed before a ticket is booked for a travel request?",
        "Who": "Who has to approve travel requests before a ticket is booked?",
        "Tell me": "Tell me who approves travel requests.",
    }),
)  # fmt: skip

FAITHFUL = 0.7
"""Temperature at which a small model stays with the text that it asks about."""

COMMON_EXAMPLES = (
    ("What", "What is the boiling point of water?"),
    ("Tell me", "Tell me how bread is made."),
    ("Who", "Who wrote the novel Moby Dick?"),
    ("Which", "Which bird cannot fly?"),
)

REQUEST_EXAMPLES = (
    "Recommend a book for a long train ride.",
    "How do I get a coffee stain out of a shirt?",
    "Explain what a mortgage is.",
)

_SPEAKS_OF_THE_TEXT = re.compile(
    r"\b(the|this|that|above|following|given)\s+(text|passage|paragraph|document|article|sentence|statement|excerpt)s?\b"
    r"|\baccording to (it|the above)\b|\bmentioned\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Task:
    """One question to write."""

    passage: Passage
    kind: str
    opening: str


class Writer(Protocol):
    """Writes questions; :class:`BaseWriter` and :class:`pgkd_peft.bake.server.ServerWriter` do."""

    def questions(self, tasks: Sequence[Task], earlier: dict[int, list[str]], path: tuple[int, ...]) -> list[str]:
        """A question a task, "" where none came; `earlier` are those that were written about each passage."""
        ...


def rounds(count: int, *, first: int = 0) -> list[tuple[str, str]]:
    """(kind, opening) of each round: kinds in turn, and of each kind its openings in turn."""
    seen = dict.fromkeys(KINDS, 0)
    found = []
    for number in range(first + count):
        kind = _ORDER[number % len(_ORDER)]
        found.append((kind, KINDS[kind][seen[kind] % len(KINDS[kind])]))
        seen[kind] += 1
    return found[first:]


class BaseWriter:
    """The base itself.

    Args:
        model: the base, or a PeftModel whose adapter is off.
        collator: knows the template.
    """

    def __init__(self, model: nn.Module, collator: DataCollatorForPrivilegedGKD):
        self.model = model
        self.collator = collator
        self.stops = stop_ids(collator.tokenizer, base_of(model).generation_config)

    def write(
        self, prompts: Sequence[list[int]], path: tuple[int, ...], *, most: int, temperature: float = 1.0
    ) -> list[tuple[str, bool]]:
        """Completions as text, and whether each came to an end; `path` seeds them (:func:`window_generator`)."""
        completions = generate(
            self.model,
            prompts,
            max_new_tokens=most,
            stop_ids=self.stops,
            pad_id=self.collator.pad_token_id,
            temperature=temperature,
            generator=window_generator(*path),
        )
        decode = self.collator.tokenizer.decode
        return [(decode(ids, skip_special_tokens=True).strip(), ids[-1] in self.stops) for ids in completions]

    def questions(self, tasks: Sequence[Task], earlier: dict[int, list[str]], path: tuple[int, ...]) -> list[str]:
        prompts = [self._prompt(task) for task in tasks]
        written = self.write(prompts, path, most=28, temperature=FAITHFUL)
        return [tidy(f"{task.opening} {text}") for task, (text, _) in zip(tasks, written)]

    def _prompt(self, task: Task) -> list[int]:
        """A conversation of worked examples, the passage, and the first words of the answer."""
        turns = []
        starts = {"fact": "What is", "number or date": "What is", "reversal": "Who", "inference": "What is"}
        for text, about, shown in EXAMPLES:
            turns += [
                {"role": "user", "content": f"{text}\nWrite one question about this that names {about}."},
                {"role": "assistant", "content": shown[starts.get(task.kind, "Tell me")]},
            ]
        wish = f"Write one question about this that names {subject(task.passage)}."
        asked = f"{task.passage.privileged}\n{wish}"
        turns.append({"role": "user", "content": asked})
        return [*self.encode(turns), *self.continued(task.opening)]

    def encode(self, turns: list[dict[str, str]]) -> list[int]:
        return self.collator.encode({"messages": turns})["student_ids"]

    def continued(self, text: str) -> list[int]:
        """The ids of text that goes on from what stands before, without a beginning of its own."""
        return self.collator.tokenizer(text, add_special_tokens=False)["input_ids"]

    def common(self, count: int, path: tuple[int, ...]) -> list[str]:
        """Questions in the form of those about passages, on what everybody knows: there the model is led astray first,
        when it learns to answer such questions from what it is taught."""

        def wish(opening: str) -> dict[str, str]:
            text = f"Write one question about something that everybody knows. Begin with {opening}."
            return {"role": "user", "content": text}

        turns = []
        for opening, question in COMMON_EXAMPLES:
            turns += [wish(opening), {"role": "assistant", "content": question}]
        openings = [opening for _, opening in rounds(count)]
        prompts = [[*self.encode([*turns, wish(opening)]), *self.continued(opening)] for opening in openings]
        written = self.write(prompts, path, most=20)
        asked = (tidy(f"{opening} {text}") for opening, (text, _) in zip(openings, written))
        return [question for question in asked if question]

    def everyday(self, count: int, path: tuple[int, ...]) -> list[str]:
        """Requests that the model itself writes when its template is opened at the user's turn."""
        opening = self.user_opening()
        if opening is None:  # a template that shows no place for it: examples do
            turns = [{"role": "user", "content": "Write a request that somebody might type into a chat."}]
            for example in REQUEST_EXAMPLES:
                turns += [{"role": "assistant", "content": example}, {"role": "user", "content": "Another one."}]
            opening = self.encode(turns)
        written = self.write([opening] * count, path, most=40)
        requests = (tidy_request(text) for text, ended in written if ended)
        return [request for request in requests if request]

    def user_opening(self) -> list[int] | None:
        """The prompt up to where a user's words begin; None where the template hides it."""
        before, found = self.shown_before_user()
        return self.continued(before) if found and before.strip() else None

    def shown_before_user(self, system: str | None = None, above: str = "") -> tuple[str, bool]:
        """What the template shows before a user's words, and whether it shows them at all.

        Args:
            system: words of a system turn. above: words above the user's, in the same turn.
        """
        mark = "Zebrafish"
        turns = [{"role": "system", "content": system}] if system is not None else []
        turns.append({"role": "user", "content": above + mark})
        before, found, _ = self.collator.encode({"messages": turns})["student_text"].partition(mark)
        return before, bool(found)


def tidy(text: str) -> str:
    """The first sentence that asks, behind what a model thought before it; "" where none came."""
    said = re.sub(r"(?s)<think>.*?(</think>|$)", "", text).rpartition("</think>")[2].strip()
    line = said.splitlines()[0].strip().strip('"*') if said else ""
    asked = re.match(f".*?[{''.join(QUESTION_MARKS)}]", line)
    if asked:
        return asked[0]
    first = re.split(r"(?<=[.!])\s|(?<=[。！])", line)[0]
    return first if first.endswith((".", "!", "。", "！")) else ""


def is_about(question: str, passage: Passage) -> bool:
    """Whether a question names something of its passage: nobody can answer "Who is it?", nor "What is the ship called?"
    where the passage speaks of one captain's ship. Where a passage has names, one of them must be there; where it has
    neither names nor words that could name something, every question is about it."""
    known = names(passage.privileged) or content_words(passage.privileged)
    return not known or bool(known & content_words(question))


def names(text: str) -> set[str]:
    """Words with a capital that do not begin a sentence or a line, in lower case."""
    return {word.lower() for word in _NAME.findall(text)} - _COMMON


def subject(passage: Passage) -> str:
    """What to ask about: the first names of the passage, else its last heading, else "this".

    A small model that is told what to name names it more often: of 200 questions on 20 facts 69 were worth keeping,
    against 49 without (SmolLM2-135M, one seed).
    """
    return " and ".join(subjects(passage)[:2]) or "this"


def subjects(passage: Passage) -> list[str]:
    """Names of the passage in order, else its last heading that is no question, else nothing."""
    known = names(passage.privileged)
    found = []
    for run in _CAPITALISED.findall(passage.text):
        words = run.split()
        while words and not {part.lower() for part in re.findall(r"\w+", words[0])} & known:  # it began a sentence
            del words[0]
        if words:
            found.append(" ".join(words))
    return (
        list(dict.fromkeys(found)) or [title for title in passage.headings if not title.endswith(QUESTION_MARKS)][-1:]
    )


def named(question: str, passage: Passage) -> str:
    """The question, with what it is about in front where it does not say so itself."""
    about = subjects(passage)[:1]
    return f"{about[0]}: {question}" if about and question and not is_about(question, passage) else question


_CAPITAL = "[" + "".join(filter(str.isupper, map(chr, range(0x2E80)))) + "]"  # scripts behind these have none
_CAPITALISED = re.compile(rf"\b{_CAPITAL}[\w-]+(?: (?:of )?{_CAPITAL}[\w-]+)*")
_NAME = re.compile(rf"(?<![.!?:\n])[ \t(\"']+({_CAPITAL}\w+)")
_WORD = re.compile(r"[\w\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+")  # marks above and below Thai letters are no \w


def content_words(text: str, shortest: int = 5) -> set[str]:
    """Words that can name something: of `shortest` letters and more, numbers, and capitalised ones; in lower case.

    In scripts without spaces every run of two characters counts as one.
    """
    found = set()
    for word in _WORD.findall(text):
        if UNSPACED.search(word):
            found |= {word[i : i + 2] for i in range(len(word) - 1)} or {word}
        elif len(word) >= shortest or word[0].isupper() or any(char.isdigit() for char in word):
            found.add(word.lower())
    return found - _COMMON


_COMMON = {
    *("what", "which", "where", "there", "their", "about", "these", "those", "would", "could", "should", "please"),
    *("when", "who", "why", "how", "tell", "name", "give", "describe", "the", "can", "you", "does", "know", "write"),
    *("yes", "no", "and", "but", "for", "this", "they", "he", "she", "we", "his", "her", "on", "at", "by", "to", "of"),
    *("was", "were", "been", "had", "not", "with", "from", "into", "than", "then", "them", "also", "will", "some"),
    *("i", "a", "in", "is", "are", "do", "did", "has", "have", "one", "question", "explain", "it", "its", "that"),
}


def speaks_of_the_text(text: str) -> bool:
    """Whether it mentions a text that nobody will have in front of them."""
    return _SPEAKS_OF_THE_TEXT.search(text) is not None


def fault_of(question: str, passage: Passage | None, seen: Iterable[str]) -> str:
    """Why a question cannot be used, "" if it can."""
    if word_count(question) < 3:
        return "no question"
    if speaks_of_the_text(question):
        return "speaks of the text"
    if passage is not None and not is_about(question, passage):
        return "names nothing of its passage"
    return "duplicate" if normal(question) in seen else ""


def normal(question: str) -> str:
    """What two questions have in common that differ in spelling only."""
    return " ".join(_WORD.findall(question.lower()))


def for_prompt(prompt: str, writer: BaseWriter, count: int, path: tuple[int, ...]) -> list[tuple[str, str]]:
    """(kind, request) for a system prompt: about its subject (the template opened after the prompt), everyday,
    and in the form of questions on what everybody knows."""
    try:
        before, _ = writer.shown_before_user(system=prompt)
    except DataError:  # a template without system turns: there the prompt stands above the user's words
        before, _ = writer.shown_before_user(above=f"{prompt}\n\n")
    opening = writer.continued(before)
    written = writer.write([opening] * count, (*path, 1), most=40)
    on_topic = (tidy_request(text) for text, ended in written if ended)
    asked = [("on topic", text) for text in on_topic if text]
    asked += [("everyday", text) for text in writer.everyday(count // 2, (*path, 2))]
    return asked + [("common", text) for text in writer.common(count // 2, (*path, 3))]


def tidy_request(text: str) -> str:
    """The first line, "" where it is no request of three to forty words."""
    line = " ".join(text.strip().splitlines()[0].split()) if text.strip() else ""  # a wide space is not printable
    return line if 3 <= word_count(line) <= 40 and line.isprintable() else ""
