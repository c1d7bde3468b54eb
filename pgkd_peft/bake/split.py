"""A document -> passages small enough to ask about, each with the headings that it stands under."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

logger = logging.getLogger(__name__)

MOST_WORDS = 60
"""Of a passage. A small model writes no usable question on six facts at once; a larger one does not mind."""
LEAST_WORDS = 4
LEAST_TITLE = 3  # of a heading with nothing below it that is taken for a statement
QUESTION_MARKS = ("?", "？", "؟")
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\U0010ffff]")
"""A character of a script that sets no spaces between words: Thai, Lao, Burmese, Khmer, and those of East Asia."""

_HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*#*\s*$")
_UNDERLINES = "=-~"  # the outermost first
_UNDERLINE = re.compile(r"^([-=~])\1+\s*$")  # of the line above it, which is then a heading
_END = ".!?؟۔।॥։።။។៕"  # also of Urdu, Hindi, Armenian, Amharic, Burmese and Khmer
_SENTENCE_END = re.compile(
    rf"""(?:(?<=[{_END}])|(?<=[{_END}]["')\]])|(?<=[{_END}]["')\]]{{2}}))\s+(?=["'(\[]*[^\W\d_a-z])"""
    r"|(?<=[。！？])(?![。！？”’」』）])\s*(?=\S)"
    r"|(?<=[\u0e00-\u0eff])\s+(?=[\u0e00-\u0eff])"  # Thai and Lao set a space there, and no mark
)
_LABELLED = re.compile(r"(?:^|\s)\W*(?:Q|Question)\s?\d*\s?[.:)]\W*\s(.*?\?)(?=\W*(?:\s|$))", re.IGNORECASE)
_FENCE = re.compile(r"^\s*(`{3,}|~{3,})(.*)$")
_TABLE = re.compile(r"^\s*\|")
_ITEM = re.compile(r"\s*([-*+•]|\d+[.)])\s")


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


def word_count(text: str) -> int:
    """How many words a text has; two letters of a script without spaces count as one."""
    unspaced = sum(char.isalnum() for char in UNSPACED.findall(text))
    return len(UNSPACED.sub(" ", text).split()) + (unspaced + 1) // 2


def sentences(text: str) -> list[str]:
    """A text cut behind its sentences; nothing is lost, what stands between two of them belongs to the first."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return [text[start:end] for start, end in pairwise([0, *ends, len(text)])]


def split_documents(documents: Sequence[tuple[str, str]], *, most_words: int = MOST_WORDS) -> list[Passage]:
    """Passages of at most `most_words` words where sentences allow it, in reading order; nothing is left out but
    headings (which every passage carries; of one or two words with nothing below, they are named in the log) and lines
    without a letter or digit.

    Args:
        documents: (name, Markdown or plain text).
    """
    found: list[Passage] = []
    for name, text in documents:
        bare: list[str] = []
        for headings, paragraph in _paragraphs(text):
            bare += [] if paragraph else [" > ".join(headings)]
            for piece in _pieces(paragraph, most_words) if paragraph else ():
                found.append(Passage(len(found), name, headings, piece))
        if bare and found:
            logger.warning("%s: headings with nothing below them are left out: %s.", name, ", ".join(bare))
    return found


def _paragraphs(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Blocks between blank lines, with their headings. A fenced block stays whole; a short block, and one that ends in
    a colon, joins the next; one that ends in a question mark stands above what follows, as a heading does."""
    headings: list[tuple[int, str]] = []
    asked, answered = "", False
    block: list[str] = []
    fence = ""
    single, blank = False, True  # the line before is words, the first of its block; it is blank
    for line in [*text.splitlines(), ""]:
        under = _underline(line, block[-1]) if single and not fence else 0
        fence = "" if under else _fence_after(line, fence)
        heading = None if fence else _HEADING.match(line)
        depth, title = (len(heading[1]), heading[2]) if heading else (0, "")
        if under:
            depth, title = under, block.pop().strip()
        if not fence and (depth or not line.strip()):
            words = " ".join(" ".join(block).split())
            last = words.rstrip("\"'*_)”’」』）")
            least = LEAST_WORDS if answered or not asked else 1  # "Two crowns." is an answer
            if depth or (word_count(words) >= least and not last.endswith((":", "："))):
                if last.endswith(QUESTION_MARKS) and not depth:
                    asked = words if answered or not asked else f"{asked} {words}"
                    answered = False
                elif any(char.isalnum() for char in words):
                    asked = "" if answered and _LABELLED.match(words) else asked  # the next, with its answer
                    yield _path(headings, asked), "\n".join(block).strip()
                    answered = True
                block = []
        if depth:
            if asked and not answered:
                yield _path(headings), asked
            elif not answered and headings and headings[-1][0] >= depth:
                yield _bare(headings)
            asked, answered = "", False
            headings = [(level, name) for level, name in headings if level < depth] + [(depth, title)]
        elif line.strip() or fence:
            block.append(line)
        single = blank and not depth and any(char.isalnum() for char in line)
        blank = not line.strip()
    if any(char.isalnum() for char in "".join(block)):
        yield _path(headings, asked), "\n".join(block).strip()
    elif asked and not answered:
        yield _path(headings), asked
    elif headings and not answered:
        yield _bare(headings)


def _bare(headings: Sequence[tuple[int, str]]) -> tuple[tuple[str, ...], str]:
    """A heading with nothing below it, as a paragraph of its own; with no text if it says too little for one."""
    title = headings[-1][1]
    return (_path(headings[:-1]), title) if word_count(title) >= LEAST_TITLE else (_path(headings), "")


def _path(headings: Sequence[tuple[int, str]], asked: str = "") -> tuple[str, ...]:
    return (*(title for _, title in headings), *([asked] if asked else []))


def _underline(line: str, above: str) -> int:
    """The depth of the heading that a line makes of the one above it, 0 where it makes none. Three ~ may also open a
    block of code; they underline what is no longer than they are."""
    found = _UNDERLINE.match(line)
    if found is None or (found[1] == "~" and len(line.strip()) < len(above.strip())):
        return 0
    return _UNDERLINES.index(found[1]) + 1


def _fence_after(line: str, fence: str) -> str:
    """The fence of the block of code that is open behind a line, "" where none is."""
    found = _FENCE.match(line)
    if found is None:
        return fence
    mark, behind = found[1], found[2]
    if not fence:
        return "" if mark[0] == "`" and "`" in behind else mark
    closes = mark[0] == fence[0] and len(mark) >= len(fence) and not behind.strip()
    return "" if closes else fence


def _pieces(paragraph: str, most_words: int) -> Iterator[str]:
    """A paragraph cut between list items or sentences, in code and tables between lines; a sentence is never cut."""
    if word_count(paragraph) <= most_words:
        yield paragraph
        return
    piece = ""
    for part in _parts(paragraph.split("\n"), most_words):
        says = any(char.isalnum() for char in part)  # else it would be no passage
        if piece and says and word_count(piece + part) > most_words:
            yield piece.rstrip()
            piece = ""
        piece += part
    if piece:
        yield piece.rstrip()


def _parts(lines: Sequence[str], most_words: int) -> Iterator[str]:
    """List items with their continuation lines, lines of code and tables, and sentences, each with what stands behind
    it; of a list item that is too long, its lines of code and its sentences."""
    as_lines, fence = [], ""
    for line in lines:
        as_lines.append(bool(fence or _FENCE.match(line) or _TABLE.match(line)))
        fence = _fence_after(line, fence)
    items = [i for i, line in enumerate(lines) if _ITEM.match(line) and not as_lines[i]]
    if len(items) > 1:
        for start, end in pairwise(sorted({0, *items, len(lines)})):
            item = "\n".join(lines[start:end]) + "\n"
            too_long = word_count(item) > most_words and any(as_lines[start:end])
            yield from [*_parts(lines[start:end], most_words), "\n"] if too_long else [item]
        return
    prose: list[str] = []
    for line, is_line in zip(lines, as_lines):
        if not is_line:
            prose.append(line)
            continue
        if prose:
            yield from _sayings(prose, most_words)
            yield "\n"
            prose = []
        yield line + "\n"
    yield from _sayings(prose, most_words)


def _sayings(lines: Sequence[str], most_words: int) -> Iterator[str]:
    """Sentences, each on one line; the lines of what has no end of a sentence for too long."""
    for sentence in sentences("\n".join(lines)):
        too_long = word_count(sentence) > most_words
        yield from sentence.splitlines(keepends=True) if too_long else [sentence.replace("\n", " ")]


def asked_in(passages: Sequence[Passage]) -> list[tuple[str, Passage]]:
    """Questions that a document itself asks, as a list of frequent ones does, each with the passage that follows: what
    stands behind "Q.", headings that ask, and single sentences."""
    found: dict[tuple[str, str], Passage] = {}
    for passage in passages:
        for text in (*passage.headings[-1:], " ".join(passage.text.split())):
            labelled = _LABELLED.findall(text)
            for asked in labelled or sentences(text):
                question = asked.strip().strip("*_")
                if question.endswith(QUESTION_MARKS) and word_count(question) >= LEAST_WORDS:
                    found.setdefault((passage.source, question), passage)
    return [(question, passage) for (_, question), passage in found.items()]


def rules(prompt: str) -> list[str]:
    """The parts of a system prompt that are looked at one by one: blocks between blank lines, of a list its items; of a
    single block its lines, of a single line its sentences."""
    blocks = [block.splitlines() for block in re.split(r"\n\s*\n", prompt) if any(char.isalnum() for char in block)]
    found: list[str] = []
    for lines in blocks:
        if len(blocks) == 1 or sum(bool(_ITEM.match(line)) for line in lines) > 1:
            for line in lines:
                if found and not _ITEM.match(line) and line.startswith((" ", "\t")):
                    found[-1] += "\n" + line.rstrip()  # goes on from the item above
                elif any(char.isalnum() for char in line):
                    found.append(line.strip())
        else:
            found.append("\n".join(lines).strip())
    return found if len(found) > 1 else [part.strip() for part in sentences(prompt) if part.strip()]
