"""Is this answer right? Scorers by name: exact, contains, regex, numeric, choice, or ``module:function``.

A scorer is called with the model's answer and the data row, and returns a number from 0 (wrong) to 1 (right).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError, DataError, explained

Scorer = Callable[[str, Mapping[str, Any]], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Scripts that do not put spaces between words (or glue particles to them): Thai to Myanmar, Khmer, CJK, Hangul.
_SPACELESS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]")
_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_STATED = re.compile(r"(?:####|\\boxed\{|\banswer\b[^\d\n.;]{0,20}?)\s*\$?\s*(?=[-+.]?\d)", re.IGNORECASE)
# Lists, headings, quotes, tables, bold type, code.
_MARKDOWN = re.compile(r"^\s*(?:[-*+•>|]|#{1,6}\s|\d+[.)]\s)|\*\*|__|`", re.MULTILINE)
_OPTION = re.compile(r"^\s*[A-Z][.)]\s+")
# How a text says which option it chooses, the plainest way first. A bare "A" may be an article, so it needs a mark.
_CHOICES = (
    re.compile(r"\b[Aa]nswer\b\W*(?:(?:is|would be|should be|must be)\b)?\W*([A-J])\b(?!['’])"),
    re.compile(r"\\boxed\{\W*([A-J])\W*\}"),
    re.compile(r"^\W*([A-J])(?:\W*$|[).:])", re.MULTILINE),
    re.compile(r"\(([A-J])\)"),
    re.compile(r"\b(?:[Oo]ption|[Cc]hoice)\s+([A-J])\b"),
)


def make_scorer(spec: str, *, answer_key: str = "answer") -> Scorer:
    """The scorer of that name.

    Args:
        spec: * ``exact``: the answer equals the reference after :func:`normalize`;
            * ``contains``: the reference stands in the answer, as whole words, after :func:`normalize`;
            * ``regex``: the reference is a regular expression that is found in the answer;
            * ``numeric``: the number that the answer states (or else its last one) equals the reference's;
            * ``choice``: the letter A–J that the answer chooses is the reference;
            * ``module:function`` or ``path/to/file.py:function``: your own, called with the answer and the row,
              returning a number from 0 to 1.
        answer_key: the column with the reference (a string, a number, or a list of which any will do). Rows without
            it are scored against their final assistant message.

    Raises:
        ConfigError: no such scorer, module or function.
    """
    if ":" in spec:
        return _own_function(spec)
    if spec not in _SCORERS:
        raise ConfigError(
            f"the scorer is {spec!r}; accepted are {', '.join(_SCORERS)}, or module:function for one of your own"
        )
    score = _SCORERS[spec]

    def scorer(answer: str, row: Mapping[str, Any]) -> float:
        return float(max(score(answer, reference) for reference in references(row, answer_key)))

    return scorer


def references(row: Mapping[str, Any], answer_key: str = "answer") -> list[str]:
    """The reference answers of a row, as strings.

    Raises:
        DataError: it has none.
    """
    value = row.get(answer_key)
    if value is None:
        messages = row.get("messages") or []
        if messages and messages[-1].get("role") == "assistant":
            value = messages[-1].get("content")
    found = [str(v) for v in (value if isinstance(value, (list, tuple)) else [value]) if v is not None]
    found = [text for text in found if text.strip()]
    if not found:
        raise DataError(f"no reference to score against: neither a column {answer_key!r} nor a final assistant message")
    return found


def check_scorable(rows: Sequence[Mapping[str, Any]], scorer: Scorer) -> None:
    """Score an empty answer to every row, so that rows that cannot be scored are found before a model is loaded.

    Raises:
        DataError: one report on all of them.
    """
    from ..data.files import bad_rows_error

    faults = {}
    for i, row in enumerate(rows):
        try:
            scorer("", row)
        except DataError as error:
            faults[i] = str(error)
    if faults:
        raise bad_rows_error(faults, len(rows))


def normalize(text: str) -> str:
    """Lower case, without punctuation, symbols, English articles and thousands separators, single spaces.

    A text that has nothing else keeps them, so that the answers "A" and "+" stay what they are.

    >>> normalize("The  Great-Dane!")
    'great dane'
    """
    return _bare(text) or " ".join(_fold(text).split())


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _bare(text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", _fold(text))
    words = "".join(" " if unicodedata.category(c)[0] in "PSZC" else c for c in text)
    return " ".join(_ARTICLES.sub(" ", words).split())


def contains(answer: str, reference: str) -> bool:
    """Whether `reference` stands in `answer` as whole words (anywhere, in scripts without spaces between words)."""
    wanted = _bare(reference)
    if not wanted:
        return re.search(rf"(?<!\w){re.escape(_fold(reference).strip())}(?!\w)", _fold(answer)) is not None
    if _SPACELESS.search(wanted):
        return wanted in _bare(answer)
    return f" {wanted} " in f" {_bare(answer)} "


def _regex(answer: str, reference: str) -> bool:
    try:
        return re.search(reference, answer) is not None
    except re.error as error:
        raise DataError(f"the reference {reference!r} is not a regular expression: {error}") from error


def number_in(text: str) -> float | None:
    """The number that a text gives as its answer: after ``####``, ``\\boxed{`` or "answer …", else the last one."""
    text = text.replace("−", "-")
    stated = [_NUMBER.match(text, mark.end()) for mark in _STATED.finditer(text)]
    found = next((m for m in reversed(stated) if m), None)
    if found is None:
        found = next(reversed(list(_NUMBER.finditer(text))), None)
    if found is None:
        return None
    digits = found[0].replace(",", "")
    if digits[0] in "+-" and text[: found.start()][-1:].isalnum():
        digits = digits[1:]  # 10-12 is a range or a difference, not a minus sign
    return float(digits)


def _numeric(answer: str, reference: str) -> bool:
    wanted = number_in(reference)
    if wanted is None:
        raise DataError(f"the reference {reference!r} holds no number")
    given = number_in(answer)
    return given is not None and math.isclose(given, wanted, rel_tol=1e-6, abs_tol=1e-9)


def chosen_letter(text: str) -> str | None:
    """The option A–J that a text chooses: "the answer is B", "(B)", "B." and the like; None when it chooses none."""
    for pattern in _CHOICES:
        found = pattern.search(text)
        if found:
            return found[1]
    return None


def _choice(answer: str, reference: str) -> bool:
    wanted = reference.strip(" ().").upper()
    if len(wanted) != 1 or not "A" <= wanted <= "J":
        raise DataError(f"the reference {reference!r} is no letter from A to J")
    return chosen_letter(answer) == wanted


_SCORERS: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda answer, reference: normalize(answer) == normalize(reference),
    "contains": contains,
    "regex": _regex,
    "numeric": _numeric,
    "choice": _choice,
}


def at_most_five_words(answer: str, row: Mapping[str, Any]) -> float:
    """1 for an answer of one to five words, whatever it says: ``pgkd_peft.evaluation.scorers:at_most_five_words``."""
    return float(1 <= len(answer.split()) <= 5)


def short_plain_prose(answer: str, row: Mapping[str, Any]) -> float:
    """1 for an answer of one to sixty words without Markdown: ``pgkd_peft.evaluation.scorers:short_plain_prose``."""
    return float(1 <= len(answer.split()) <= 60 and not _MARKDOWN.search(answer))


def right_option_alone(answer: str, row: Mapping[str, Any]) -> float:
    """1 for an answer that names the right one of the row's `options` ("A. …", one a line) and no other, by its text:
    ``pgkd_peft.evaluation.scorers:right_option_alone``. The reference is the row's `answer`, as it stands among the
    options."""
    options = [_OPTION.sub("", line).strip() for line in str(row.get("options", "")).splitlines() if line.strip()]
    right = _OPTION.sub("", references(row)[0]).strip()
    if right not in options:
        raise DataError(f"the reference {right!r} is none of the row's options {options}")
    named = [option for option in options if contains(answer, option)]
    longest = [o for o in named if not any(o != other and contains(other, o) for other in named)]
    return float(longest == [right])


def _own_function(spec: str) -> Scorer:
    from ..data.feedback import load_module  # brings torch, which the other scorers do without

    source, _, name = spec.rpartition(":")
    how = "Write it as module:function, or path/to/file.py:function."
    with explained(f"the scorer {spec!r} cannot be imported", ConfigError, how):
        function = getattr(load_module(source), name)
    if not callable(function):
        raise ConfigError(f"the scorer {spec!r} is a {type(function).__name__}, not a function")

    def scorer(answer: str, row: Mapping[str, Any]) -> float:
        with explained(f"the scorer {spec} failed on the answer {answer[:80]!r}", ConfigError):
            value = float(function(answer, row))
        if not 0 <= value <= 1:
            raise ConfigError(f"the scorer {spec} returned {value}; a score must lie between 0 and 1")
        return value

    return scorer
