"""A document -> passages small enough to ask about, each with the headings that it stands under."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MOST_WORDS = 60
"""Of a passage. A small model writes no usable question on six facts at once; a larger one does not mind."""
LEAST_WORDS = 4

_HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*#*\s*$")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[^\W\d_a-z])")
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
    """Blocks between blank lines, with their headings; a fenced block stays whole, short blocks join the next one."""
    headings: list[tuple[int, str]] = []
    block: list[str] = []
    fenced = False

    def path() -> tuple[str, ...]:
        return tuple(title for _, title in headings)

    for line in [*text.splitlines(), ""]:
        if _FENCE.match(line):
            fenced = not fenced
        heading = None if fenced else _HEADING.match(line)
        if not fenced and (heading or not line.strip()):
            words = " ".join(block).split()
            lead_in = bool(words) and words[-1].endswith(":")  # "The rules are:" belongs to what follows
            if heading or (words and len(words) >= LEAST_WORDS and not lead_in):
                if any(char.isalnum() for char in "".join(words)):
                    yield path(), "\n".join(block).strip()
                block = []
        if heading:
            level = len(heading[1])
            headings = [(depth, title) for depth, title in headings if depth < level] + [(level, heading[2])]
        elif line.strip() or fenced:
            block.append(line)
    if any(char.isalnum() for char in "".join(block)):
        yield path(), "\n".join(block).strip()


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


def rules(prompt: str) -> list[str]:
    """The parts of a system prompt, for asking about them one by one: its lines, or the sentences of a single line."""
    lines = [line.strip() for line in prompt.splitlines() if any(char.isalnum() for char in line)]
    return lines if len(lines) > 1 else [part.strip() for part in _SENTENCE_END.split(prompt) if part.strip()]
