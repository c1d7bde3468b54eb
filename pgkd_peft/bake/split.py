"""A document -> passages small enough to ask about, each with the headings that it stands under."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MOST_WORDS = 60
"""Of a passage. A small model writes no usable question on six facts at once; a larger one does not mind."""
LEAST_WORDS = 4

_HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*#*\s*$")
_UNDERLINE = re.compile(r"^(=|-)\1+\s*$")  # of the line above it, which is then a heading
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[^\W\d_a-z])")
_LABELLED = re.compile(r"(?:^|\s)\W*(?:Q|Question)\s?\d*\s?[.:)]\W*\s(.*?\?)(?=\W*(?:\s|$))", re.IGNORECASE)
_FENCE = re.compile(r"^\s*(```|~~~)")


@dataclass(frozen=True)
class Passage:
    """A piece of a document.

    Attributes:
        number: counted over all documents, from 0.
        source: name of the document.
        headings: those that it stands under, the outermost first.
        text: as it stands in the document.
    """

    number: int
    source: str
    headings: tuple[str, ...]
    text: str

    @property
    def privileged(self) -> str:
        """What the teacher reads: the headings, so that it is known what the text is about, and the text."""
        return f"{' > '.join(self.headings)}\n{self.text}" if self.headings else self.text


def split_documents(documents: Sequence[tuple[str, str]], *, most_words: int = MOST_WORDS) -> list[Passage]:
    """Passages of at most `most_words` words where sentences allow it, in reading order; nothing is left out but
    headings (which every passage carries) and lines without a letter or digit.

    Args:
        documents: (name, Markdown or plain text).
    """
    found: list[Passage] = []
    for name, text in documents:
        for headings, paragraph in _paragraphs(text):
            for piece in _pieces(paragraph, most_words):
                found.append(Passage(len(found), name, headings, piece))
    return found


def _paragraphs(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Blocks between blank lines, with their headings. A fenced block stays whole; a short block, and one that ends in
    a colon, joins the next; one that ends in a question mark stands above what follows, as a heading does."""
    headings: list[tuple[int, str]] = []
    asked, answered = "", False
    block: list[str] = []
    fenced = False
    single, blank = False, True  # the line before is words, the first of its block; it is blank
    for line in [*text.splitlines(), ""]:
        if _FENCE.match(line):
            fenced = not fenced
        heading = None if fenced else _HEADING.match(line)
        depth, title = (len(heading[1]), heading[2]) if heading else (0, "")
        if not fenced and single and (under := _UNDERLINE.match(line)):
            depth, title = (1 if under[1] == "=" else 2), block.pop().strip()
        if not fenced and (depth or not line.strip()):
            words = " ".join(block).split()
            last = words[-1].rstrip("\"'*_)") if words else ""
            least = LEAST_WORDS if answered or not asked else 1  # "Two crowns." is an answer
            if depth or (len(words) >= least and not last.endswith(":")):
                if last.endswith("?") and not depth:
                    asked = " ".join(words) if answered or not asked else f"{asked} {' '.join(words)}"
                    answered = False
                elif any(char.isalnum() for char in "".join(words)):
                    asked = "" if answered and _LABELLED.match(" ".join(words)) else asked  # the next, with its answer
                    yield _path(headings, asked), "\n".join(block).strip()
                    answered = True
                block = []
        if depth:
            if asked and not answered:
                yield _path(headings), asked
            asked, answered = "", False
            headings = [(level, name) for level, name in headings if level < depth] + [(depth, title)]
        elif line.strip() or fenced:
            block.append(line)
        single = blank and not depth and any(char.isalnum() for char in line)
        blank = not line.strip()
    if any(char.isalnum() for char in "".join(block)):
        yield _path(headings, asked), "\n".join(block).strip()
    elif asked and not answered:
        yield _path(headings), asked


def _path(headings: Sequence[tuple[int, str]], asked: str = "") -> tuple[str, ...]:
    return (*(title for _, title in headings), *([asked] if asked else []))


def _pieces(paragraph: str, most_words: int) -> Iterator[str]:
    """A paragraph cut between list items or sentences; a sentence is never cut."""
    if len(paragraph.split()) <= most_words:
        yield paragraph
        return
    lines = paragraph.splitlines()
    is_list = sum(bool(re.match(r"\s*([-*+•]|\d+[.)])\s", line)) for line in lines) > 1
    parts = _items(lines) if is_list else _SENTENCE_END.split(" ".join(lines))
    piece: list[str] = []
    for part in parts:
        if piece and len(" ".join([*piece, part]).split()) > most_words:
            yield ("\n" if is_list else " ").join(piece)
            piece = []
        piece.append(part)
    if piece:
        yield ("\n" if is_list else " ").join(piece)


def _items(lines: Sequence[str]) -> list[str]:
    """List items with their continuation lines."""
    items: list[str] = []
    for line in lines:
        if items and not re.match(r"\s*([-*+•]|\d+[.)])\s", line):
            items[-1] += "\n" + line
        else:
            items.append(line)
    return items


def asked_in(passages: Sequence[Passage]) -> list[tuple[str, Passage]]:
    """Questions that a document itself asks, as a list of frequent ones does, each with the passage that follows: what
    stands behind "Q.", headings that ask, and single sentences."""
    found: dict[tuple[str, str], Passage] = {}
    for passage in passages:
        for text in (*passage.headings[-1:], " ".join(passage.text.split())):
            labelled = _LABELLED.findall(text)
            for asked in labelled or _SENTENCE_END.split(text):
                question = asked.strip().strip("*_")
                if question.endswith("?") and len(question.split()) >= LEAST_WORDS:
                    found.setdefault((passage.source, question), passage)
    return [(question, passage) for (_, question), passage in found.items()]


def rules(prompt: str) -> list[str]:
    """The parts of a system prompt, for asking about them one by one: its lines, or the sentences of a single line."""
    lines = [line.strip() for line in prompt.splitlines() if any(char.isalnum() for char in line)]
    return lines if len(lines) > 1 else [part.strip() for part in _SENTENCE_END.split(prompt) if part.strip()]
